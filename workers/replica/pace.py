"""How fast a replica answers: a mean of its last answers, in which old ones fade. Owns that number only."""

from __future__ import annotations

import math
import threading

LEAST = 4  # tokens of an answer that says something of its pace
FADE = 256  # tokens after which what was measured before counts for a third


class Pace:
    """Tokens per second of one answer, as its engine measured them. A long answer says more than a short one."""

    def __init__(self) -> None:
        self.tokens_per_second = 0.0  # 0: nothing was generated yet
        self._lock = threading.Lock()

    def note(self, tokens: int, seconds: float) -> None:
        """An answer of so many tokens has taken so long, without its prompt. An engine may not know how long: 0."""
        if tokens < LEAST or seconds <= 0:
            return
        with self._lock:
            weight = 1 - math.exp(-tokens / FADE) if self.tokens_per_second else 1.0
            self.tokens_per_second += weight * (tokens / seconds - self.tokens_per_second)
