"""The files that were uploaded for models: `files/<sha256>` of the home folder, which all web processes share.

What is on its way is `.<sha256>.<bytes of the whole>.part`, and can be gone on with through any web process. Whoever
writes where the part ends is the one who uploads: another one who was cut off finds that it has moved, and stops.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from localai_q.config import sync
from localai_q.errors import (
    BodyTooLarge,
    Conflict,
    InvalidValue,
    LocalAIError,
    NoRoom,
    NotFound,
    TooManyUploads,
    Unavailable,
    WrongOffset,
)
from localai_q.services.wiring import Services

log = logging.getLogger(__name__)

BLOCK = 1 << 20
HEADROOM = 1 << 30  # bytes that uploads leave free on the disk

_NAME = re.compile(r"[0-9a-f]{64}")
_CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,18})-([0-9]{1,18})|\*)/([0-9]{1,18})")


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of a file that comes."""

    size: int | None  # bytes; None: up to the end of what comes
    start: int | None = 0  # where it belongs; None: nothing comes, and what is there may be all
    total: int | None = None  # bytes of the whole; None: this is the whole

    @classmethod
    def of(cls, content_range: str | None, length: int | None) -> Chunk:
        """As the headers `Content-Range` and `Content-Length` say it.

        Raises:
            InvalidValue: they contradict each other, or cannot be read.
        """
        if content_range is None:
            return cls(size=length, total=length)
        found = _CONTENT_RANGE.fullmatch(content_range)
        if not found:
            raise InvalidValue("'Content-Range' needs the form 'bytes FIRST-LAST/TOTAL'.", param="Content-Range")
        total, first, last = int(found[3]), int(found[1] or 0), int(found[2] or -1)
        if found[1] is None and not length:
            return cls(size=0, start=None, total=total)
        if not first <= last < total or length != last - first + 1:
            raise InvalidValue(
                f"'Content-Range' says {content_range!r}, and 'Content-Length' {length}: they must agree.",
                param="Content-Range",
            )
        return cls(size=length, start=first, total=total)


@dataclass(frozen=True, kw_only=True)
class Received:
    """How far an upload is."""

    size: int  # bytes that are there
    whole: bool


def path_of(services: Services, sha256: str) -> Path:
    """Where an uploaded file lies.

    Raises:
        InvalidValue: that is not a SHA-256.
    """
    if not _NAME.fullmatch(sha256):
        raise InvalidValue("A file is named by its SHA-256: 64 characters of 0-9 and a-f.", param="sha256")
    return services.settings.home / "files" / sha256


def state(services: Services, sha256: str) -> Received:
    """How much of a file is there.

    Raises:
        NotFound: nothing.
    """
    path = path_of(services, sha256)
    with suppress(OSError):
        return Received(size=path.stat().st_size, whole=True)
    for part in _parts(path):
        with suppress(OSError):
            return Received(size=part.stat().st_size, whole=False)
    raise NotFound(f"There is no file '{sha256}'.")


