"""The cluster's own routing in the simulation: its pure decision, with what a web process knows when it makes it.

There are several web processes. Each knows of its own requests at once, of those of the others what it last read, and
of nodes and replicas what the registry said a moment ago: a machine that has just died still looks ready.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import count

from bench.simulation.copies import Copy, Job
from bench.simulation.policies import Policy, Registry
from bench.simulation.trace import Request
from localai_q.cluster.affinity import HEAD, Chain, Prefixes, chain_of
from localai_q.cluster.routing import Guards, Load, Snapshot, route

WEBS = 4  # web processes
FRESH = 0.2  # seconds for which what others do is taken for known
REGISTRY = 0.5  # seconds for which the registry is
TTL = 300.0  # seconds for which a sighting counts, as by default
ENTRIES = 65_536  # links that a web process remembers, as by default
DEAF = 5.0  # seconds for which a replica that has not taken what it was told of is not told of more
PRESSED = 60.0  # seconds for which pressure counts after the latest
TOKEN = 4  # bytes


class View:
    """What the replicas of one model have to do, as far as one web process knows."""

    def __init__(self) -> None:
        self.read = float("-inf")
        self.waiting = 0  # jobs of others
        self.counts: Counter[str] = Counter()
        self._deaf: dict[str, float] = {}  # until when, by replica
        self._coming: dict[Job, str] = {}  # own jobs that nobody has taken yet, by whom is told of them

    def load(self, now: float) -> Load:
        deaf = [replica_id for replica_id, until in self._deaf.items() if now < until]
        return Load(in_flight=self.counts, waiting=self.waiting + self.counts[""], deaf=deaf)

    def missed(self, job: Job, now: float) -> None:
        """Who was told of a job has not taken it."""
        if replica_id := self._coming.get(job):
            self._deaf[replica_id] = now + DEAF
            self.counts[replica_id] -= 1
            self._coming[job] = ""
            self.counts[""] += 1

    def refresh(self, running: Mapping[str, int], waiting: int, now: float) -> None:
        """So it stands: jobs at work by replica, and how many wait."""
        self.read = now
        self.counts = Counter(running)
        self.counts.update(self._coming.values())
        self.waiting = max(waiting - len(self._coming), 0)

    def add(self, job: Job, replica_id: str) -> None:
        """A job sets out."""
        self._coming[job] = replica_id
        self.counts[replica_id] += 1

    def taken(self, job: Job, replica_id: str) -> None:
        """A replica works on it."""
        self._deaf.pop(replica_id, None)
        if job in self._coming:
            self.counts[self._coming.pop(job)] -= 1
        self.counts[replica_id] += 1

    def ended(self, replica_id: str) -> None:
        """A replica works on one job less."""
        self.counts[replica_id] = max(self.counts[replica_id] - 1, 0)


class Ours(Policy):
    """The route of `localai_q.cluster.routing`."""

    name = "localai_q"

    def __init__(self) -> None:
        self._prefixes = Prefixes(ttl=TTL, most=ENTRIES)
        self._guards = Guards()
        self._snapshot = Snapshot(models={}, replicas=(), node_names={}, taken=float("-inf"))
        self._views: defaultdict[tuple[int, str], View] = defaultdict(View)
        self._running: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._chains: dict[Job, Chain] = {}  # of jobs that nobody has taken yet
        self._pressed: dict[str, tuple[int, float]] = {}  # how often, and when for the last time
        self._number = count()
        self._turns = count()

    def connect(self, registry: Registry) -> None:
        self._registry = registry

    def prepare(self, job: Job, waiting: int, now: float) -> None:
        """What a web process reads now and then, and the text that a client has sent."""
        if now - self._snapshot.taken >= REGISTRY:
            models, replicas = self._registry()
            self._snapshot = Snapshot(models={model.id: model for model in models}, replicas=tuple(replicas),
                                      node_names={}, taken=now)  # fmt: skip
        job.web = next(self._number) % WEBS
        job.text = _head(job.request)
        view = self._views[job.web, job.request.model_id]
        if now - view.read >= FRESH:
            view.refresh(self._running[job.request.model_id], waiting, now)

    def choose(self, job: Job, now: float) -> str | None:
        model = self._snapshot.models[job.request.model_id]
        chain = self._chains[job] = chain_of(job.text, key=b"key", model_id=model.id)
        view = self._views[job.web, model.id]
        way = route(model, self._snapshot.pool(model), "chat", now, load=view.load(now), guards=self._guards,
                    matched=self._prefixes.match(chain, now), turn=next(self._turns))  # fmt: skip
        view.add(job, way.replica_id or "")
        if way.pressed:
            self._pressed[model.id] = (self._pressed.get(model.id, (0, 0.0))[0] + 1, now)
        return way.replica_id

    def gone(self, copy: Copy) -> None:
        self._prefixes.forget(copy.id)

    def took(self, copy: Copy, job: Job, now: float) -> None:
        job.text = b""
        self._running[copy.model_id][copy.id] += 1
        self._views[job.web, copy.model_id].taken(job, copy.id)
        if chain := self._chains.pop(job, None):
            self._prefixes.observe(chain, copy.id, now)

    def missed(self, job: Job, now: float) -> None:
        self._views[job.web, job.request.model_id].missed(job, now)

    def left(self, copy: Copy, job: Job) -> None:
        self._running[copy.model_id][copy.id] -= 1
        self._views[job.web, copy.model_id].ended(copy.id)

    def pressure(self, now: float) -> Mapping[str, int]:
        return {model_id: times for model_id, (times, last) in self._pressed.items() if now - last < PRESSED}

    def relieve(self, model_id: str) -> None:
        self._pressed.pop(model_id, None)


def _head(request: Request) -> bytes:
    """The head of a prompt: the system prompt, and what the conversation adds to it."""
    system = _text("system", request.system, request.system_length)
    said = _text("said", request.conversation, min(request.prompt - request.system_length, HEAD // TOKEN))
    return (system + said)[:HEAD]


def _text(kind: str, number: int, tokens: int) -> bytes:
    """Text of so many tokens; a longer one of the same number begins with the shorter."""
    return random.Random(f"{kind} {number}").randbytes(tokens * TOKEN)
