"""Files that come as bodies of requests, whole or in parts: what the headers say, and what is answered. One form for all routes
that take a file; what becomes of it is decided in `localai_q.services.uploads`.
"""

from __future__ import annotations

from typing import Any

from flask import Response, request

from localai_q.errors import BodyTooLarge
from localai_q.services.uploads import Chunk, Received


def chunk(most: int) -> Chunk:
    """The part of a file that this request brings. `most`: bytes that the whole may have.

    Raises:
        InvalidValue: its headers contradict each other, or cannot be read.
        BodyTooLarge: the whole is larger.
    """
    request.max_content_length = most
    found = Chunk.of(request.headers.get("Content-Range"), request.content_length)
    if found.total is not None and found.total > most:
        raise BodyTooLarge(f"The file has {found.total} bytes, and may have {most}.")
    return found


def received(sha256: str, found: Received) -> Response | tuple[dict[str, Any], int]:
    """The answer to who has sent a part."""
    return ({"sha256": sha256, "size": found.size}, 201) if found.whole else incomplete(found)


def incomplete(found: Received) -> Response:
    """The answer that says how much of a file is there."""
    there = {"Range": f"bytes=0-{found.size - 1}"} if found.size else {}
    return Response(status=308, headers={"X-File-Size": str(found.size), **there})
