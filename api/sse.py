"""Server-sent events as bytes. Owns the frames; knows neither what they carry nor how they are flushed."""

from __future__ import annotations

import re

_LINE_END = re.compile(r"\r\n|\r|\n")

DONE = b"data: [DONE]\n\n"  # how OpenAI ends a stream
RETRY = b"retry: 200\n"  # come back in 200 ms; without an empty line, for the reason that `comment` gives
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold the tokens back
}


def sse(data: str, event_id: str | None = None) -> bytes:
    """One event. Data of several lines stays one event.

    Args:
        event_id: tells of what the event was made: `JOB:ATTEMPT-INDEX` of the journal entry.
    """
    if "\n" in data or "\r" in data:
        data = _LINE_END.sub("\ndata: ", data)
    if event_id is None:
        return f"data: {data}\n\n".encode()
    return f"id: {event_id}\ndata: {data}\n\n".encode()


def comment(text: str = "") -> bytes:
    """A comment, which clients skip: it keeps a connection alive and can tell a human what goes on.

    No empty line ends it: OpenAI's client would take that for the end of an event without data, and fail.
    """
    return f": {_LINE_END.sub(' ', text)}\n".encode()
