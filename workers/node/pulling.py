"""Pulls a file from nodes that have it: in pieces, from several at once, each compared before it is written.

Pieces are written in their order, so that a partial file is always a beginning, which any source can go on with. A holder
tells with each piece the SHA-256 of the file up to its end, from when it verified its own; so the first wrong piece is
known, and who gave it is left out. Owns who is asked for what. What is left when nobody can give it is the caller's.
"""

from __future__ import annotations

import http.client
import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from localai_q.errors import LocalAIError, Unavailable, WrongContent
from localai_q.names import BEGINNING_HEADER
from workers.node.api import NodeApi
from workers.node.digests import PIECE, Digest
from workers.node.downloads import STALL, Growing, Report, Room, check, content_range

log = logging.getLogger(__name__)

CONNECTIONS = 2  # to one holder
MOST_CONNECTIONS = 6
AHEAD = 8  # pieces that may be in memory
SLICE = 1 << 20  # bytes between two looks at how far a piece is; so many must come within `STALL`
CONNECT, SILENCE = 3.0, 15.0  # seconds
TRIES = 3  # failures in a row after which a holder is left out
PAUSE = 0.5  # seconds after a failure
ASK_AGAIN = 60.0  # seconds after which there may be other holders, and tickets get old
SLOW = 3.0  # times as long as the fastest piece, and
SLOW_AT_LEAST = 1.0  # seconds, after which a piece is asked of another holder, too
LOOK = 0.1  # seconds


@dataclass(eq=False)
class _Holder:
    """A node that has the file."""

    id: str
    name: str
    url: str
    ticket: str
    out: bool = False  # it is asked for nothing any more
    failures: int = 0
    connections: int = 0


@dataclass(eq=False)
class _Piece:
    """A piece that is asked for, or there."""

    asked: dict[_Holder, float] = field(default_factory=dict)  # since when
    come: int = 0  # bytes
    content: memoryview | None = None
    giver: _Holder | None = None
    beginning: str | None = None  # as the giver says


