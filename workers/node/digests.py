"""The SHA-256 of a file and of its beginnings, in one pass.

A beginning ends where a piece does. Who has a file knows the SHA-256 of each of its beginnings from when the whole was
verified; who gets it piece by piece compares them as he goes, and so knows the first piece that is wrong.
"""

from __future__ import annotations

import hashlib

PIECE = 8 << 20  # bytes


class Digest:
    """What has come so far."""

    def __init__(self) -> None:
        self.size = 0
        self.beginnings: list[bytes] = []  # the SHA-256 up to the end of each whole piece
        self._hasher = hashlib.sha256()

    def update(self, block: bytes | memoryview) -> None:
        view = memoryview(block)
        while view:
            part = view[: PIECE - self.size % PIECE]
            self._hasher.update(part)
            self.size += len(part)
            if self.size % PIECE == 0:
                self.beginnings.append(self._hasher.digest())
            view = view[len(part) :]

    @property
    def sha256(self) -> str:
        return self._hasher.hexdigest()

    def copy(self) -> Digest:
        twin = Digest()
        twin.size, twin.beginnings, twin._hasher = self.size, self.beginnings.copy(), self._hasher.copy()
        return twin
