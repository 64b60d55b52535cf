"""A job's road on Redis: submit, claim, renew, append, finish, abort. Owns the scripts and the shape of their answers.

The Celery message is only a doorbell; what stands here is the truth about who works on what. A job's hash carries its
attempt number; every write of an owner names the attempt it claimed and is refused by the script once that number has
moved on (a fencing token, as in Kleppmann's "How to do distributed locking"). Times are compared with Redis' own clock.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from importlib import resources
from typing import Any

import redis

from localai_q import names
from localai_q.bus.connection import broker_errors
from localai_q.cluster.events import End, Event, encode
from localai_q.errors import Busy

SCRIPTS = ("submit", "claim", "append", "renew", "finish", "abort", "release", "requeue")
CONTROL = "control"  # the name under which ends are kept that no node has written


class Append(IntEnum):
    """What became of an append."""

    WRITTEN = 1
    CANCEL = 2  # written, and the owner is asked to stop
    FENCED = 0  # the job has another owner, or none
    JOURNAL_GONE = -1
    JOURNAL_FULL = -2


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job as it joins a line."""

    job_id: str
    line: str  # the queue whose consumers may take it
    request: dict[str, Any]
    watcher: str = ""  # the web process that waits for its events
    deadline: float = 0.0  # seconds since the epoch; 0: none
    lives: float = 3600.0  # seconds after which Redis forgets the job in any case
    stream: bool = False  # its events are shown to somebody while they come
    attempt: int = 0  # attempts that were made before Redis lost the job


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A claim that succeeded."""

    job_id: str
    line: str
    attempt: int
    last_index: int  # of the journal, when the claim was made
    request: dict[str, Any]
    stream: bool
    deaths: int = 0  # owners that died while they had the job
    deadline: float = 0.0  # seconds since the epoch; 0: none


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A claim that failed."""

    job_id: str
    why: str  # unknown | ended | cancelled | late | leased


@dataclass(frozen=True, kw_only=True)
class LiveState:
    """What Redis knows of a job now."""

    state: str  # waiting | leased | ended
    attempt: int
    node_id: str | None
    line: str
    watchers: tuple[str, ...] = ()  # web processes that wait for its events