def pull(
    sha256: str, part: Path, peers: NodeApi, holders: list[dict[str, Any]], report: Report, room: Room, *, size: int,
    most: int,
) -> Digest:  # fmt: skip
    """Bring a file from other nodes into `part`, going on where that ends; the digest of what came.

    Args:
        sha256: the file.
        part: may hold a beginning, from wherever.
        peers: says later who has it besides, and is told who gave something else.
        holders: as `peers` has named them.
        report: told of "verifying" and "downloading".
        room: asked when the size is known.
        size: bytes; 0: not known.
        most: bytes that it may have if its size is not known.

    Raises:
        LocalAIError: the nodes that have it, if any, cannot give it; what has come stays, to go on with.
    """
    if not holders:
        raise Unavailable("no other node has it")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("a+b") as file:
        file.truncate(file.tell() // PIECE * PIECE)
        growing = Growing(file, part.with_name(f"{part.name}.note"), "", report, trusting=True)
        work = _Pull(sha256, growing, peers, report, room, most)
        work.size = size
        work.learn(holders)
        try:
            work.run()
            check(growing.digest.sha256, sha256)
        except WrongContent:
            growing.start_again()
            raise
        finally:
            work.end()
            file.flush()
    return growing.digest


class _Pull:
    """One file on its way. The thread that runs it compares, another writes; others wait for holders, one for each connection."""

    def __init__(self, sha256: str, growing: Growing, peers: NodeApi, report: Report, room: Room, most: int) -> None:
        self.size = 0
        self._sha256 = sha256
        self._growing = growing
        self._compared = growing.digest  # what has come in order and is right; a piece of it may not be written yet
        self._writing: Future[None] | None = None
        self._peers = peers
        self._report = report
        self._room = room
        self._most = most
        self._holders: dict[str, _Holder] = {}
        self._pieces: dict[int, _Piece] = {}
        self._buffers: list[bytearray] = []  # that are free
        self._lines: set[http.client.HTTPConnection] = set()
        self._changed = threading.Condition()
        self._ended = False
        self._fastest = 0.0
        self._came = 0  # bytes in all
        self._asked = time.monotonic()

    def learn(self, told: list[dict[str, Any]]) -> None:
        """Have holders as the API names them; those that were left out stay so."""
        for one in told:
            known = self._holders.setdefault(one["node"], _Holder(one["node"], one["name"], one["url"], one["ticket"]))
            known.url, known.ticket = one["url"], one["ticket"]

    def run(self) -> None:
        """Go on until all is written.

        Raises:
            Unavailable: nobody is left who could go on.
        """
        self._check_beginning()
        self._compared = self._growing.digest
        with ThreadPoolExecutor(1, "writing") as writer:
            self._go_on(writer)
            if self._writing:
                self._writing.result()

    def _go_on(self, writer: ThreadPoolExecutor) -> None:
        asked_for_room, marked, until = False, 0, time.monotonic() + STALL
        while not (self.size and self._compared.size >= self.size):
            self._hire()
            with self._changed:
                piece = self._pieces.get(self._next)
                if not (piece and piece.content is not None):
                    self._changed.wait(LOOK)
                self._tell()
                came = self._came
            if self.size and not asked_for_room:
                self._room(self.size - self._compared.size)
                asked_for_room = True
            if piece and piece.content is not None:
                self._add(piece, writer)
            if came - marked >= SLICE:
                marked, until = came, time.monotonic() + STALL
            elif time.monotonic() > until:
                raise Unavailable(f"only {came - marked} bytes came from other nodes in {STALL:.0f} s")

    def end(self) -> None:
        """Let go of all connections."""
        with self._changed:
            self._ended = True
            lines = list(self._lines)
            self._changed.notify_all()
        for line in lines:
            with suppress(OSError):
                if line.sock:
                    line.sock.shutdown(2)

    # --- by the thread that compares

    @property
    def _next(self) -> int:
        return self._compared.size // PIECE

    def _check_beginning(self) -> None:
        """Begin anew if what lies here is not how the file begins."""
        if not self._growing.done:
            return
        for holder in self._holders.values():
            with suppress(OSError, http.client.HTTPException, LocalAIError):
                line = self._connect(holder)
                response = self._ask(line, holder, "HEAD", self._growing.done - PIECE, self._growing.done)
                line.close()
                if beginning := response.getheader(BEGINNING_HEADER):
                    if beginning != self._growing.digest.sha256:
                        self._growing.start_again()
                    return

    def _hire(self) -> None:
        """Have as many connections as may be; ask for further holders from time to time, and when nobody is left."""
        working = [holder for holder in self._holders.values() if not holder.out]
        if not working or time.monotonic() > self._asked + ASK_AGAIN:
            self._asked = time.monotonic()
            with suppress(LocalAIError):
                self.learn(self._peers.holders(self._sha256)["holders"])
            working = [holder for holder in self._holders.values() if not holder.out]
        if not working:
            raise Unavailable("no other node can give it")
        with self._changed:
            for wanted in range(1, CONNECTIONS + 1):
                for holder in working:
                    if holder.connections < wanted and sum(each.connections for each in working) < MOST_CONNECTIONS:
                        holder.connections += 1
                        threading.Thread(target=self._work, args=(holder,), name=holder.name, daemon=True).start()

    def _add(self, piece: _Piece, writer: ThreadPoolExecutor) -> None:
        """Compare a piece, and have it written while the next one is compared."""
        content = piece.content
        assert content is not None
        assert piece.giver is not None
        digest = self._compared.copy()
        digest.update(content)
        if piece.beginning and digest.sha256 != piece.beginning:
            self._refuse(piece.giver)
            return
        if self._writing:
            self._writing.result()
        number = self._next
        self._compared = digest
        self._writing = writer.submit(self._write, content, digest)
        with self._changed:
            self._pieces.pop(number)
            self._changed.notify_all()

    def _refuse(self, holder: _Holder) -> None:
        """Take nothing of a holder that gave something else than the file."""
        log.warning("node %s gave wrong bytes of %s: it is left out", holder.name, self._sha256)
        with self._changed:
            holder.out = True
            for number in [number for number, piece in self._pieces.items() if piece.giver is holder]:
                del self._pieces[number]
            self._changed.notify_all()
        with suppress(LocalAIError):
            self._peers.blame(self._sha256, holder.id)

    def _tell(self) -> None:
        done = self._compared.size + sum(piece.come for piece in self._pieces.values())
        givers = sorted(holder.name for holder in self._holders.values() if holder.connections and not holder.out)
        self._report("downloading", done, self.size, note=f"from {', '.join(givers)}" if givers else "")

    # --- by the thread that writes

    def _write(self, content: memoryview, digest: Digest) -> None:
        self._growing.add(content, digest)
        with self._changed:
            self._buffers.append(content.obj)  # type: ignore[arg-type]

    # --- by a thread for each connection

    def _work(self, holder: _Holder) -> None:
        try:
            while (number := self._take(holder)) is not None:
                try:
                    self._fetch(holder, number)
                except (OSError, http.client.HTTPException, LocalAIError, ValueError) as error:
                    self._failed(holder, number, error)
        finally:
            with self._changed:
                holder.connections -= 1
                self._changed.notify_all()

    def _take(self, holder: _Holder) -> int | None:
        """The next piece to ask this holder for; None if there is none and will be none."""
        with self._changed:
            while not (self._ended or holder.out):
                number = self._choose(holder)
                if number is not None:
                    self._pieces.setdefault(number, _Piece()).asked[holder] = time.monotonic()
                    return number
                self._changed.wait(LOOK)
        return None

    def _choose(self, holder: _Holder) -> int | None:
        """A piece that nobody is asked for, or the first that takes much longer than others."""
        first = self._next
        last = min(first + AHEAD, -(-self.size // PIECE)) if self.size else first + 1
        for number in range(first, last):
            if number not in self._pieces:
                return number
        slow = time.monotonic() - max(SLOW * self._fastest, SLOW_AT_LEAST)
        for number in range(first, last):
            piece = self._pieces[number]
            if piece.content is None and holder not in piece.asked and max(piece.asked.values(), default=0.0) < slow:
                return number
        return None

    def _fetch(self, holder: _Holder, number: int) -> None:
        began, start = time.monotonic(), number * PIECE
        line = self._connect(holder)
        try:
            response = self._ask(line, holder, "GET", start, start + PIECE)
            total = self._agreed(response)
            content = memoryview(self._buffer())[: min(PIECE, total - start)]
            whole = self._read(response, number, content)
        finally:
            with self._changed:
                self._lines.discard(line)
            line.close()
        with self._changed:
            holder.failures = 0
            took = time.monotonic() - began
            self._fastest = min(self._fastest or took, took)
            piece = self._pieces.get(number)
            if whole and piece and piece.content is None and not holder.out:
                piece.content, piece.giver, piece.come = content, holder, len(content)
                piece.beginning = response.getheader(BEGINNING_HEADER)
            self._changed.notify_all()

    def _buffer(self) -> bytearray:
        """Room for a piece: what was used before costs no new pages."""
        with self._changed:
            return self._buffers.pop() if self._buffers else bytearray(PIECE)

    def _connect(self, holder: _Holder) -> http.client.HTTPConnection:
        place = urlsplit(holder.url)
        line = http.client.HTTPConnection(place.hostname or "", place.port, timeout=CONNECT)
        with self._changed:
            if self._ended:
                raise Unavailable("it has ended")
            self._lines.add(line)
        line.connect()
        line.sock.settimeout(SILENCE)
        return line

    def _ask(
        self, line: http.client.HTTPConnection, holder: _Holder, method: str, start: int, end: int
    ) -> http.client.HTTPResponse:
        headers = {"Range": f"bytes={start}-{end - 1}", "Authorization": f"Bearer {holder.ticket}"}
        line.request(method, urlsplit(holder.url).path, headers=headers)
        response = line.getresponse()
        if response.status != http.client.PARTIAL_CONTENT:
            raise Unavailable(f"{holder.name} answered {response.status}")
        if content_range(response.getheader("Content-Range", ""))[0] != start:
            raise WrongContent(f"{holder.name} gave another part")
        return response

    def _agreed(self, response: http.client.HTTPResponse) -> int:
        """The size of the file, on which all must agree."""
        total = content_range(response.getheader("Content-Range", ""))[1]
        with self._changed:
            if not 0 < total <= (self.size or self._most):
                raise WrongContent(f"it says that the file has {total} bytes")
            self.size = self.size or total
            if total != self.size:
                raise WrongContent(f"it has {total} bytes instead of {self.size}")
        return total

    def _read(self, response: http.client.HTTPResponse, number: int, content: memoryview) -> bool:
        """Whether all of it came before it came from somebody else."""
        done = 0
        while done < len(content):
            count = response.readinto(content[done : done + SLICE])
            if not count:
                raise Unavailable("the line was cut")
            done += count
            with self._changed:
                self._came += count
                piece = self._pieces.get(number)
                if self._ended or piece is None or piece.content is not None:
                    return False
                piece.come = max(piece.come, done)
        return True

    def _failed(self, holder: _Holder, number: int, error: Exception) -> None:
        with self._changed:
            if self._ended:
                return
            holder.failures += 1
            holder.out = holder.out or holder.failures >= TRIES or isinstance(error, WrongContent)
            log.info("node %s cannot give piece %d of %s: %s", holder.name, number, self._sha256, error)
            piece = self._pieces.get(number)
            if piece and piece.content is None:
                piece.asked.pop(holder, None)
                if not piece.asked:
                    del self._pieces[number]
            self._changed.notify_all()
            if not holder.out:
                self._changed.wait(PAUSE)
