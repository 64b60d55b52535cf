"""A node's models by their content: `<models_root>/blobs/<sha256>`. Owns that folder: what is in it, who works on what,
and what of it is removed.

A name without a leading dot is a whole, verified file. `.<key>.…` belongs to a fetch: `key` is the SHA-256 where it is
known, else made of the source. `.<sha256>.used` says of a file that it came by a fetch, and when it was last asked for:
one without it is somebody else's, and never removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

from localai_q.cluster.disk import SPARE, Blob, spare
from localai_q.cluster.events import Progress
from localai_q.config import sync
from localai_q.errors import Unavailable
from workers.node.digests import PIECE, Digest

WATCH = 0.5  # seconds between two looks at how far somebody else is with the same file
CLOCK = 0.1  # seconds by which times of files may be behind
FORGOTTEN = 7 * 24 * 3600.0  # seconds after which a partial file that nobody has gone on with is removed

Report = Callable[[Progress], None]

QUANTIZED = "quantized.part"  # what is being made: nobody goes on with one that its maker has left

_NAME = re.compile(r"[0-9a-f]{64}")


def key_of(source: str) -> str:
    """What stands for the SHA-256 of a source as long as that is not known."""
    return hashlib.sha256(source.encode()).hexdigest()[:32]


class Store:
    """The models on this node."""

    def __init__(self, models_root: Path, least_spare: int = SPARE) -> None:
        self.folder = models_root / "blobs"
        self._spare = least_spare

    def files(self) -> list[str]:
        """The SHA-256 of every file that is there."""
        return sorted(
            path.name for path in self.folder.glob("[0-9a-f]*") if _NAME.fullmatch(path.name) and path.is_file()
        )

    def find(self, sha256: str) -> Path | None:
        """A file that is there; it counts as asked for just now."""
        path = self.folder / sha256
        if not _NAME.fullmatch(sha256) or not path.is_file():
            return None
        with self.alone(sha256):
            if not path.is_file():  # cleaned at this moment
                return None
            with suppress(FileNotFoundError):
                os.utime(self._used(sha256))
            return path

    def part(self, key: str, kind: str = "part") -> Path:
        """The name of a file that is on its way."""
        return self.folder / f".{key}.{kind}"

    def begun(self, sha256: str) -> int:
        """Bytes of a file that have come, and that a fetch goes on with."""
        with suppress(FileNotFoundError):
            return self.part(sha256).stat().st_size
        return 0

    @contextmanager
    def alone(self, key: str, report: Report | None = None) -> Iterator[Report]:
        """Be the only one, across threads and processes, to work on a file. Who waits reports what the other one does.

        The lock is let go when its process dies. Yields what the holder is to report by.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f".{key}.lock"
        while True:
            with path.open("a+") as file:
                if not _lock(file, wait=report is None):
                    if report is not None:
                        _repeat(file, report)
                    time.sleep(WATCH)
                    continue
                if not _is_at(path, file):  # its holder removed it while this waited
                    continue
                try:
                    yield _telling(file, report)
                finally:
                    self._remove_empty(key)
                    path.unlink(missing_ok=True)  # while it is held: nobody else can have made a new one
                return

    def is_full(self, size: int) -> str:
        """Say that the disk was full when a file came. `size`: its bytes; 0: not known."""
        needed = f"it needs {_mib(size)}, " if size else ""
        return f"the disk of {self.folder.parent} is full: {needed}{_mib(self.free())} are free"

    def need_room(self, size: int, folder: Path | None = None) -> None:
        """Refuse so many bytes if they would fill the disk.

        Raises:
            Unavailable: they would; the message says how much is missing.
        """
        free = shutil.disk_usage(folder).free if folder else self.free()
        kept = spare(size, self._spare)
        missing = size + kept - free
        if missing > 0:
            raise Unavailable(
                f"it needs {_mib(size)} and {_mib(kept)} to spare, {_mib(free)} are free at "
                f"{self.folder}: {_mib(missing)} are missing. To remove what no model needs: localai-q nodes clean NODE"
            )

    def keep(self, part: Path, sha256: str, beginnings: Sequence[bytes] = ()) -> Path:
        """Give a whole, verified file its name, so that it survives a failure of power.

        `beginnings`: as `workers.node.digests.Digest` has them.
        """
        place = self.folder / sha256
        if beginnings:
            self._beginnings(sha256).write_bytes(b"".join(beginnings))
        sync(part)
        self._used(sha256).touch()
        part.replace(place)
        sync(self.folder)
        return place

    def beginning(self, sha256: str, end: int) -> str | None:
        """The SHA-256 of a file up to `end`, as it was when it was verified; None where that is no end of a piece."""
        number, rest = divmod(end, PIECE)
        if rest or not number:
            return None
        with suppress(OSError), self._beginnings(sha256).open("rb") as file:
            file.seek((number - 1) * 32)
            found = file.read(32)
            return found.hex() if len(found) == 32 else None
        return None

    def brought(self, source: str) -> str | None:
        """The SHA-256 of what a source brought the last time."""
        with suppress(OSError):
            found = self.part(key_of(source), "source").read_text()
            return found if _NAME.fullmatch(found) else None
        return None

    def note(self, source: str, sha256: str) -> None:
        """Remember what a source is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.part(key_of(source), "source").write_text(sha256)

    def mend(self, sha256: str, digest: Digest) -> bool:
        """Remove a file that is not what its name says, as its digest was found now; by who is alone with it. Whether it
        was removed. Of a sound one, the beginnings are noted anew."""
        if digest.sha256 == sha256:
            self._beginnings(sha256).write_bytes(b"".join(digest.beginnings))
            return False
        self._forget(sha256)
        return True

    def discard(self, key: str) -> None:
        """Remove what a fetch that was cancelled has left, unless another goes on with it."""
        with suppress(OSError), self._at_once(key):
            self._remove_parts(key)

    def clean(
        self, ask: Callable[[], list[str]], choose: Callable[[list[Blob]], list[Blob]], *, dry_run: bool
    ) -> list[Blob]:
        """Remove files that nobody needs; what was removed, or would be. Forgotten parts go, too.

        Args:
            ask: which files, by SHA-256, nobody needs. Who needs one asks this store for it afterwards, so that what is
                asked for from now on stays.
            choose: which of these are to go.
            dry_run: remove nothing.
        """
        began = time.time()
        found = [blob for name in ask() if _NAME.fullmatch(name) and (blob := self._blob(name))]
        chosen = choose(found)
        if dry_run:
            return chosen
        self.remove_forgotten()
        return [blob for blob in chosen if self._remove(blob.sha256, began)]

    def remove_forgotten(self) -> None:
        """Remove partial files that nobody has gone on with for long."""
        limit = time.time() - FORGOTTEN
        for path in self.folder.glob(".*.part"):
            key = path.name.split(".")[1]
            with suppress(OSError), self._at_once(key):
                if path.name.endswith(QUANTIZED) or path.stat().st_mtime < limit:
                    self._remove_parts(key)

    def free(self) -> int:
        """Bytes that are free on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.folder).free

    def _blob(self, sha256: str) -> Blob | None:
        with suppress(OSError):
            size = (self.folder / sha256).stat().st_size
            return Blob(sha256=sha256, size=size, age=max(time.time() - self._asked_for(sha256), 0.0))
        return None

    def _asked_for(self, sha256: str) -> float:
        return self._used(sha256).stat().st_mtime

    def _remove(self, sha256: str, began: float) -> bool:
        """False if somebody has asked for it since then."""
        with suppress(OSError), self._at_once(sha256):
            if self._asked_for(sha256) > began - CLOCK:
                return False
            self._forget(sha256)
            return True
        return False

    def _forget(self, sha256: str) -> None:
        (self.folder / sha256).unlink()
        self._used(sha256).unlink(missing_ok=True)
        self._beginnings(sha256).unlink(missing_ok=True)

    def _remove_parts(self, key: str) -> None:
        for path in self.folder.glob(f".{key}.*part*"):
            path.unlink(missing_ok=True)
        if not (self.folder / key).exists():
            self._used(key).unlink(missing_ok=True)
            self._beginnings(key).unlink(missing_ok=True)

    def _remove_empty(self, key: str) -> None:
        """Remove a part of which nothing has come: there is nothing to go on with."""
        part = self.part(key)
        with suppress(FileNotFoundError):
            if not part.stat().st_size:
                part.unlink()
                part.with_name(f"{part.name}.note").unlink(missing_ok=True)

    @contextmanager
    def _at_once(self, key: str) -> Iterator[None]:
        """Be alone with a file, or `BlockingIOError` where somebody works on it."""
        path = self.folder / f".{key}.lock"
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(path, file):
                raise BlockingIOError(f"{path} was taken a moment ago")
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def _used(self, sha256: str) -> Path:
        return self.folder / f".{sha256}.used"

    def _beginnings(self, sha256: str) -> Path:
        return self.folder / f".{sha256}.beginnings"


def _lock(file: IO[str], *, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _telling(file: IO[str], report: Report | None) -> Report:
    """A report that those who wait for the lock can read."""

    def tell(progress: Progress) -> None:
        file.truncate(0)
        file.write(json.dumps(asdict(progress)))
        file.flush()
        if report is not None:
            report(progress)

    return tell


def _repeat(file: IO[str], report: Report) -> None:
    """Report what the holder of the lock has said last."""
    file.seek(0)
    with suppress(ValueError, TypeError):  # it is about to say something else
        report(Progress(**json.loads(file.read())))


def _is_at(path: Path, file: IO[str]) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _mib(size: int) -> str:
    return f"{-(-size >> 20)} MiB"
