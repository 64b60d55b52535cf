"""A loaded copy of a model in the simulation: its slots, its queue, and which prompts it still has in its cache."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque

from bench.simulation.fleet import PROMPT_FACTOR
from bench.simulation.trace import Request

REMEMBERED = 6  # conversations that a copy's prompt cache holds besides those in its slots


class Job:
    """A request on its way to its end."""

    __slots__ = ("attempt", "began", "cached", "copy", "emitted", "first", "request", "rung", "text", "turn", "web")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.copy: Copy | None = None  # that works on it
        self.attempt = 0
        self.began: float | None = None  # when a slot first took it
        self.turn = 0.0  # when the present attempt's slot took it
        self.first = 0.0  # when its first token came
        self.emitted = 0  # tokens written by attempts before this
        self.cached = 0  # tokens of its prompt that needed no reading, in the first attempt
        self.text = b""  # the head of its prompt, where the policy reads that
        self.web = 0  # the web process that answers for it, where there are several
        self.rung = False  # whether it waits in its model's queue too


class Cache:
    """The conversations that a copy remembers, the least recently used first. Lengths in tokens."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._known: OrderedDict[int, tuple[int, int]] = OrderedDict()  # system prompt and length, by conversation
        self._systems: Counter[int] = Counter()

    def use(self, request: Request) -> int:
        """How much of the prompt is known; from now on all of the prompt and its answer is."""
        before = self._known.pop(request.conversation, None)
        shared = request.system_length if self._systems[request.system] > 0 else 0
        known = max(shared, min(before[1], request.history) if before else 0)
        if before is None:
            self._systems[request.system] += 1
        self._known[request.conversation] = (request.system, request.prompt + request.answer)
        if len(self._known) > self._room:
            _, (system, _) = self._known.popitem(last=False)
            self._systems[system] -= 1
        return known


class Copy:
    """One replica's process."""

    __slots__ = ("alive", "cache", "id", "model_id", "queue", "running", "slots", "speed", "stopping", "used")

    def __init__(self, replica_id: str, model_id: str, speed: float, slots: int) -> None:
        self.id = replica_id
        self.model_id = model_id
        self.speed = speed  # tokens/s of each slot
        self.slots = slots
        self.running: dict[Job, None] = {}
        self.queue: deque[Job] = deque()  # its own; what another has taken from there is skipped
        self.cache = Cache(slots + REMEMBERED)
        self.alive = True
        self.stopping = False
        self.used = 0.0  # when a job last ended here

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return self.alive and len(self.running) < self.slots

    def begin(self, job: Job, now: float) -> tuple[float, float]:
        """Take a job into a slot. Seconds until its next token, and until its end."""
        assert self.has_room, f"{self.id} has no free slot"
        assert job.copy is None, "two copies work on one job"
        self.running[job] = None
        known = self.cache.use(job.request)
        if job.began is None:
            job.began, job.cached = now, known
        job.copy, job.turn = self, now
        token = 1 / self.speed
        reading = (job.request.prompt + job.emitted - known) * token / PROMPT_FACTOR
        return reading + token, reading + (job.request.answer - job.emitted) * token
