"""Makes a catalogue entry into a backend that can be started: its files and a virtual environment of its own.

Owns how a version is made, and how uv is run on this machine (`run_uv`). One is built beside the others, started, asked
for its health, and only then switched to (`workers.versions`). What to install is the caller's decision.
"""

from __future__ import annotations

import configparser
import errno
import hashlib
import platform
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import uv

from localai_q.cluster.builds import Build, choose, suitable
from localai_q.cluster.events import Progress
from localai_q.config import child_environment
from localai_q.errors import StartupError, Unavailable
from localai_q.gallery.catalog import Archive, BackendEntry, CompiledPackage
from workers import versions
from workers.backend_process import BackendProcess
from workers.node.archives import unpack
from workers.versions import Manifest

SOURCES = Path(__file__).parents[1] / "backends"
STAGE = "installing"
LINE_EVERY = 1.0  # seconds between two lines that are passed on for no number in them
LONGEST_NOTE = 200  # characters of a line that is passed on
LAST_LINES = 6  # of uv's output, in an error
PUBLIC_INDEX = "https://pypi.org/simple"
IDLY = ("nice", "-n", "19")
NO_CHANGES: Mapping[str, str] = MappingProxyType({})
HEALTH_PATIENCE = 120.0  # seconds that a new backend has to answer

_UNREACHABLE = re.compile(
    r"dns error|error sending request|failed to fetch|tcp connect|connection (refused|reset)|timed out|network", re.I
)
_DISK_FULL = re.compile(r"no space left|os error 28\b", re.I)
_COUNT = re.compile(r"^(Resolved|Prepared|Installed) (\d+) packages?")
_COMPILER_SAID = re.compile(r": (fatal )?error: |^CMake Error|: undefined reference ")
_DOWNLOADED = re.compile(r"^\s*Downloaded (\S+)")


