"""Unpacks the archive of a backend. What is in it is somebody's word: it can only make plain files of a bounded size,
below its own folder.
"""

from __future__ import annotations

import shutil
import struct
import tarfile
import zlib
from collections.abc import Iterator
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import NoReturn

from localai_q.errors import InvalidValue, Unavailable

MOST_MEMBERS = 100_000
LARGEST = 64 << 30  # bytes of all files together
LONGEST_HEADER = 1 << 20  # bytes of names and properties that stand before a member, which are read into memory
HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
           tarfile.GNUTYPE_LONGLINK)  # fmt: skip
# What `tarfile` and `zipfile` come to with headers that lie.
CONFUSED = (ValueError, LookupError, OverflowError, RecursionError, struct.error)


class _Refused(Exception):
    """What an archive holds is refused; why."""


class _Member(tarfile.TarInfo):
    """A member, looked at before what it claims is read."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        found = super().frombuf(buf, encoding, errors)
        if found.size < 0 or (found.type in HEADERS and found.size > LONGEST_HEADER):
            raise _Refused(f"it claims a header of {found.size} bytes")
        if found.type == tarfile.GNUTYPE_SPARSE:
            raise _Refused(f"its member {found.name!r} is a sparse file")
        return found


class _Archive(tarfile.TarFile):
    """An archive in which a link that cannot be made is refused: `tarfile` would put a member in its place that nobody
    has looked at."""

    def _find_link_target(self, tarinfo: tarfile.TarInfo) -> NoReturn:
        raise _Refused(f"its link {tarinfo.name!r} to {tarinfo.linkname!r} cannot be made")


def unpack(archive: Path, folder: Path, what: str) -> None:
    """Unpack a tar archive, plain or compressed, into a folder that is made for it.

    Links that lead out of the folder, absolute names, names with "..", devices and sparse files are refused.

    Args:
        what: the beginning of an error.

    Raises:
        InvalidValue: it holds something that is refused, or more than it may.
        Unavailable: it is no tar archive, or damaged.
        OSError: the disk is full, or cannot be written.
    """
    folder.mkdir(parents=True)
    try:
        with _Archive.open(archive, tarinfo=_Member) as tar:
            tar.extractall(folder, members=_checked(tar, folder), filter="data")
    except (_Refused, tarfile.FilterError) as error:
        raise InvalidValue(f"{what}: its archive is refused: {error}") from error
    except (tarfile.TarError, zlib.error, LZMAError, EOFError, *CONFUSED) as error:
        raise Unavailable(f"{what}: what it names is no whole tar archive: {error}") from error


def _checked(tar: tarfile.TarFile, folder: Path) -> Iterator[tarfile.TarInfo]:
    """The members, as long as there is nothing wrong with them. What they say of their size is what is written.

    Where a link leads is told by its text alone, for nothing here lies behind another link.
    """
    size, most = 0, min(LARGEST, shutil.disk_usage(folder).free)
    links: set[PurePosixPath] = set()
    for count, member in enumerate(tar, start=1):
        size += member.size
        if count > MOST_MEMBERS or size > most:
            raise _Refused(f"it holds more than {MOST_MEMBERS} files or {most >> 20} MiB")
        if member.size < 0 or member.issparse():
            raise _Refused(f"its member {member.name!r} is a sparse file")
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise _Refused(f"it has a member with the name {member.name!r}")
        target = PurePosixPath(member.linkname) if member.islnk() else path
        if links & {path, *path.parents, target, *target.parents}:
            raise _Refused(f"its member {member.name!r} lies behind a link")
        if member.issym() or member.islnk():
            _check_link(member, path)
        if member.issym():
            links.add(path)
        yield member


def _check_link(member: tarfile.TarInfo, path: PurePosixPath) -> None:
    """Refuse a link that leads out. A symbolic one may go up, as far as it lies down, and then down only."""
    target = PurePosixPath(member.linkname)
    up = next((number for number, part in enumerate(target.parts) if part != ".."), len(target.parts))
    most = len(path.parts) - 1 if member.issym() else 0
    if target.is_absolute() or up > most or ".." in target.parts[up:]:
        raise _Refused(f"its link {member.name!r} leads to {member.linkname!r}")
