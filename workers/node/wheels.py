"""Wheels of packages that come as source only: where one comes from. Owns the machine's folder of what was compiled on it.

A node takes what this machine has compiled, else what a builder of the cluster has, else it compiles. The machine's folder
(`LOCALAI_Q_WHEEL_CACHE`) is shared by all of its nodes. A wheel lies in it by its content; what it is of is noted beside
it. How one is compiled is left to `workers.node.compiling`.

`python -m workers.node.wheels` has all wheels ready that this version's own backends need on this machine's processor.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packaging import tags

from localai_q.cluster.builds import Build
from localai_q.cluster.disk import Blob, surplus
from localai_q.cluster.events import Progress
from localai_q.cluster.wheels import X86, Machine, WheelKey, level_of, wheel_key
from localai_q.config import Settings, settings
from localai_q.errors import LocalAIError
from localai_q.gallery.catalog import CompiledPackage, catalog
from workers.node import hardware
from workers.node.compiling import STAGE, compile_wheel
from workers.node.downloads import Report, hash_file
from workers.node.fetcher import Wanted, fetch
from workers.node.sources import Access
from workers.node.store import Store

log = logging.getLogger(__name__)

ASK_AGAIN = 2.0  # seconds, while another node compiles
KEPT = 90 * 24 * 3600.0  # seconds for which a wheel is kept that nobody asks for
NOWHERE = Path(os.devnull)
CPUINFO = Path("/proc/cpuinfo")


class Wheels:
    """The wheels that a node can have for a backend.

    Args:
        access: what it has to fetch with; where that knows no API, only this machine is asked.
        cpus: how many compilers may run at once.
        progress: told of what is done.
        models: the folder of the node's files, for what comes from other nodes.
        backend: its name, for the API.
    """

    def __init__(
        self, access: Access, *, cpus: int, progress: Callable[[Progress], None], models: Path = NOWHERE,
        backend: str = "",
    ) -> None:  # fmt: skip
        self._access = access
        self._models = models
        self._backend = backend
        self._cpus = cpus
        self._progress = progress
        self._kept = Store(access.settings.wheel_cache)

    def bring(self, package: CompiledPackage, build: Build, folder: Path, what: str) -> Path:
        """A wheel of the package for this machine: one that it has, or that another node has made, or a new one.

        Args:
            folder: where to lay it; made if it is not there. What else is in it afterwards is of no use.
            what: the beginning of an error.

        Raises:
            Unavailable: it cannot be had; one line says why.
        """
        key = key_of(package, build)
        folder.mkdir(parents=True, exist_ok=True)
        with self._kept.alone(key.digest, self._progress) as tell:
            found = self._find(key, Report(tell))
        told = self._told(key, wait=not found)  # without the lock: a builder of this machine may need it
        failure = ""
        if not found and told.get("wheel"):
            try:
                found = self._fetched(told["wheel"])
            except LocalAIError as error:
                failure = f" (what node {told['wheel']['node']} has compiled cannot be had: {error.message})"
                log.warning("%s%s", key.filename, failure)
        try:
            found = found or self._made(package, build, key, folder / key.digest, what)
        except LocalAIError as error:
            raise type(error)(error.message + failure) from error
        if told.get("builder") and not told.get("wheel"):
            self._give(key, found)
        return shutil.copyfile(found, folder / key.filename)

    def _told(self, key: WheelKey, *, wait: bool) -> dict[str, Any]:
        """What the API says of the wheel; nothing if it does not. With `wait`, once nobody else is making it."""
        began = time.monotonic()
        while self._access.peers:
            try:
                told = self._access.peers.wheel(key.digest, self._backend)
            except LocalAIError as error:
                log.warning("the cluster cannot be asked for %s: %s", key.filename, error.message)
                return {}
            if not (wait and told["awaited"]):
                return told
            other = told["awaited"]
            note = f"node {other['node']} compiles it ({other['percentage']:g} %)"
            passed = int(time.monotonic() - began)
            self._progress(Progress(stage="waiting", done=passed, unit="seconds", note=note))
            time.sleep(ASK_AGAIN)
        return {}

    def _fetched(self, wheel: dict[str, Any]) -> Path:
        """What another node has made: the file of this content, or none."""
        wanted = Wanted(source=f"store:{wheel['sha256']}", sha256=wheel["sha256"], size=wheel["size"])
        return fetch(wanted, self._models, self._access, self._progress)

    def _made(self, package: CompiledPackage, build: Build, key: WheelKey, folder: Path, what: str) -> Path:
        with self._kept.alone(key.digest, self._progress) as tell:
            report = Report(tell)
            if found := self._find(key, report):  # another node of this machine was faster
                return found
            made = compile_wheel(package, build, folder, self._access, cpus=self._cpus, what=what, progress=tell)
            return self._keep(key, made, report)

    def _give(self, key: WheelKey, wheel: Path) -> None:
        """Let others have it; that this fails is no failure of what this node does."""
        assert self._access.peers is not None
        size, report = wheel.stat().st_size, Report(self._progress)
        try:
            self._access.peers.give_wheel(
                key, wheel.name, wheel, lambda sent: report("giving", sent, size, key.filename)
            )
        except LocalAIError as error:
            log.warning("%s cannot be given to other nodes: %s", key.filename, error.message)

    def _find(self, key: WheelKey, report: Report) -> Path | None:
        """The wheel, if this machine has compiled it and it is as it was."""
        sha256 = self._kept.brought(key.digest)
        path = self._kept.find(sha256) if sha256 else None
        if path is None:
            return None
        with path.open("rb") as file:
            if hash_file(file, path.stat().st_size, report).sha256 == sha256:
                return path
        log.warning("%s has changed since it was compiled: it is compiled again", path)
        path.unlink()
        return None

    def _keep(self, key: WheelKey, wheel: Path, report: Report) -> Path:
        part = self._kept.part(key.digest)
        shutil.copyfile(wheel, part)
        with part.open("rb") as file:
            found = hash_file(file, part.stat().st_size, report)
        path = self._kept.keep(part, found.sha256)
        self._kept.note(key.digest, found.sha256)
        self._kept.clean(self._kept.files, _old, dry_run=False)
        return path


def key_of(package: CompiledPackage, build: Build) -> WheelKey:
    """What tells the wheel that this machine needs from others; `Unavailable` if it could not run it."""
    return wheel_key(package.name, package.version, package.settings, package.level, build, machine())


def machine() -> Machine:
    """What this machine compiles for."""
    tag = next(tags.sys_tags())
    where = re.sub(r"[^a-z0-9]", "_", sysconfig.get_platform().lower())
    libc, version = platform.libc_ver()
    arch = platform.machine().lower()
    return Machine(
        python=f"{tag.interpreter}-{tag.abi}-{where}",
        libc=f"{libc}-{version}" if libc else "",
        arch=arch,
        level=level_of(_flags()) if arch in X86 and CPUINFO.exists() else None,
    )


def _flags() -> set[str]:
    """The features of this machine's processors, in Linux' names."""
    found = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
    return set(found[1].split()) if found else set()


def _old(found: list[Blob]) -> list[Blob]:
    return surplus(found, grace=KEPT, free=0, floor=0)


def prepare(cfg: Settings) -> None:
    """Have all wheels ready that this version's own backends need without a GPU, and log how far that is."""
    cpus = hardware.read(cfg.wheel_cache, lambda total: total).get("cpus", 1)
    said, folder = _Said(), cfg.wheel_cache / ".making"
    wheels = Wheels(Access(cfg, "", "", ""), cpus=cpus, progress=said)
    builds = [(entry.name, entry.builds["cpu"]) for entry in catalog().backends if "cpu" in entry.builds]
    with Store(cfg.wheel_cache).alone("making", said):  # another one may work in that folder
        for name, package in [(name, package) for name, build in builds for package in build.compiled]:
            try:
                shutil.rmtree(folder, ignore_errors=True)
                wheels.bring(package, "cpu", folder, f"backend {name}")
            finally:
                shutil.rmtree(folder, ignore_errors=True)


class _Said:
    """Logs the beginning of a stage, and each tenth of the one that takes long."""

    def __init__(self) -> None:
        self._stage = ""
        self._tenth = 0

    def __call__(self, event: Progress) -> None:
        if event.stage != self._stage and event.stage != "verifying":
            self._stage, self._tenth = event.stage, 0
            log.info("%s %s", event.stage, event.note)
        tenth = int(10 * event.done / event.total) if event.total else 0
        if event.stage == STAGE and tenth > self._tenth:
            self._tenth = tenth
            log.info("%d %%", 10 * tenth)


def main() -> None:
    """Have all wheels ready."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        prepare(settings())
    except LocalAIError as error:
        raise SystemExit(error.message) from error


if __name__ == "__main__":
    main()
