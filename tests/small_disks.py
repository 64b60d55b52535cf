"""Disks so small that a test can fill them: a tmpfs each, where this machine lets the test mount one."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A disk of so many MiB at this folder; skips the test where nothing can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        pytest.skip(f"a small disk cannot be mounted here, which takes root's rights: {said.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True, timeout=30)


def enlarge(folder: Path, mib: int) -> None:
    """Have the disk be larger, with what lies on it."""
    subprocess.run(["mount", "-o", f"remount,size={mib}m", str(folder)], check=True, timeout=30)


def fill(folder: Path, leaving: int = 0) -> Path:
    """Fill the disk of a folder with a file, but for so many bytes; the file."""
    ballast = folder / "ballast"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - leaving, 1))
    return ballast
