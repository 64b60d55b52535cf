"""The SHA-256 of a file and of its beginnings, however the bytes come."""

import hashlib

import pytest

from workers.node import digests
from workers.node.digests import Digest


@pytest.mark.parametrize("step", [1, 7, 10, 11, 35])
def test_beginnings_end_where_pieces_do(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    monkeypatch.setattr(digests, "PIECE", 10)
    content = bytes(range(35))
    digest = Digest()
    for at in range(0, len(content), step):
        digest.update(content[at : at + step])
    assert digest.size == 35
    assert digest.sha256 == hashlib.sha256(content).hexdigest()
    assert digest.beginnings == [hashlib.sha256(content[:end]).digest() for end in (10, 20, 30)]


def test_a_copy_goes_its_own_way() -> None:
    digest = Digest()
    digest.update(b"a")
    twin = digest.copy()
    twin.update(b"b")
    assert (digest.sha256, twin.sha256) == (hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"ab").hexdigest())
