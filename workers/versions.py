"""The versions of backends that lie on a node. Owns the folder of all backends: what counts in it, who uses what of it,
and what of it is removed. How a version is made is left to `workers.node.installer`.

A backend's folder `<root>/<name>` holds one folder for each version, the link `current` to the one that the next replica
starts with, and hidden names: `.lock`, `.<version>.part` on its way, `.<version>.gone` on its way out. A version is used
by whoever holds a shared lock on its folder; the lock goes with the process.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from localai_q.cluster.builds import Build
from localai_q.cluster.hardware import MOST_BACKENDS, InstalledBackend
from localai_q.errors import StartupError

log = logging.getLogger(__name__)

CURRENT = "current"
MANIFEST = "backend.json"
LOCK = ".lock"
PART, GONE = ".part", ".gone"
TRIES = 20  # to hold a version while others are switched to


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a version is."""

    name: str
    version: str
    digest: str  # of all that it was made of, hexadecimal
    build: Build
    installed_at: float = 0.0  # seconds since the epoch


def pointer(root: Path, name: str) -> Path:
    """The link to a backend's current version."""
    return root / name / CURRENT


def current(root: Path, name: str) -> Manifest | None:
    """What a backend's current version is; None if it is not installed."""
    try:
        record: dict[str, Any] = json.loads((pointer(root, name) / MANIFEST).read_text())
        return Manifest(**record)
    except (OSError, ValueError, TypeError):
        return None


def installed(root: Path) -> list[dict[str, Any]]:
    """Every backend that is installed, as a node reports it; what the API would not take for one is left out."""
    found = [current(root, home.name) for home in _homes(root)]
    return [asdict(manifest) for manifest in found if manifest and _is_sound(manifest)][:MOST_BACKENDS]


def describe(folder: Path, manifest: Manifest) -> None:
    """Leave in a version's folder what it is."""
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest)))


def switch(root: Path, name: str, folder: str) -> None:
    """Make a version the current one, at once."""
    link = root / name / f".{secrets.token_hex(4)}{GONE}"
    link.symlink_to(folder, target_is_directory=True)
    link.replace(pointer(root, name))


def remove(root: Path, name: str) -> bool:
    """Remove a backend; what runs of it keeps its files until it ends. False if it was not installed."""
    if not (root / name).is_dir():
        return False
    with alone(root / name):
        there = pointer(root, name).is_symlink()
        pointer(root, name).unlink(missing_ok=True)
        tidy_alone(root / name)
    return there


def tidy(root: Path) -> None:
    """Remove what interrupted installs have left, and every version but the current ones that nobody uses."""
    for home in _homes(root):
        try:
            with alone(home, wait=False):
                tidy_alone(home)
        except BlockingIOError:  # somebody installs, and tidies afterwards
            continue
        except OSError as error:
            log.warning("cannot tidy %s: %s", home, error)


def tidy_alone(home: Path) -> None:
    """`tidy` for one backend, by whoever is alone in its folder."""
    kept = {LOCK, CURRENT, os.readlink(home / CURRENT) if (home / CURRENT).is_symlink() else ""}
    for path in [path for path in home.iterdir() if path.name not in kept]:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        elif path.name.startswith(".") or _is_unused(path):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def alone(home: Path, *, wait: bool = True) -> Iterator[None]:
    """Be the only one, across threads and processes, to change a backend's folder; let go when this process dies.

    Raises:
        BlockingIOError: somebody else is, and this should not wait.
    """
    home.mkdir(parents=True, exist_ok=True)
    with (home / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def hold(folder: Path) -> tuple[Path, int]:
    """Use the version that a link names now: its own folder, and the descriptor that keeps it as long as it is open.

    Raises:
        StartupError: there is none.
    """
    for _ in range(TRIES):
        real = folder.resolve()
        try:
            descriptor = os.open(real, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # removed at this moment, unless there is none
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is_at(real, descriptor):
            return real, descriptor
        os.close(descriptor)
    raise StartupError(f"the backend is not installed on this node: there is no {folder}")


def _is_sound(manifest: Manifest) -> bool:
    try:
        InstalledBackend.model_validate(asdict(manifest))
    except ValidationError:
        return False
    return True


def _is_unused(version: Path) -> bool:
    """Whether nobody used the version; from now on nobody can."""
    descriptor = os.open(version, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = version.with_name(f".{version.name}{GONE}")
        version.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    with suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def _homes(root: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(home for home in root.iterdir() if home.is_dir() and not home.name.startswith("."))
    return []
