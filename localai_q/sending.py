"""Sends a file to the API in parts, and goes on where the API has it when a connection or the API itself was cut off.

Nodes and the command line send so; how they ask the API, and with which key, is theirs. What the API does with the parts
stands in `localai_q.services.uploads`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import httpx

from localai_q.errors import InvalidValue, Unavailable

CHUNK = 64 << 20  # bytes of a request
BLOCK = 1 << 20
TIMEOUT = httpx.Timeout(30.0, read=None, write=300.0)  # the last answer comes when the whole was checked
PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds after a failure, doubled each time
PATIENCE = 3600.0  # seconds without a byte more after which it is given up
PASSING = (416, 500, 502, 503, 504)  # statuses after which the API is asked again how far it is


class Api(Protocol):
    """The API, as who sends asks it."""

    def exchange(self, method: str, path: str, **request: Any) -> httpx.Response:
        """What it answers, a refusal or not. `request`: as httpx takes it. `Unavailable`: nobody answers."""

    def check(self, answer: httpx.Response) -> None:
        """Raise what it has answered, if that is a refusal."""


def send(
    api: Api, path: str, file: Path, tell: Callable[[int], object], *, headers: Mapping[str, str] | None = None,
    patience: float = PATIENCE,
) -> None:  # fmt: skip
    """Have the API have a file. One that it has is not sent, but kept for as long again, though nothing names it yet.

    Args:
        path: to which it is PUT.
        tell: told how many bytes the API has.
        headers: of every request.
        patience: seconds without a byte more after which it is given up.

    Raises:
        LocalAIError: the API refuses it, does not answer at all, or has not gone on for so long.
    """
    sending = _Sending(api, path, file, tell, headers or {})
    there, whole = sending.ask()
    furthest, pause, until = there, PAUSE, time.monotonic() + patience
    known = True
    while not whole:
        tell(there)
        try:
            there, whole = sending.send_from(there) if known else sending.ask()
            known = True
        except Unavailable:
            if time.monotonic() > until:
                raise
            known = False
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        if there > furthest:
            furthest, pause, until = there, PAUSE, time.monotonic() + patience
    tell(sending.size)


def blocks(file: Path, start: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from one place to another."""
    with file.open("rb") as opened:
        opened.seek(start)
        while block := opened.read(min(BLOCK, end - opened.tell())):
            yield block


class _Sending:
    """One file on its way. Its answers say how many bytes the API has, and whether that is all."""

    def __init__(
        self, api: Api, path: str, file: Path, tell: Callable[[int], object], headers: Mapping[str, str]
    ) -> None:
        self._api = api
        self._path = path
        self._file = file
        self._tell = tell
        self._headers = headers
        self.size = file.stat().st_size

    def ask(self) -> tuple[int, bool]:
        """How far it is; the API checks what is all there."""
        return self._put(b"", 0, f"bytes */{self.size}")

    def send_from(self, start: int) -> tuple[int, bool]:
        """Send a part of it."""
        end = min(start + CHUNK, self.size)
        if start == end:
            return self.ask()
        return self._put(self._content(start, end), end - start, f"bytes {start}-{end - 1}/{self.size}")

    def _put(self, content: bytes | Iterator[bytes], length: int, which: str) -> tuple[int, bool]:
        headers = {**self._headers, "Content-Length": str(length), "Content-Range": which}
        answer = self._api.exchange("PUT", self._path, content=content, headers=headers, timeout=TIMEOUT)
        if answer.status_code == httpx.codes.PERMANENT_REDIRECT:
            return int(answer.headers["X-File-Size"]), False
        if answer.status_code in PASSING:
            raise Unavailable(f"the API answers with status {answer.status_code}")
        self._api.check(answer)
        return self.size, True

    def _content(self, start: int, end: int) -> Iterator[bytes]:
        done = start
        for block in blocks(self._file, start, end):
            yield block
            done += len(block)
            self._tell(done)
        if done < end:
            raise InvalidValue(f"{self._file} has become shorter while it was sent")
