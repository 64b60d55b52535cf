"""Requests in the simulation: they are routed, wait, are taken by a slot, and end, each exactly once.

A policy says where a request waits. Where the policy's copies pull, a copy with a free slot takes from its own queue,
then from its model's; a request in a copy's own queue is put into the model's too when nobody has taken it for a while,
and what a dead machine held goes back there once its lease has ended. Where they do not, a request stays where it was
put, and is lost with the machine.
"""

from __future__ import annotations

from collections import defaultdict, deque

from bench.simulation.clock import Clock
from bench.simulation.copies import Copy, Job
from bench.simulation.policies import Policy
from bench.simulation.tally import Tally
from bench.simulation.trace import Request
from localai_q.cluster.fleet import PATIENCE, Demand

LEASE = 10.0  # seconds, as the cluster's is by default
RING_AGAIN = 0.2  # seconds that a job waits for the copy that was chosen alone


class Serving:
    """Every job that has not ended, and every copy that is loaded."""

    def __init__(self, clock: Clock, policy: Policy, tally: Tally) -> None:
        self.clock = clock
        self.policy = policy
        self.tally = tally
        self.copies: dict[str, Copy] = {}
        self.busy: dict[str, int] = {}  # jobs at work, by copy
        self._waiting: defaultdict[str, dict[Job, float]] = defaultdict(dict)  # since when, by model; the oldest first
        self._lines: defaultdict[str, deque[Job]] = defaultdict(deque)  # the models' queues
        self._free: defaultdict[str, dict[Copy, None]] = defaultdict(dict)  # copies with room, the longest free first

    def arrive(self, request: Request) -> None:
        """A client asks."""
        self.tally.arrived += 1
        self._route(Job(request))

    def demand(self) -> dict[str, Demand]:
        """Who waits for which model."""
        pressure = self.policy.pressure(self.clock.now)
        asked = {model_id for model_id, waiting in self._waiting.items() if waiting} | pressure.keys()
        return {model_id: self._demand(model_id, pressure.get(model_id, 0)) for model_id in sorted(asked)}

    def _demand(self, model_id: str, pressure: int) -> Demand:
        now, since = self.clock.now, list(self._waiting[model_id].values())
        late = sum(now - joined > PATIENCE for joined in since)
        return Demand(waiting=len(since), late=late, longest=now - min(since, default=now), pressure=pressure)

    def add(self, copy: Copy) -> None:
        """A copy is ready."""
        self.copies[copy.id] = copy
        self._free[copy.model_id][copy] = None
        self.tally.slots(self.clock.now, copy.slots)
        self.policy.ready(copy)
        if not self.policy.pulls:  # what waited for any copy to be there
            held, self._lines[copy.model_id] = self._lines[copy.model_id], deque()
            for job in held:
                self._put(job)
        self._pull(copy)

    def stop(self, copy: Copy) -> None:
        """A copy takes nothing new."""
        copy.stopping = True
        self._free[copy.model_id].pop(copy, None)
        self.policy.gone(copy)

    def remove(self, copy: Copy) -> None:
        """A copy has ended."""
        assert not copy.running, f"{copy.id} was ended at work"
        self._forget(copy)

    def crash(self, copy: Copy) -> None:
        """A copy has died with its machine."""
        copy.alive = False
        held, queued = list(copy.running), [job for job in copy.queue if job in self._waiting[copy.model_id]]
        self._forget(copy)
        for job in held:
            self._cut(job)
        for job in queued if not self.policy.pulls else ():
            del self._waiting[copy.model_id][job]
            self.tally.lost += 1

    def is_idle(self, copy: Copy) -> bool:
        """Whether the copy works on nothing and nobody waits for its model."""
        return not copy.running and not self._waiting[copy.model_id]

    def _forget(self, copy: Copy) -> None:
        del self.copies[copy.id]
        self._free[copy.model_id].pop(copy, None)
        self.busy.pop(copy.id, None)
        self.tally.slots(self.clock.now, -copy.slots)
        self.policy.gone(copy)

    def _route(self, job: Job) -> None:
        self._waiting[job.request.model_id][job] = self.clock.now
        self._put(job)

    def _put(self, job: Job) -> None:
        """Let a job wait where the policy says."""
        model_id, now = job.request.model_id, self.clock.now
        self.policy.prepare(job, len(self._waiting[model_id]) - 1, now)
        with self.tally.routing.timed():
            chosen = self.policy.choose(job, now)
        if chosen is None:
            self._ring(job)
            return
        copy = self.copies.get(chosen)  # none where its machine has died unnoticed
        if copy:
            copy.queue.append(job)
            self._pull(copy)
        if self.policy.pulls and job.copy is None:
            self.clock.after(RING_AGAIN, self._ring_for_all, job)

    def _ring_for_all(self, job: Job) -> None:
        if not job.rung and job in self._waiting[job.request.model_id]:
            self.policy.missed(job, self.clock.now)
            self._ring(job)

    def _ring(self, job: Job) -> None:
        """Put a job that nobody has taken yet into its model's queue."""
        model_id = job.request.model_id
        if job.rung or job not in self._waiting[model_id]:
            return
        job.rung = True
        self._lines[model_id].append(job)
        if self.policy.pulls and self._free[model_id]:
            self._pull(next(iter(self._free[model_id])))

    def _pull(self, copy: Copy) -> None:
        while copy.has_room and (job := self._next(copy)):
            self._begin(copy, job)

    def _next(self, copy: Copy) -> Job | None:
        waiting = self._waiting[copy.model_id]
        for queue in self._queues(copy):
            while queue:
                job = queue.popleft()
                if job in waiting:
                    return job
        return None

    def _queues(self, copy: Copy) -> tuple[deque[Job], ...]:
        """What the copy takes from, the first first."""
        if not self.policy.pulls:
            return (copy.queue,)
        return () if copy.stopping else (copy.queue, self._lines[copy.model_id])

    def _begin(self, copy: Copy, job: Job) -> None:
        now = self.clock.now
        del self._waiting[copy.model_id][job]
        first, end = copy.begin(job, now)
        if not job.emitted:
            job.first = now + first
        self.busy[copy.id] = len(copy.running)
        if not copy.has_room:
            self._free[copy.model_id].pop(copy, None)
        self.tally.began(now)
        self.policy.took(copy, job, now)
        self.clock.after(end, self._finish, job, job.attempt)

    def _finish(self, job: Job, attempt: int) -> None:
        copy = job.copy
        if copy is None or attempt != job.attempt:
            return
        self._leave(copy, job)
        self.tally.done(job, self.clock.now)
        if copy.has_room and not copy.stopping:
            self._free[copy.model_id][copy] = None
        self._pull(copy)

    def _leave(self, copy: Copy, job: Job) -> None:
        job.copy, copy.used = None, self.clock.now
        copy.running.pop(job, None)
        self.busy[copy.id] = len(copy.running)
        if not copy.running:
            del self.busy[copy.id]
        self.tally.ended(self.clock.now)
        self.policy.left(copy, job)

    def _cut(self, job: Job) -> None:
        """What becomes of a job whose copy has died."""
        copy = job.copy
        assert copy is not None
        now = self.clock.now
        if now >= job.first:
            written = job.emitted + int((now - max(job.first, job.turn)) * copy.speed)
            job.emitted = min(max(written, 1), job.request.answer - 1)
        job.attempt += 1
        self.busy.setdefault(copy.id, 0)
        self._leave(copy, job)
        if self.policy.pulls:
            self.clock.after(LEASE, self._again, job)
        else:
            self.tally.lost += 1

    def _again(self, job: Job) -> None:
        self.tally.continued += 1
        job.rung = False
        self._waiting[job.request.model_id][job] = self.clock.now
        self._ring(job)
