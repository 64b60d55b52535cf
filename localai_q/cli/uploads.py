"""Sends a file to the API in parts, and goes on where the API has it when a connection or the API itself was cut off."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from localai_q.cli.client import Api
from localai_q.errors import InvalidValue, Unavailable

CHUNK = 64 << 20  # bytes of a request
BLOCK = 1 << 20
TIMEOUT = httpx.Timeout(30.0, read=None, write=300.0)  # the last answer comes when the whole was checked
PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds after a failure, doubled each time
PATIENCE = 3600.0  # seconds without a byte more after which it is given up
PASSING = (416, 500, 502, 503, 504)  # statuses after which the API is asked again how far it is


def send(api: Api, file: Path, sha256: str, tell: Callable[[int], None]) -> None:
    """Have the API have a file. `tell`: told how many bytes it has.

    Raises:
        LocalAIError: the API refuses it, or has not been there for `PATIENCE`.
    """
    size = file.stat().st_size
    there, whole = _ask(api, sha256)
    furthest, pause, until = there, PAUSE, time.monotonic() + PATIENCE
    known = True
    while not whole:
        tell(there)
        try:
            there, whole = _send_chunk(api, file, sha256, there, size, tell) if known else _ask(api, sha256)
            known = True
        except Unavailable:
            if time.monotonic() > until:
                raise
            known = False
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        if there > furthest:
            furthest, pause, until = there, PAUSE, time.monotonic() + PATIENCE
    tell(size)


def blocks(file: Path, start: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from one place to another."""
    with file.open("rb") as opened:
        opened.seek(start)
        while block := opened.read(min(BLOCK, end - opened.tell())):
            yield block


def _ask(api: Api, sha256: str) -> tuple[int, bool]:
    """How much of the file the API has, and whether that is all."""
    with api.errors():
        answer = api.http.head(f"/api/files/{sha256}")
    return (0, False) if answer.status_code == httpx.codes.NOT_FOUND else _told(api, answer)


def _send_chunk(
    api: Api, file: Path, sha256: str, start: int, size: int, tell: Callable[[int], None]
) -> tuple[int, bool]:
    """Send a part of the file; how much of it the API has then, and whether that is all."""
    end = min(start + CHUNK, size)
    which = f"bytes {start}-{end - 1}/{size}" if start < end else f"bytes */{size}"
    headers = {"Content-Length": str(end - start), "Content-Range": which, "X-Content-SHA256": sha256}

    def content() -> Iterator[bytes]:
        done = start
        for block in blocks(file, start, end):
            yield block
            done += len(block)
            tell(done)
        if done < end:
            raise InvalidValue(f"{file} has become shorter while it was sent")

    with api.errors():
        answer = api.http.put(f"/api/files/{sha256}", content=content(), headers=headers, timeout=TIMEOUT)
    return _told(api, answer)


def _told(api: Api, answer: httpx.Response) -> tuple[int, bool]:
    if answer.status_code == httpx.codes.PERMANENT_REDIRECT:
        return int(answer.headers["X-File-Size"]), False
    if answer.status_code in PASSING:
        raise Unavailable(f"the API answers with status {answer.status_code}")
    api.check(answer)
    return 0, True
