"""Unpacks the archive of a backend. What is in it is somebody's word: it can only make plain files of a bounded size,
below its own folder.
"""

from __future__ import annotations

import shutil
import tarfile
import zlib
from collections.abc import Iterator
from lzma import LZMAError
from pathlib import Path

from localai_q.errors import InvalidValue, Unavailable

MOST_MEMBERS = 100_000
LARGEST = 64 << 30  # bytes of all files together


def unpack(archive: Path, folder: Path, what: str) -> None:
    """Unpack a tar archive, plain or compressed, into a folder that is made for it.

    Links that lead out of the folder, absolute names, names with "..", and devices are refused.

    Args:
        what: the beginning of an error.

    Raises:
        InvalidValue: it holds something that is refused, or more than it may.
        Unavailable: it is no tar archive, or damaged.
    """
    folder.mkdir(parents=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, members=_bounded(tar, folder, what), filter="data")
    except tarfile.FilterError as error:
        raise InvalidValue(f"{what}: its archive is refused: {error}") from error
    except (tarfile.TarError, zlib.error, LZMAError, EOFError) as error:
        raise Unavailable(f"{what}: what it names is no whole tar archive: {error}") from error


def _bounded(tar: tarfile.TarFile, folder: Path, what: str) -> Iterator[tarfile.TarInfo]:
    """The members, as long as they are not too many or too large. What they say of their size is what is written."""
    size, most = 0, min(LARGEST, shutil.disk_usage(folder).free)
    for count, member in enumerate(tar, start=1):
        size += member.size
        if count > MOST_MEMBERS or size > most:
            raise InvalidValue(f"{what}: its archive holds more than {MOST_MEMBERS} files or {most >> 20} MiB")
        if member.name.startswith("/") or ".." in Path(member.name).parts:
            raise InvalidValue(f"{what}: its archive has a member with the name {member.name!r}")
        yield member