def python_of(folder: Path) -> Path:
    """The interpreter of an installed backend."""
    return folder / "venv" / "bin" / "python"


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What a machine installs with."""

    hardware: Mapping[str, Any] = field(default_factory=dict)  # as its node reports it
    indexes: Mapping[Build, str] = field(default_factory=dict)  # URL of a further package index, by build
    fetch: Callable[[Archive], Path] | None = None  # brings an archive
    wheel: Callable[[CompiledPackage, Build, Path, str], Path] | None = None  # `workers.node.wheels.Wheels.bring`


def wanted(entry: BackendEntry, hardware: Mapping[str, Any]) -> Manifest:
    """The version that this entry is on a machine.

    Raises:
        Unavailable: nothing of it runs there.
    """
    build = choose(entry.builds, hardware)
    if build is None:
        raise Unavailable(
            f"cannot install backend {entry.name}: it is made for {', '.join(entry.builds)}, "
            f"and this machine has {', '.join(suitable(hardware))}"
        )
    parts = [entry.version, build, platform.system(), platform.machine(), sys.version.partition(" ")[0]]
    parts.append(entry.builds[build].model_dump_json())
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in _source_files(entry):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return Manifest(
        name=entry.name, version=entry.version, digest=digest.hexdigest(), build=build, installed_at=time.time()
    )


def is_installed(entry: BackendEntry, root: Path, hardware: Mapping[str, Any]) -> bool:
    """Whether this version of the entry is the current one."""
    found = versions.current(root, entry.name)
    return found is not None and found.digest == wanted(entry, hardware).digest


def install_backend(
    entry: BackendEntry,
    root: Path,
    progress: Callable[[Progress], None],
    kit: Kit | None = None,
    *,
    force: bool = False,
) -> Path:
    """Install the entry below `root`, unless it is; an install that ends early leaves nothing that counts.

    uv runs in this process's group, so that whoever kills the group kills it too.

    Args:
        entry: what to install.
        root: the folder of all backends of this node.
        progress: told of each step; it may raise to stop.
        kit: what this machine installs with.
        force: make it anew, even if this very version is installed.

    Returns:
        The folder of the version, with `run.sh`, or with `server.py` and `venv/bin/python`.

    Raises:
        Unavailable: it cannot be installed; one line says why.
    """
    kit = kit or Kit()
    home, what = root / entry.name, f"cannot install backend {entry.name}"
    try:
        manifest = wanted(entry, kit.hardware)
        with versions.alone(home):
            if force or not is_installed(entry, root, kit.hardware):
                versions.tidy_alone(home)
                _Build(entry, manifest, kit, progress, what).make(root)
                versions.tidy_alone(home)
    except OSError as error:
        said = _full(home) if error.errno == errno.ENOSPC else f"{error.strerror or error}: {home}"
        raise Unavailable(f"{what}: {said}") from error
    return versions.pointer(root, entry.name).resolve()


class _Build:
    """One version on its way."""

    def __init__(
        self, entry: BackendEntry, manifest: Manifest, kit: Kit, progress: Callable[[Progress], None], what: str
    ) -> None:
        self._entry = entry
        self._manifest = manifest
        self._kit = kit
        self._progress = progress
        self._what = what  # the beginning of an error
        self._build = entry.builds[manifest.build]

    def make(self, root: Path) -> None:
        """Build it beside the others, and switch to it if it answers."""
        manifest = self._manifest
        name = f"{manifest.version}-{manifest.digest[:12]}-{secrets.token_hex(2)}"
        part = root / self._entry.name / f".{name}{versions.PART}"
        try:
            self._say(f"{manifest.name} {manifest.version} for {manifest.build}")
            self._bring_files(part)
            if not (part / "run.sh").is_file():
                self._install_packages(part)
            versions.describe(part, manifest)
            self._say("starting it, to see whether it answers")
            self._check_health(part)
            part.replace(part.with_name(name))
            versions.switch(root, self._entry.name, name)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _bring_files(self, part: Path) -> None:
        """The folder of the backend, with the plumbing that Python backends share."""
        archive = self._build.archive
        if archive:
            assert self._kit.fetch is not None
            unpack(self._kit.fetch(archive), part, self._what)
            if not any((part / name).is_file() for name in ("run.sh", "server.py")):
                raise Unavailable(f"{self._what}: its archive has neither run.sh nor server.py at its top")
            return
        source = SOURCES / str(self._entry.source)
        if not (source / "server.py").is_file():
            raise Unavailable(f"{self._what}: this version does not carry {source.name}/server.py")
        shutil.copytree(source, part, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        for shared in SOURCES.glob("*.py"):
            shutil.copy2(shared, part)

    def _install_packages(self, part: Path) -> None:
        wheels = self._wheels(part / "wheels")
        run_uv(["venv", "--relocatable", "--python", sys.executable, str(part / "venv")], part, self._what)
        counted = _Counted(self._progress)
        install = ["pip", "install", "--python", str(python_of(part))]
        if wheels:  # alone, for uv would keep a copy of each in its cache for good
            run_uv([*install, "--no-deps", "--no-cache", *wheels], part, self._what)
            shutil.rmtree(part / "wheels")
        if self._build.requirements:
            (part / "requirements.txt").write_text("\n".join(self._build.requirements) + "\n")
        further = self._kit.indexes.get(self._manifest.build) or self._build.index
        index = ["--index", further] if further else []
        compiled = [package.requirement for package in self._build.compiled]
        requirements = ["--requirements", str(part / "requirements.txt"), *compiled]
        try:
            run_uv([*install, *requirements, *index], part, self._what, counted.line)
        except Unavailable as error:
            raise Unavailable(error.message + self._of_index(further)) from error

    def _of_index(self, further: str | None) -> str:
        """What an error has to say of the build's own index, if it has one."""
        if not further:
            return ""
        return (
            f" (packages for {self._manifest.build} come from {further}, unless LOCALAI_Q_BACKEND_INDEXES on the node names"
            " another index; LOCALAI_Q_BACKEND_BUILDS says which builds the node may have, as cpu)"
        )

    def _wheels(self, folder: Path) -> list[str]:
        """The wheels of what this build has compiled."""
        if not self._build.compiled:
            return []
        assert self._kit.wheel is not None
        build = self._manifest.build
        return [str(self._kit.wheel(package, build, folder, self._what)) for package in self._build.compiled]

    def _check_health(self, part: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="localai_q-") as folder:
            log = Path(folder) / "log"
            backend = BackendProcess(part, socket=Path(folder) / "health.sock", log=log, threads=2)
            deadline = time.monotonic() + HEALTH_PATIENCE

            def look() -> None:
                if time.monotonic() > deadline:
                    raise StartupError(backend.said(f"it has not answered within {HEALTH_PATIENCE:.0f} s"))

            try:
                backend.wait_for_health(look)
            except StartupError as error:
                line = " ".join(error.message.split())
                raise Unavailable(f"{self._what}: it does not start on this machine: {line}") from error
            finally:
                backend.stop()

    def _say(self, note: str) -> None:
        self._progress(Progress(stage=STAGE, unit="packages", note=note))


def _source_files(entry: BackendEntry) -> list[Path]:
    """The files of ours that a backend is made of; none for one that comes as an archive."""
    if not entry.source:
        return []
    found = [*(SOURCES / entry.source).rglob("*"), *SOURCES.glob("*.py")]
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


@dataclass
class _Counted:
    """Makes uv's lines into progress: how many packages of how many, and what it said last."""

    progress: Callable[[Progress], None]
    total: int = 0
    done: int = 0
    next_line: float = 0.0  # when one that counts nothing is passed on again

    def line(self, text: str) -> None:
        if found := _COUNT.match(text):
            if found[1] == "Resolved":
                self.total = int(found[2])
            else:
                self.done = int(found[2])
        elif _DOWNLOADED.match(text):
            self.done += 1
        elif not text.strip() or time.monotonic() < self.next_line:
            return
        self.next_line = time.monotonic() + LINE_EVERY
        note = text.strip()[:LONGEST_NOTE]
        self.progress(Progress(stage=STAGE, done=self.done, total=self.total, unit="packages", note=note))


