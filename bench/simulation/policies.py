"""Ways to choose the copy that a request goes to, beside the cluster's own, which is in `bench.simulation.ours`."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from bench.simulation.copies import Copy, Job
from localai_q.cluster.models import Model
from localai_q.cluster.nodes import Replica

Registry = Callable[[], tuple[Sequence[Model], Sequence[Replica]]]


class Policy:
    """What the simulation asks and tells whoever routes. This one puts every request into its model's queue."""

    name = "pull"
    pulls = True  # whether a copy with a free slot takes what waits for its model

    def connect(self, registry: Registry) -> None:
        """What is known of models and replicas can be read there."""

    def prepare(self, job: Job, waiting: int, now: float) -> None:
        """A request is about to be routed, behind so many that wait. What this takes is not the policy's own time."""

    def choose(self, job: Job, now: float) -> str | None:
        """The replica that a request goes to; None: its model's queue."""
        return None

    def ready(self, copy: Copy) -> None:
        """A copy can take requests."""

    def gone(self, copy: Copy) -> None:
        """A copy takes no more requests."""

    def took(self, copy: Copy, job: Job, now: float) -> None:
        """A copy has begun to work on a request."""

    def missed(self, job: Job, now: float) -> None:
        """The copy that was chosen has not taken the request in time, and every copy is told of it."""

    def left(self, copy: Copy, job: Job) -> None:
        """A copy works on a request no more."""

    def pressure(self, now: float) -> Mapping[str, int]:
        """Requests that load has lately kept from where they would best have gone, by model."""
        return {}

    def relieve(self, model_id: str) -> None:
        """The model gets one more replica."""


class Push(Policy):
    """What load balancers do: each request goes into a copy's own queue at once, and stays there.

    They know at once which copies serve and what each holds.
    """

    pulls = False

    def __init__(self) -> None:
        self._ready: defaultdict[str, dict[str, Copy]] = defaultdict(dict)

    def ready(self, copy: Copy) -> None:
        self._ready[copy.model_id][copy.id] = copy

    def gone(self, copy: Copy) -> None:
        self._ready[copy.model_id].pop(copy.id, None)

    def choose(self, job: Job, now: float) -> str | None:
        model_id = job.request.model_id
        among = list(self._ready[model_id].values())
        return self._choose(model_id, among).id if among else None

    def _choose(self, model_id: str, among: list[Copy]) -> Copy:
        raise NotImplementedError


class Random(Push):
    name = "random"

    def __init__(self) -> None:
        super().__init__()
        self._chance = random.Random(1)

    def _choose(self, model_id: str, among: list[Copy]) -> Copy:
        return self._chance.choice(among)


class RoundRobin(Push):
    name = "round robin"

    def __init__(self) -> None:
        super().__init__()
        self._turn: defaultdict[str, int] = defaultdict(int)

    def _choose(self, model_id: str, among: list[Copy]) -> Copy:
        self._turn[model_id] += 1
        return among[self._turn[model_id] % len(among)]


class LeastInFlight(Push):
    name = "least in flight"

    def __init__(self) -> None:
        super().__init__()
        self._chance = random.Random(1)

    def _choose(self, model_id: str, among: list[Copy]) -> Copy:
        load = [len(copy.running) + len(copy.queue) for copy in among]
        least = min(load)
        return self._chance.choice([copy for copy, held in zip(among, load, strict=True) if held == least])
