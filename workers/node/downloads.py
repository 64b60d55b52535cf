"""Brings the bytes of an origin into a file: in pieces if it must be, going on where they end, and checked.

Owns ranges, mirrors, retries, the limits of what a server may send, and the SHA-256 of what came. Where that is kept is
the caller's.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx

from localai_q.cluster.events import Progress
from localai_q.errors import Forbidden, LocalAIError, NotFound, Unavailable, WrongContent
from localai_q.network import Network
from workers.node.digests import Digest
from workers.node.sources import origin as origins
from workers.node.sources.origin import Origin, is_passing, pause_of, refusal, said, size_said
from workers.node.store import key_of

CHUNK = 1 << 20
REPORT_EVERY = 0.25  # seconds
SYNC_EVERY = 256 << 20  # bytes that a failure of power may cost
LEAST = 64 << 10  # bytes that must come within `STALL`, and between two failures, to count as progress
STALL = 60.0  # seconds
PACKINGS = ("gzip", "x-gzip", "deflate", "compress", "br", "zstd")

Room = Callable[[int], None]  # refuses so many bytes if the disk has no room for them


class _Cut(httpx.TransportError):
    """The body ended early, or came too slowly."""


@dataclass
class Report:
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
            if stage == self._stage and now < self._next and (done < total or not total):
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


def download(origin: Origin, part: Path, net: Network, report: Report, room: Room, *, most: int) -> Digest:
    """Bring the origin into `part`, going on where that ends; the digest of what came.

    Args:
        origin: what to fetch; with its `sha256` and `size`, where they are known.
        part: may hold the beginning already. It is removed when what came is not what was wanted.
        net: what the URLs may lead to.
        report: told of "downloading" and "verifying".
        room: asked before the first byte.
        most: bytes that a file may have whose size is not known.

    Raises:
        LocalAIError: the file cannot be had from any of the URLs; what has come may stay, to go on with.
    """
    failures: list[LocalAIError] = []
    urls = list(origin.urls)
    while urls:
        url = urls.pop(0)
        resumed = part.exists() and part.stat().st_size > 0
        try:
            return _from(url, origin, part, net, report, room, most)
        except WrongContent as error:
            failures.append(error)
            if resumed:  # what lay here may have been the wrong part of it
                urls.insert(0, url)
        except (NotFound, Forbidden, Unavailable) as error:
            failures.append(error)
    worst = next((error for error in failures if isinstance(error, WrongContent)), failures[0])
    raise worst


def hash_file(file: IO[bytes], total: int, report: Report) -> Digest:
    """The digest of an open file."""
    digest = Digest()
    while block := file.read(CHUNK):
        digest.update(block)
        report("verifying", digest.size, total)
    return digest


def check(found: str, wanted: str | None) -> None:
    """Refuse another content than the wanted one."""
    if wanted and found != wanted:
        raise WrongContent(f"it has another content than expected: its SHA-256 is {found}, expected {wanted}")


def _from(url: str, origin: Origin, part: Path, net: Network, report: Report, room: Room, most: int) -> Digest:
    note = part.with_name(f"{part.name}.note")
    with part.open("a+b") as file:
        growing = Growing(file, note, url, report, trusting=origin.sha256 is not None)
        transfer = _Transfer(origin, growing, report, room, most)
        try:
            transfer.run(url, net)
            check(growing.digest.sha256, origin.sha256)
        except WrongContent:
            part.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
            raise
    note.unlink(missing_ok=True)
    return growing.digest


class Growing:
    """A partial file, the hash of what it holds so far, and which version of which URL that is of."""

    def __init__(self, file: IO[bytes], note: Path, url: str, report: Report, *, trusting: bool) -> None:
        self.file = file
        self.validator = ""  # the ETag or the date of what has come; empty: not known
        self._note = note
        self._place = key_of(url.partition("?")[0])  # what follows may be a signature, which is another each time
        self._synced = 0
        told = self._read_note()
        total = file.seek(0, os.SEEK_END)
        if told.get("of") == self._place:
            self.validator = str(told.get("validator") or "")
        if total and not self.validator and not trusting:  # it cannot be told whether the rest would fit to it
            file.truncate(0)
        file.seek(0)
        self.digest = hash_file(file, total, report)

    @property
    def done(self) -> int:
        return self.digest.size

    def begin(self, validator: str) -> None:
        """Note what the bytes that come are a version of."""
        if validator != self.validator or not self._note.exists():
            self.validator = validator
            self._note.write_text(json.dumps({"of": self._place, "validator": validator}))

    def start_again(self) -> None:
        self.file.truncate(0)
        self.digest = Digest()
        self._synced = 0
        self.validator = ""

    def add(self, block: bytes | memoryview, digest: Digest | None = None) -> None:
        """Write what comes next. `digest`: with it, where that is known."""
        for at in range(0, len(block), CHUNK):  # some kernels are slow at more at once
            self.file.write(block[at : at + CHUNK])
        if digest is None:
            self.digest.update(block)
        else:
            self.digest = digest
        if self.done - self._synced >= SYNC_EVERY:
            self.file.flush()
            os.fsync(self.file.fileno())
            self._synced = self.done

    def _read_note(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            found: Any = json.loads(self._note.read_text())
            return found if isinstance(found, dict) else {}
        return {}


@dataclass
class _Transfer:
    """One URL's bytes on their way into one file."""

    origin: Origin
    growing: Growing
    report: Report
    room: Room
    most: int

    def run(self, url: str, net: Network) -> None:
        """Go on until all has come; as long as more comes than ever before, failures in between do not count."""
        failed, furthest = 0, self.growing.done
        while not (self.origin.size and self.growing.done == self.origin.size):
            try:
                pause = self._connect(url, net, failed)
                if pause is None:
                    return
            except httpx.HTTPError as error:
                failed = 1 if self.growing.done - furthest >= LEAST else failed + 1
                furthest = max(furthest, self.growing.done)
                if failed >= origins.TRIES:
                    raise Unavailable(said(error)) from error
                pause = origins.PAUSE * 2 ** (failed - 1)
            else:
                failed += 1
            time.sleep(pause)

    def _connect(self, url: str, net: Network, failed: int) -> float | None:
        """Receive what one connection brings. Seconds after which to try again; None: all has come."""
        with net.open(url, {**self.origin.headers, **self._range()}, self.origin.trust) as response:
            status = response.status_code
            if is_passing(status) and failed < origins.TRIES - 1:
                return pause_of(response, failed)
            if status == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE and self.growing.done:
                self.growing.start_again()
                raise _Cut("the file is shorter than what had come of it")
            if status not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
                raise refusal(response)
            packing = response.headers.get("content-encoding", "").lower()
            if packing in PACKINGS and not self.origin.sha256:  # else that decides
                raise Unavailable(f"{response.request.url.host} sends it packed ({packing}), though asked not to")
            self._receive(response)
            return None

    def _range(self) -> dict[str, str]:
        if not self.growing.done:
            return {}
        # A weak ETag cannot stand in If-Range; it is compared when the answer is there.
        weak = not self.growing.validator or self.growing.validator.startswith("W/")
        condition = {} if weak else {"If-Range": self.growing.validator}
        return {"Range": f"bytes={self.growing.done}-", **condition}

    def _receive(self, response: httpx.Response) -> None:
        growing = self.growing
        total = self._place(response)
        growing.begin(_validator(response))
        self.room(max(total - growing.done, 0))
        limit = total or self.most
        marked, until = growing.done, time.monotonic() + STALL
        for block in response.iter_raw():
            if growing.done + len(block) > limit:
                raise WrongContent(f"{response.request.url.host} sends more than the {limit} bytes that it may")
            growing.add(block)
            self.report("downloading", growing.done, total)
            if growing.done - marked >= LEAST:
                marked, until = growing.done, time.monotonic() + STALL
                if not total:
                    self.room(0)
            elif time.monotonic() > until:
                raise _Cut(f"only {growing.done - marked} bytes came in {STALL:.0f} s")
        growing.file.flush()
        if total and growing.done != total:
            raise _Cut(f"{growing.done} of {total} bytes came")

    def _place(self, response: httpx.Response) -> int:
        """Have the file ready for the bytes that follow; how many it will have at the end, 0 where nobody says it."""
        growing, wanted = self.growing, self.origin.size
        announced = size_said(response.headers.get("content-length", ""))
        if response.status_code == httpx.codes.OK:
            growing.start_again()
            total = announced
        else:
            start, total = content_range(response.headers.get("content-range", ""))
            changed = growing.validator and _validator(response) and _validator(response) != growing.validator
            if changed or start != growing.done:
                growing.start_again()
                raise _Cut("the file was changed while it was fetched" if changed else "another part came")
        if wanted and total and total != wanted:
            raise WrongContent(f"{response.request.url.host} has a file of {total} bytes, expected {wanted}")
        if max(wanted, total) > self.most:
            raise WrongContent(f"{max(wanted, total)} bytes are more than LOCALAI_Q_MAX_UPLOAD allows ({self.most})")
        return wanted or total


def _validator(response: httpx.Response) -> str:
    return str(response.headers.get("etag") or response.headers.get("last-modified") or "")


def content_range(told: str) -> tuple[int, int]:
    """Where a part begins, and how long the whole is, by the header `Content-Range`; -1 and 0: not said."""
    found = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", told)
    if found is None:
        return -1, 0
    return int(found[1]), int(found[2]) if found[2] != "*" else 0