def run_uv(
    arguments: list[str], folder: Path, what: str, on_line: Callable[[str], None] | None = None, *,
    changes: Mapping[str, str] = NO_CHANGES, idly: bool = False,
) -> list[str]:  # fmt: skip
    """Run uv with the package index that this machine is set up for, uv's settings before pip's.

    Args:
        arguments: uv's command line; the index is added where uv itself is not told of one.
        folder: where it runs.
        what: the beginning of an error, as "cannot install backend echo".
        on_line: told of each line of its output.
        changes: of its environment; the empty string removes a name.
        idly: at the lowest priority.

    Returns:
        The lines of its output, stdout and stderr together.

    Raises:
        Unavailable: uv failed; one line with the last of its output.
    """
    index = _pip_index() if arguments[0] in ("pip", "build") else {}
    command = [*(IDLY if idly else ()), uv.find_uv_bin(), *arguments, "--no-progress", *_index_arguments(index)]
    lines: list[str] = []
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**child_environment(**changes), **_certificates()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                if on_line:
                    on_line(line.rstrip())
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise Unavailable(_explain(what, lines, index, folder))
    return lines


def _explain(what: str, lines: list[str], index: dict[str, str], folder: Path) -> str:
    compiler = [line for line in lines if _COMPILER_SAID.search(line)][:LAST_LINES]
    said = " | ".join(line.strip() for line in compiler or [line for line in lines if line.strip()][-LAST_LINES:])
    if _DISK_FULL.search("\n".join(lines)):
        return f"{what}: {_full(folder)}. uv said: {said}"
    if _UNREACHABLE.search(said):
        return (
            f"{what}: the package index {index_url(index)} cannot be reached: check the network or set UV_INDEX_URL."
            f" uv said: {said}"
        )
    return f"{what}. uv said: {said}"


def _full(folder: Path) -> str:
    return f"the disk is full: {shutil.disk_usage(folder).free >> 20} MiB are free at {folder}"


def index_url(pip: dict[str, str] | None = None) -> str:
    """The package index that this machine is set up for, credentials left out."""
    env = child_environment()
    found = env.get("UV_DEFAULT_INDEX") or env.get("UV_INDEX_URL")
    found = found or (_pip_index() if pip is None else pip).get("index-url") or PUBLIC_INDEX
    return re.sub(r"//[^/@]*@", "//", found)


def _index_arguments(pip: dict[str, str]) -> list[str]:
    arguments = []
    if url := pip.get("index-url"):
        arguments += ["--default-index", url]
    for url in pip.get("extra-index-url", "").split():
        arguments += ["--index", url]
    for link in pip.get("find-links", "").split():
        if "://" in link or Path(link).is_dir():
            arguments += ["--find-links", link]
    return arguments


def _pip_index() -> dict[str, str]:
    """What pip is told of indexes, by its variables or its files; nothing where uv has settings of its own."""
    env = child_environment()
    own = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_CONFIG_FILE")
    home = Path.home()
    files = (Path("/etc/uv/uv.toml"), home / ".config" / "uv" / "uv.toml")
    if any(env.get(name) for name in own) or any(file.is_file() for file in files):
        return {}
    found = _pip_files(env, home)
    for name in ("index-url", "extra-index-url", "find-links"):
        if value := env.get(f"PIP_{name.replace('-', '_').upper()}"):
            found[name] = value
    return found


def _pip_files(env: dict[str, str], home: Path) -> dict[str, str]:
    """The `[global]` and `[install]` settings of pip's files, the later file winning."""
    config = configparser.RawConfigParser(strict=False)
    places = (
        Path("/etc/xdg/pip/pip.conf"),
        Path("/etc/pip.conf"),
        home / ".pip" / "pip.conf",
        home / ".config" / "pip" / "pip.conf",
        Path(sys.prefix) / "pip.conf",
        Path(env.get("PIP_CONFIG_FILE") or "/nonexistent"),
    )
    try:
        config.read(places, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return {}
    sections = [section for section in ("global", "install") if config.has_section(section)]
    return {name: value for section in sections for name, value in config.items(section)}


def _certificates() -> dict[str, str]:
    """pip's certificate bundle, for a machine that only tells pip of it."""
    env = child_environment()
    found = env.get("SSL_CERT_FILE") or env.get("PIP_CERT") or _pip_files(env, Path.home()).get("cert")
    return {"SSL_CERT_FILE": found} if found else {}


def certificates() -> str | None:
    """The file of certificate authorities that downloads on this machine are checked with; None: the built-in ones."""
    return _certificates().get("SSL_CERT_FILE")
