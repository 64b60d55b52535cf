"""What is counted while a simulation runs, and the figures that follow."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bench.simulation.copies import Job


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which that part of them lies; 0 of none."""
    ordered = sorted(values)
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else 0.0


class Stopwatch:
    """Seconds of processor time, so that other work on the machine does not count, of every so many-th decision."""

    def __init__(self, every: int = 1) -> None:
        self.seconds: list[float] = []
        self._every = every
        self._number = 0

    @contextmanager
    def timed(self) -> Iterator[None]:
        self._number += 1
        if self._number % self._every:  # reading that clock takes as long as some decisions
            yield
            return
        started = time.process_time()
        yield
        self.seconds.append(time.process_time() - started)


class Integral:
    """A number over time: its sum of seconds."""

    def __init__(self) -> None:
        self.value = 0
        self.total = 0.0
        self._since = 0.0

    def add(self, now: float, change: int) -> None:
        self.total += self.value * (now - self._since)
        self.value += change
        self._since = now


class Tally:
    """Of one run. Times in seconds."""

    def __init__(self) -> None:
        self.routing = Stopwatch(every=10)
        self.planning = Stopwatch()
        self.actions: list[int] = []  # of each plan
        self.arrived = 0
        self.finished = 0
        self.lost = 0
        self.continued = 0  # attempts after the first
        self.loads = 0  # copies loaded after the start
        self.stops = 0
        self.waits: list[float] = []  # until a slot took it, like the next by request
        self.first_tokens: list[float] = []
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self._working = Integral()
        self._ready = Integral()
        self.utilisation = 0.0

    def slots(self, now: float, change: int) -> None:
        """So many slots more, or fewer, are ready."""
        self._ready.add(now, change)

    def began(self, now: float) -> None:
        self._working.add(now, 1)

    def ended(self, now: float) -> None:
        self._working.add(now, -1)

    def done(self, job: Job, now: float) -> None:
        """A request has got all of its answer."""
        assert job.began is not None
        self.finished += 1
        self.waits.append(job.began - job.request.at)
        self.first_tokens.append(job.first - job.request.at)
        self.prompt_tokens += job.request.prompt
        self.cached_tokens += job.cached

    def close(self, now: float) -> None:
        """No more requests come: what follows is not how busy the fleet was."""
        self.slots(now, 0)
        self._working.add(now, 0)
        self.utilisation = self._working.total / self._ready.total

    @property
    def unfinished(self) -> int:
        return self.arrived - self.finished - self.lost
