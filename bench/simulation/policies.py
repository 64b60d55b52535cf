"""Ways to choose the copy that a request goes to: the cluster's own, and what load balancers do."""

from __future__ import annotations

import random
from collections import defaultdict

from bench.simulation.copies import Copy
from bench.simulation.trace import Request


class Policy:
    """Chooses among the copies that are ready; knows at once which are, and what each of them holds."""

    name: str
    pulls = False  # whether a copy takes what waits for its model when it has a free slot

    def __init__(self) -> None:
        self._ready: defaultdict[str, list[Copy]] = defaultdict(list)

    def ready(self, copy: Copy) -> None:
        """A copy can be chosen."""
        self._ready[copy.model_id].append(copy)

    def gone(self, copy: Copy) -> None:
        """A copy cannot be chosen any more."""
        if copy in self._ready[copy.model_id]:
            self._ready[copy.model_id].remove(copy)

    def took(self, copy: Copy, request: Request, now: float) -> None:
        """A copy has begun to work on a request."""

    def left(self, copy: Copy) -> None:
        """A copy works on one request less."""

    def choose(self, request: Request, now: float) -> Copy | None:
        """Where the request waits; None: in its model's queue."""
        among = self._ready[request.model_id]
        return self._choose(request.model_id, among) if among else None

    def _choose(self, model_id: str, among: list[Copy]) -> Copy:
        raise NotImplementedError


class Random(Policy):
    name = "random"

    def __init__(self) -> None:
        super().__init__()
        self._chance = random.Random(1)

    def _choose(self, model_id: str, among: list[Copy]) -> Copy:
        return self._chance.choice(among)


class RoundRobin(Policy):
    name = "round robin"

    def __init__(self) -> None:
        super().__init__()
        self._turn: defaultdict[str, int] = defaultdict(int)

    def _choose(self, model_id: str, among: list[Copy]) -> Copy:
        self._turn[model_id] += 1
        return among[self._turn[model_id] % len(among)]


class LeastInFlight(Policy):
    name = "least in flight"

    def __init__(self) -> None:
        super().__init__()
        self._chance = random.Random(1)

    def _choose(self, model_id: str, among: list[Copy]) -> Copy:
        load = [len(copy.running) + len(copy.queue) for copy in among]
        least = min(load)
        return self._chance.choice([copy for copy, held in zip(among, load, strict=True) if held == least])


class Pull(Policy):
    """Every request waits in its model's queue, from which free slots take."""

    name = "pull"
    pulls = True

    def choose(self, request: Request, now: float) -> Copy | None:
        return None
