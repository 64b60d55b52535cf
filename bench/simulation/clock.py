"""Simulated time: what is to happen when, and doing it in that order."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any


class Clock:
    """The events to come. `now`: seconds since the start."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = count()  # what is due at the same time happens in the order in which it was asked for

    def after(self, seconds: float, act: Callable[..., None], *args: Any) -> None:
        """Call `act(*args)` so many seconds from now."""
        heapq.heappush(self._events, (self.now + seconds, next(self._number), act, args))

    def run(self, until: float) -> None:
        """Let everything happen that is due before then."""
        while self._events and self._events[0][0] < until:
            self.now, _, act, args = heapq.heappop(self._events)
            act(*args)
        self.now = until
