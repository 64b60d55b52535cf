"""The text of an answer, as far as it can be shown while tokens come. Pure.

Owns that characters are whole, that a stop string is never shown, not even its beginning, and the form of log
probabilities.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

import numpy as np


class Text:
    """What is known of an answer's text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False  # whether it has come to a stop string

    def add(self, piece: bytes) -> str:
        """What can be shown once this piece is known."""
        return self._show(self._decoder.decode(piece))

    def rest(self) -> str:
        """What is left to be shown at the end."""
        return "" if self.stopped else self._show(self._decoder.decode(b"", final=True)) + self._held

    def _show(self, text: str) -> str:
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of the text could be the beginning of the stop string."""
    for count in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0


def chances(logits: np.ndarray, token: int, alternatives: int) -> tuple[float, list[tuple[int, float]]]:
    """The log probability of a token, and the likeliest tokens with theirs, before any sampling."""
    numbers = logits.astype(np.float64)
    highest = numbers.max()
    numbers -= highest + np.log(np.exp(numbers - highest).sum())
    best = np.argpartition(-numbers, min(alternatives, len(numbers) - 1))[:alternatives] if alternatives else []
    ranked = sorted(((int(each), float(numbers[each])) for each in best), key=lambda pair: -pair[1])
    return float(numbers[token]), ranked


def logprob_item(piece: bytes, logprob: float) -> dict[str, Any]:
    """One token as OpenAI's log probabilities have it."""
    return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}
