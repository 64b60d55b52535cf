"""Backends of a test's own: archives of what it wants, with the echo server behind a `run.sh`."""

import hashlib
import io
import shutil
import tarfile
from pathlib import Path

from localai_q.gallery.catalog import Archive, BackendEntry, BuildEntry
from workers.node.installer import SOURCES

REQUIREMENTS = tuple((SOURCES / "echo" / "requirements.txt").read_text().split())


def member(name: str, content: bytes = b"", mode: int = 0o644, **more: object) -> tuple[tarfile.TarInfo, bytes]:
    """A member of an archive. `more`: fields of `TarInfo`."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), mode
    for field, value in more.items():
        setattr(info, field, value)
    return info, content


def pack(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Archive:
    """Write a compressed archive with these members."""
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return Archive(source=path.as_uri(), sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def run_script(python: Path, server: Path, extra: str = "") -> tuple[tarfile.TarInfo, bytes]:
    """A `run.sh` that becomes the echo server of an installed backend."""
    script = f'#!/bin/sh\n{extra}\ncd "{server}" && exec "{python}" server.py "$@"\n'
    return member("run.sh", script.encode(), 0o755)


def entry_of(archive: Archive, name: str = "toy", version: str = "1", **build: object) -> BackendEntry:
    """A backend that comes as this archive."""
    return BackendEntry(name=name, version=version, description="d", capabilities=("chat",),
                        builds={"cpu": BuildEntry(archive=archive, **build)})  # fmt: skip


def bring(archive: Archive, folder: Path) -> Path:
    """A copy of the archive, as a fetch leaves one."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy2(archive.source.removeprefix("file://"), folder / archive.sha256))
