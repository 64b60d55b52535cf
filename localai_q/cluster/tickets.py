"""Tickets: what a node shows to another one to get a file from it. Pure.

A ticket names one holder, one file and a time. It is signed with the SHA-256 of the holder's secret, which the API and
the holder know, so that a node can make tickets for its own files only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from itsdangerous import BadSignature, URLSafeSerializer

LIFE = 300.0  # seconds
SALT = "localai_q.file"


def issue(secret_hash: str, node_id: str, sha256: str, *, now: float) -> str:
    """A ticket for a file of the node with this secret; `now` in seconds since the epoch."""
    return str(_signer(secret_hash).dumps([node_id, sha256, int(now + LIFE)]))


def is_valid(ticket: str, secret_hashes: Iterable[str], node_id: str, sha256: str, *, now: float) -> bool:
    """Whether the ticket is for this file of this node, and for this moment."""
    for secret_hash in secret_hashes:
        try:
            named, file, until = _signer(secret_hash).loads(ticket)
        except (BadSignature, ValueError, TypeError):
            continue
        return bool((named, file) == (node_id, sha256) and now < until <= now + 2 * LIFE)
    return False


def _signer(secret_hash: str) -> URLSafeSerializer:
    return URLSafeSerializer(secret_hash, salt=SALT, signer_kwargs={"digest_method": hashlib.sha256})
