"""What every source comes down to: something that a downloader can fetch and check."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from localai_q import network
from localai_q.errors import Forbidden, LocalAIError, NotFound, Unavailable
from localai_q.network import NO_HEADERS, Network, Trust

TRIES = 4  # of a question
PAUSE = 0.5  # seconds before the second try, doubled each time
LONGEST_PAUSE = 30.0


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the bytes of a file are."""

    urls: tuple[str, ...]  # of the same bytes; the first that works is used
    headers: Mapping[str, str] = field(default_factory=dict)
    sha256: str | None = None  # of the bytes behind the URLs, where the source says it
    size: int = 0  # bytes; 0: not known
    trust: Trust = network.NONE
    member: str = ""  # the file is this one within the archive that the URLs lead to


def ask(
    net: Network, url: str, headers: Mapping[str, str] = NO_HEADERS, trust: Trust = network.NONE, **how: Any
) -> tuple[httpx.Response, bytes]:
    """A short answer, asked for again while the network or the server fails. `how`: as for `Network.open`."""
    for attempt in range(TRIES):
        try:
            response, body = net.read(url, headers, trust, **how)
            if not is_passing(response.status_code) or attempt == TRIES - 1:
                return response, body
            pause = pause_of(response, attempt)
        except httpx.HTTPError as error:
            if attempt == TRIES - 1:
                raise Unavailable(said(error)) from error
            pause = PAUSE * 2**attempt
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def size_said(text: str) -> int:
    """The bytes that a header says; 0 if it is no number of them."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else 0


def is_passing(status: int) -> bool:
    """Whether this status may be another one in a moment."""
    return status in (408, 425, 429) or status >= httpx.codes.INTERNAL_SERVER_ERROR


def pause_of(response: httpx.Response, attempt: int) -> float:
    """Seconds until the next try: as the server wishes, within reason."""
    wished = response.headers.get("retry-after", "")
    return min(float(wished), LONGEST_PAUSE) if wished.isdecimal() else PAUSE * 2**attempt


def refusal(response: httpx.Response, hint: str = "") -> LocalAIError:
    """The error for a status that is no success. `hint`: what to do where credentials are missing."""
    status, host = response.status_code, response.request.url.host
    if status in (401, 403):
        return Forbidden(f"{host} does not let this node have it ({status})" + (f": {hint}" if hint else ""))
    if status in (404, 410):
        return NotFound(f"{host} has no such file ({status})")
    return Unavailable(f"{host} answered {status}")


def said(error: httpx.HTTPError) -> str:
    """A failure of the network in one line."""
    return f"the network failed ({type(error).__name__}: {' '.join(str(error).split())})"