def receive(services: Services, sha256: str, stream: IO[bytes], chunk: Chunk) -> Received:
    """Add what comes to a file, and keep that once it is whole. What is cut off stays, to be gone on with.

    Raises:
        WrongOffset: the chunk does not begin where the part ends.
        Conflict: the part was begun as one of a file of another size, or somebody else goes on with it.
        InvalidValue: the whole has another content than its name says; nothing of it stays.
        BodyTooLarge: it exceeds LOCALAI_Q_MAX_UPLOAD.
        TooManyUploads: LOCALAI_Q_MAX_UPLOADS files are on their way.
        NoRoom: the disk has no room for it.
        Unavailable: somebody else writes or checks it at this moment.
    """
    target = path_of(services, sha256)
    most = services.settings.max_upload
    if chunk.total is not None and chunk.total > most:
        raise BodyTooLarge(f"The file has {chunk.total} bytes; LOCALAI_Q_MAX_UPLOAD allows {most}.")
    if chunk.start is None:
        with suppress(FileNotFoundError):
            os.utime(target)  # who asks is about to name it
            return Received(size=target.stat().st_size, whole=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _part(services, target, chunk)
    try:
        with part.open("a+b") as file:
            start = _begin(file, part, chunk)
            written = _write(file, part, stream, start, most)
            if chunk.total is not None and written < chunk.total:
                return Received(size=written, whole=False)
            with _alone(file, part, written):
                _check(file, part, sha256)
                os.fsync(file.fileno())
                part.replace(target)
                sync(target.parent)
    except (Conflict, Unavailable):  # it is somebody else's
        raise
    except BaseException as error:
        if chunk.total is None:  # nobody could go on with it
            with suppress(LocalAIError):
                _remove(part)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise NoRoom(f"The disk of {target.parent} became full.") from error
        raise
    return Received(size=written, whole=True)


def give_up(services: Services, sha256: str) -> None:
    """Remove what has come of a file that is not whole.

    Raises:
        NotFound: there is none on its way.
        Unavailable: somebody writes or checks it at this moment.
    """
    parts = _parts(path_of(services, sha256))
    for part in parts:
        _remove(part)
    if not parts:
        raise NotFound(f"No upload of '{sha256}' is on its way.")


def forget(services: Services, sha256: str) -> None:
    """Remove a file that no model needs any more."""
    path_of(services, sha256).unlink(missing_ok=True)


def read(services: Services, sha256: str, start: int) -> tuple[int, Iterator[bytes]]:
    """The size of an uploaded file, and its bytes from `start` on.

    Raises:
        NotFound: there is no such file.
    """
    path = path_of(services, sha256)
    if not path.exists():
        raise NotFound(f"There is no file '{sha256}'.")
    return path.stat().st_size, _read(path, start)


def sweep(services: Services) -> None:
    """Remove what nobody has gone on with for LOCALAI_Q_UPLOAD_TTL seconds."""
    limit = time.time() - services.settings.upload_ttl
    for path in (services.settings.home / "files").glob(".*"):
        with suppress(OSError):
            if path.stat().st_mtime < limit:
                with suppress(LocalAIError):
                    _remove(path)
                log.info("%s was not gone on with, and is removed", path.name)


def kept_since(services: Services, seconds: float) -> set[str]:
    """The whole files, by SHA-256, that came more than so many seconds ago."""
    limit, found = time.time() - seconds, set()
    for path in (services.settings.home / "files").glob("*"):
        with suppress(OSError):
            if _NAME.fullmatch(path.name) and path.stat().st_mtime < limit:
                found.add(path.name)
    return found


def _part(services: Services, target: Path, chunk: Chunk) -> Path:
    """The part of this file, if one more may be begun and the disk has room for all that are on their way."""
    part = target.with_name(f".{target.name}.{chunk.total or 0}.part")
    if any(other != part for other in _parts(target)):
        raise Conflict(f"An upload of '{target.name}' is on its way that says another size: DELETE it to begin anew.")
    if not part.exists():
        if chunk.start:
            raise WrongOffset(f"Nothing of it is there: begin at 0, not at {chunk.start}.")
        sweep(services)
        if len(list(target.parent.glob(".*.part"))) >= services.settings.max_uploads:
            raise TooManyUploads
    others = [other for other in target.parent.glob(".*.part") if other != part]
    missing = sum(map(_missing, others)) + (_missing(part) if part.exists() else chunk.total or 0)
    if shutil.disk_usage(target.parent).free < missing + HEADROOM:
        raise NoRoom(f"The disk of {target.parent} has no room for this file.")
    return part


def _remove(part: Path) -> None:
    """Remove a part, unless somebody writes or checks it."""
    with suppress(FileNotFoundError), part.open("rb") as file, _alone(file, part):
        part.unlink()


def _parts(target: Path) -> list[Path]:
    return list(target.parent.glob(f".{target.name}.*.part"))


def _missing(part: Path) -> int:
    with suppress(OSError, ValueError):
        return max(int(part.name.split(".")[2]) - part.stat().st_size, 0)
    return 0


def _begin(file: IO[bytes], part: Path, chunk: Chunk) -> int:
    """From where on the part is written: where it ends, or for a whole file its beginning."""
    there = os.fstat(file.fileno()).st_size
    if chunk.start is None or (chunk.start == there and chunk.size != chunk.total):
        return there
    if chunk.size != chunk.total:
        raise WrongOffset(f"{there} bytes are there: go on from there, not from {chunk.start}.")
    with _alone(file, part, there):
        file.truncate(0)
    return 0


def _write(file: IO[bytes], part: Path, stream: IO[bytes], at: int, most: int) -> int:
    """Write what comes behind `at`; where the part ends then."""
    while block := stream.read(BLOCK):
        if at + len(block) > most:
            raise BodyTooLarge(f"The file is larger than LOCALAI_Q_MAX_UPLOAD allows ({most} bytes).")
        with _alone(file, part, at):
            file.write(block)
            file.flush()
        at += len(block)
    return at


def _check(file: IO[bytes], part: Path, sha256: str) -> None:
    """Refuse and remove another content than the name says. All is read again: several may have written it."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(BLOCK):
        digest.update(block)
        time.sleep(0)  # others are served meanwhile
    if digest.hexdigest() != sha256:
        part.unlink(missing_ok=True)
        raise InvalidValue(f"The file's SHA-256 is {digest.hexdigest()}, not {sha256}.", param="sha256")


@contextmanager
def _alone(file: IO[bytes], part: Path, at: int | None = None) -> Iterator[None]:
    """Be the only one, across processes, to change or remove a part, which must end here if that is said."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Unavailable("Somebody else writes or checks this upload at the moment.") from error
    try:
        _need_same(file, part)
        if at is not None and os.fstat(file.fileno()).st_size != at:
            raise Conflict("Somebody else goes on with this upload.")
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _need_same(file: IO[bytes], part: Path) -> None:
    """Refuse to go on with a part that was given up, or has become the whole file, since it was opened."""
    with suppress(OSError):
        if os.path.samestat(os.fstat(file.fileno()), part.stat()):
            return
    raise Conflict("This upload was given up, or somebody else has brought it to its end.")


def _read(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(BLOCK):
            yield block
