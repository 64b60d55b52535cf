"""Makes a catalogue entry into a backend that can be started: its files and a virtual environment of its own.

Owns the folder `<root>/<name>/<version>`, and how uv is run on this machine (`run_uv`). A folder of that name is
complete: it is built beside its place and renamed into it last. What to install is the caller's decision.
"""

from __future__ import annotations

import configparser
import fcntl
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uv

from localai_q.cluster.events import Progress
from localai_q.errors import Unavailable
from localai_q.gallery.catalog import BackendEntry

SOURCES = Path(__file__).parents[1] / "backends"
STAGE = "installing"
LINE_EVERY = 1.0  # seconds between two lines that are passed on for no number in them
LONGEST_NOTE = 200  # characters of a line that is passed on
LAST_LINES = 4  # of uv's output, in an error
PUBLIC_INDEX = "https://pypi.org/simple"

_UNREACHABLE = re.compile(
    r"dns error|error sending request|failed to fetch|tcp connect|connection (refused|reset)|timed out|network", re.I
)
_DISK_FULL = re.compile(r"no space left|os error 28\b", re.I)
_COUNT = re.compile(r"^(Resolved|Prepared|Installed) (\d+) packages?")
_DOWNLOADED = re.compile(r"^\s*Downloaded (\S+)")


def python_of(folder: Path) -> Path:
    """The interpreter of an installed backend."""
    return folder / "venv" / "bin" / "python"


def installed_path(entry: BackendEntry, root: Path) -> Path:
    """Where the entry is or would be installed."""
    return root / entry.name / entry.version


def install_backend(entry: BackendEntry, root: Path, progress: Callable[[Progress], None]) -> Path:
    """Install the entry below `root`, unless it is; an install that ends early leaves nothing that counts.

    uv runs in this process's group, so that whoever kills the group kills it too.

    Args:
        entry: what to install.
        root: the folder of all backends of this node.
        progress: told of each step; it may raise to stop.

    Returns:
        The folder with `server.py` and `venv/bin/python`.

    Raises:
        Unavailable: it cannot be installed; one line says why.
    """
    place = installed_path(entry, root)
    if place.is_dir():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _alone(place.parent / ".lock"):
            if not place.is_dir():
                _clear_remains(place)
                _build(entry, place, progress)
    except OSError as error:
        raise Unavailable(f"cannot install backend {entry.name}: {error.strerror or error}: {place.parent}") from error
    return place


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold the lock file, across threads and processes; it is let go when this process dies."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _clear_remains(place: Path) -> None:
    for part in place.parent.glob(f".{place.name}.*.part"):
        shutil.rmtree(part, ignore_errors=True)


def _build(entry: BackendEntry, place: Path, progress: Callable[[Progress], None]) -> None:
    part = place.parent / f".{place.name}.{secrets.token_hex(4)}.part"
    what = f"cannot install backend {entry.name}"
    try:
        progress(Progress(stage=STAGE, unit="packages", note=f"{entry.name} {entry.version}"))
        _copy_files(entry, part)
        run_uv(["venv", "--relocatable", "--python", sys.executable, str(part / "venv")], part, what)
        requirements = ["--requirements", str(part / "requirements.txt")]
        counted = _Counted(progress)
        run_uv(["pip", "install", "--python", str(python_of(part)), *requirements], part, what, counted.line)
        _check_imports(entry, part)
        part.replace(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _copy_files(entry: BackendEntry, part: Path) -> None:
    """The folder of the backend, and the plumbing that Python backends share."""
    source = SOURCES / entry.source
    if not (source / "server.py").is_file():
        raise Unavailable(f"cannot install backend {entry.name}: this version does not carry {source.name}/server.py")
    shutil.copytree(source, part, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy2(SOURCES / "serving.py", part)


def _check_imports(entry: BackendEntry, part: Path) -> None:
    check = subprocess.run(
        [python_of(part), "-c", "import server"], cwd=part, capture_output=True, text=True, check=False
    )
    if check.returncode != 0:
        lines = check.stderr.strip().splitlines() or [f"its import ended with status {check.returncode}"]
        raise Unavailable(f"cannot install backend {entry.name}: it does not start on this machine: {lines[-1]}")


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


def run_uv(arguments: list[str], folder: Path, what: str, on_line: Callable[[str], None] | None = None) -> list[str]:
    """Run uv with the package index that this machine is set up for, uv's settings before pip's.

    Args:
        arguments: uv's command line; the index is added where uv itself is not told of one.
        folder: where it runs.
        what: the beginning of an error, as "cannot install backend echo".
        on_line: told of each line of its output.

    Returns:
        The lines of its output, stdout and stderr together.

    Raises:
        Unavailable: uv failed; one line with the last of its output.
    """
    index = _pip_index() if arguments[0] == "pip" else {}
    command = [uv.find_uv_bin(), *arguments, "--no-progress", *_index_arguments(index)]
    lines: list[str] = []
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**_environment(), **_certificates()},
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
        raise Unavailable(_explain(what, lines, index))
    return lines


def _explain(what: str, lines: list[str], index: dict[str, str]) -> str:
    said = " | ".join(line.strip() for line in [line for line in lines if line.strip()][-LAST_LINES:])
    if _DISK_FULL.search(said):
        return f"{what}: the disk is full. uv said: {said}"
    if _UNREACHABLE.search(said):
        return (
            f"{what}: the package index {index_url(index)} cannot be reached: check the network or set UV_INDEX_URL."
            f" uv said: {said}"
        )
    return f"{what}. uv said: {said}"


def _environment() -> dict[str, str]:
    return dict(os.environ)  # noqa: TID251  (uv's and pip's variables, which are not settings of ours)


def index_url(pip: dict[str, str] | None = None) -> str:
    """The package index that this machine is set up for, credentials left out."""
    env = _environment()
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
    env = _environment()
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
    env = _environment()
    found = env.get("SSL_CERT_FILE") or env.get("PIP_CERT") or _pip_files(env, Path.home()).get("cert")
    return {"SSL_CERT_FILE": found} if found else {}


def certificates() -> str | None:
    """The file of certificate authorities that downloads on this machine are checked with; None: the built-in ones."""
    return _certificates().get("SSL_CERT_FILE")