class Leases:
    """The scripts, bound to a client."""

    def __init__(self, client: redis.Redis, *, lease: float, journal_ttl: float, journal_max: int) -> None:
        self._redis = client
        self._lease_ms = int(lease * 1000)
        self._ttl_ms = int(journal_ttl * 1000)
        self._journal_max = journal_max
        folder = resources.files("localai_q.bus") / "scripts"
        self._run = {name: client.register_script((folder / f"{name}.lua").read_text()) for name in SCRIPTS}

    def submit(self, job: Submission, *, longest_line: int) -> int:
        """Put the job into its line and return its place, from 1 (0 if it was known already).

        Raises:
            Busy: the line is full.
        """
        keys = [names.job_key(job.job_id), names.waiting_key(job.line)]
        args = [job.job_id, json.dumps(job.request, separators=(",", ":")), job.line, int(job.deadline * 1000),
                longest_line, int(job.lives * 1000), job.watcher, int(job.stream), job.attempt]  # fmt: skip
        with broker_errors():
            place = int(self._run["submit"](keys=keys, args=args))
        if place == 0:
            raise Busy(f"{longest_line} requests wait for this model already. Try again later.")
        return max(place, 0)

    def claim(self, job_id: str, line: str, *, owner: str, node_id: str) -> Lease | Refusal:
        """Take the job for `owner`, if it is to be had."""
        keys = [names.job_key(job_id), names.journal_key(job_id), names.waiting_key(line), names.leases_key(line)]
        lives = self._ttl_ms + 24 * 3600 * 1000
        answer = self._run["claim"](keys=keys, args=[job_id, owner, node_id, self._lease_ms, lives])
        if int(answer[0]) == 0:
            return Refusal(job_id=job_id, why=answer[1])
        attempt, last, request, stream, deaths, deadline = answer
        return Lease(
            job_id=job_id,
            line=line,
            attempt=int(attempt),
            last_index=int(last),
            request=json.loads(request),
            stream=stream == "1",
            deaths=int(deaths),
            deadline=int(deadline) / 1000,
        )

    def append(self, batches: Sequence[tuple[Lease, int, Sequence[Event]]]) -> list[Append]:
        """Write several jobs' events in one round trip: `(lease, first index, events)` each."""
        try:
            answers = self._append(batches)
        except redis.exceptions.NoScriptError:  # Redis has restarted since; it has run none of them
            self._redis.script_load(self._run["append"].script)
            answers = self._append(batches)
        return [Append(int(answer)) for answer in answers]

    def _append(self, batches: Sequence[tuple[Lease, int, Sequence[Event]]]) -> list[int]:
        # By hand, for redis-py's scripts ask with each pipeline whether Redis knows them: one more round trip per token.
        pipe = self._redis.pipeline(transaction=False)
        for lease, index, events in batches:
            keys = [names.job_key(lease.job_id), names.journal_key(lease.job_id)]
            args = [lease.job_id, lease.attempt, index, self._journal_max, *map(encode, events)]
            pipe.evalsha(self._run["append"].sha, len(keys), *keys, *args)
        answers: list[int] = pipe.execute()
        return answers

    def renew(self, leases: Sequence[Lease]) -> list[int]:
        """Keep these leases: for each 1 kept, 0 lost, 2 kept but to be cancelled."""
        if not leases:
            return []
        keys = [key for lease in leases for key in (names.job_key(lease.job_id), names.leases_key(lease.line))]
        args = [arg for lease in leases for arg in (lease.job_id, lease.attempt)]
        return [int(answer) for answer in self._run["renew"](keys=keys, args=[self._lease_ms, *args])]

    def finish(self, lease: Lease, index: int, end: End, *, node_id: str) -> bool:
        """End the job. False if it is not this owner's any more."""
        keys = [*self._job_keys(lease.job_id, lease.line), names.ends_key(node_id), names.NODES_WITH_ENDS]
        args = [lease.job_id, lease.attempt, index, encode(end), node_id, self._ttl_ms]
        return bool(self._run["finish"](keys=keys, args=args))

    def abort(self, job_id: str, line: str, end: End, *, force: bool = False) -> str | None:
        """End a job that nobody owns, or ask its owner to.

        Returns "ended", "asked" or None, when there was nothing to end.
        """
        keys = [*self._job_keys(job_id, line), names.ends_key(CONTROL), names.NODES_WITH_ENDS]
        args = [job_id, encode(end), self._ttl_ms, "force" if force else "", CONTROL]
        with broker_errors():
            answer = self._run["abort"](keys=keys, args=args)
        return {0: None, 1: "ended", 2: "asked"}[int(answer[0])]

    def release(self, lease: Lease, *, died: bool = False) -> bool:
        """Give the job back to its line; `died` when its owner could not go on because of its backend's death."""
        keys = [names.job_key(lease.job_id), names.waiting_key(lease.line), names.leases_key(lease.line)]
        return bool(self._run["release"](keys=keys, args=[lease.job_id, lease.attempt, int(died)]))

    def requeue_expired(self, line: str) -> list[str]:
        """Put the jobs of a line whose leases ran out back into it, and return their ids."""
        seconds, micros = self._redis.time()
        now = int(seconds) * 1000 + int(micros) // 1000
        expired = self._redis.zrangebyscore(names.leases_key(line), "-inf", now, start=0, num=1000)
        return [job_id for job_id in expired if self._requeue(job_id, line)]

    def requeue_of(self, owner: str, line: str) -> list[str]:
        """Put the jobs that this owner, who is known to be dead, held back into their line, and return their ids."""
        held = self._redis.zrange(names.leases_key(line), 0, -1)
        owners = {job_id: self._redis.hget(names.job_key(job_id), "owner") for job_id in held}
        return [job_id for job_id in held if owners[job_id] == owner and self._requeue(job_id, line, owner)]

    def _requeue(self, job_id: str, line: str, dead_owner: str = "") -> bool:
        keys = [names.job_key(job_id), names.waiting_key(line), names.leases_key(line)]
        return bool(self._run["requeue"](keys=keys, args=[job_id, dead_owner]))

    def waiting(self, line: str, *, older_than: float = 0.0) -> list[str]:
        """The jobs of a line that joined it more than so many seconds ago, the longest waiting first."""
        seconds, micros = self._redis.time()
        limit = int(seconds) * 1000 + int(micros) // 1000 - int(older_than * 1000)
        return list(self._redis.zrangebyscore(names.waiting_key(line), "-inf", limit, start=0, num=1000))

    def live(self, job_ids: Sequence[str]) -> dict[str, LiveState]:
        """What Redis knows of these jobs; those it does not know are left out."""
        pipe = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.hmget(names.job_key(job_id), ["state", "attempt", "node", "line", "watch"])
        with broker_errors():
            rows = pipe.execute() if job_ids else []
        return {
            job_id: LiveState(state=state, attempt=int(attempt), node_id=node, line=line, watchers=tuple(watch.split()))
            for job_id, (state, attempt, node, line, watch) in zip(job_ids, rows, strict=True)
            if state
        }

    def ends(self) -> dict[str, dict[str, str]]:
        """Ends that are still to be written down, by the node that wrote them: job id to `<attempt> <event>`."""
        nodes = sorted(self._redis.smembers(names.NODES_WITH_ENDS))
        return {node: self._redis.hgetall(names.ends_key(node)) for node in nodes}

    def forget_ends(self, node_id: str, job_ids: Sequence[str]) -> None:
        """Drop ends that have been written down."""
        if job_ids:
            self._redis.hdel(names.ends_key(node_id), *job_ids)

    @staticmethod
    def _job_keys(job_id: str, line: str) -> list[str]:
        return [names.job_key(job_id), names.journal_key(job_id), names.waiting_key(line), names.leases_key(line)]
