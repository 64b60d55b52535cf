"""A job's road on Redis: submit, claim, renew, append, finish, abort. Owns the scripts and the shape of their answers.

The Celery message is only a doorbell; what stands here is the truth about who works on what. A job's hash carries its
attempt number and its owner; every write of an owner names both and is refused by the script once they are not the job's
any more (a fencing token, as in Kleppmann's "How to do distributed locking"). The attempt alone would not do: a fail-over
of Redis can lose the last claim, and then its number is given out again. Times are compared with Redis' own clock.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import redis

from localai_q import names
from localai_q.bus.connection import answers, broker_errors
from localai_q.bus.scripting import script
from localai_q.cluster.events import End, Event, decode, encode
from localai_q.cluster.fleet import PATIENCE, Demand
from localai_q.cluster.jobs import Keep
from localai_q.errors import Busy

SCRIPTS = ("submit", "claim", "append", "renew", "finish", "abort", "release", "requeue", "restore")
DAY_MS = 24 * 3600 * 1000
AT_ONCE = 500  # jobs that are asked for in one go: between two, a web process lets its streams go on
CONTROL = "control"  # the name under which ends are kept that no node has written


class Append(IntEnum):
    """What became of a write of an owner."""

    WRITTEN = 1
    CANCEL = 2  # written, and the owner is asked to stop
    FENCED = 0  # the job has another owner, or none
    LOST = -1  # Redis lacks the job, its last claim, or the journal before the write: `restore`, and write again
    JOURNAL_FULL = -2


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job as it joins a line."""

    job_id: str
    line: str  # the queue whose consumers may take it
    request: dict[str, Any]
    watcher: str = ""  # the web process that waits for its events
    timeout: float = 0.0  # seconds in which it must end; 0: none
    lives: float = 3600.0  # seconds after which Redis forgets the job in any case
    stream: bool = False  # its events are shown to somebody while they come
    attempt: int = 0  # attempts that were made before Redis lost the job
    key_id: str = ""  # the key that asked, which alone may read the answer
    outline: dict[str, Any] = field(default_factory=dict)  # what the form of the answer depends on
    keep: Keep = Keep.NOT
    created: float = 0.0  # seconds since the epoch
    revision: int = 0  # of its model when it was accepted: a replica of an older one may not have it


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
    left: float | None = None  # seconds until its deadline, when the claim was made
    owner: str = ""
    epoch: str = ""  # another one later means that Redis has lost its data since
    fields: dict[str, str] = field(default_factory=dict, repr=False)  # the job's hash after the claim
    journal: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # id and event of every entry, with its marker


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A claim that failed."""

    job_id: str
    why: str  # unknown | ended | cancelled | late | leased | newer


@dataclass(frozen=True, kw_only=True)
class LiveState:
    """What Redis knows of a job now."""

    state: str  # waiting | leased | ended
    attempt: int
    node_id: str | None
    line: str
    watchers: tuple[str, ...] = ()  # web processes that wait for its events
    keep: Keep = Keep.NOT
    left: float | None = None  # when its last reader left, by Redis' clock


def _live(row: Sequence[Any]) -> LiveState | None:
    """What the fields of a job's hash say; None where there are none, or none of ours: nodes can write them."""
    try:
        state, attempt, node, line, watch, keep, left = row
        return state and LiveState(state=state, attempt=int(attempt), node_id=node, line=line, watchers=tuple(watch.split()),
                                   keep=Keep(keep), left=int(left) / 1000 if left else None)  # fmt: skip
    except (ValueError, TypeError, AttributeError):
        return None


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What reading a job's answer needs, and that there is one to read."""

    job_id: str
    key_id: str  # the key that may read it
    outline: dict[str, Any]  # of the request, as `GenerationRequest.outline` makes it; empty for a node's job
    line: str
    created: int  # seconds since the epoch
    left: float  # seconds until its deadline, when this was read


class Leases:
    """The scripts, bound to a client."""

    def __init__(self, client: redis.Redis, *, lease: float, journal_ttl: float, journal_max: int) -> None:
        self._redis = client
        self._lease_ms = int(lease * 1000)
        self._ttl_ms = int(journal_ttl * 1000)
        self._open_journal_ms = self._ttl_ms + DAY_MS
        self._journal_max = journal_max
        self._run = {name: script(client, name) for name in SCRIPTS}

    def submit(self, job: Submission, *, longest_line: int) -> int:
        """Put the job into its line and return its place, from 1 (0 if it was known already).

        Raises:
            Busy: the line is full.
        """
        keys = [names.job_key(job.job_id), names.waiting_key(job.line)]
        args = [job.job_id, json.dumps(job.request, separators=(",", ":")), job.line, int(job.timeout * 1000),
                longest_line, int(job.lives * 1000), job.watcher, int(job.stream), job.attempt, job.key_id,
                json.dumps(job.outline, separators=(",", ":")), job.keep, int(job.created), job.revision]  # fmt: skip
        with broker_errors():
            place = int(self._run["submit"](keys=keys, args=args))
        if place == 0:
            raise Busy(f"{longest_line} requests wait for this model already. Try again later.")
        return max(place, 0)

    def claim(self, job_id: str, line: str, *, owner: str, node_id: str, revision: int = 0) -> Lease | Refusal:
        """Take the job for `owner`, who serves this revision of its model, if it is to be had."""
        keys = [*self._job_keys(job_id, line), names.EPOCH]
        args = [job_id, owner, node_id, self._lease_ms, self._open_journal_ms, names.new_id(), revision]
        answer = self._run["claim"](keys=keys, args=args)
        if int(answer[0]) == 0:
            return Refusal(job_id=job_id, why=answer[1])
        _, last, epoch, flat, journal, left = answer
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        return Lease(
            job_id=job_id,
            line=line,
            attempt=int(fields["attempt"]),
            last_index=int(last),
            request=json.loads(fields["request"]),
            stream=fields["stream"] == "1",
            deaths=int(fields.get("deaths", 0)),
            left=int(left) / 1000 if left is not None else None,
            owner=owner,
            epoch=epoch,
            fields=fields,
            journal=tuple((place, entry[1]) for place, entry in journal),
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
            args = [lease.job_id, lease.attempt, lease.owner, index, self._journal_max, *map(encode, events)]
            pipe.evalsha(self._run["append"].sha, len(keys), *keys, *args)
        answers: list[int] = pipe.execute()
        return answers

    def renew(self, leases: Sequence[Lease]) -> list[Append]:
        """Keep these leases."""
        if not leases:
            return []
        keys = [key for lease in leases for key in (names.job_key(lease.job_id), names.leases_key(lease.line))]
        args = [arg for lease in leases for arg in (lease.job_id, lease.attempt, lease.owner)]
        return [Append(int(answer)) for answer in self._run["renew"](keys=keys, args=[self._lease_ms, *args])]

    def finish(self, lease: Lease, index: int, end: End, *, node_id: str) -> Append:
        """End the job."""
        keys = [*self._job_keys(lease.job_id, lease.line), names.ends_key(node_id)]
        args = [lease.job_id, lease.attempt, lease.owner, index, encode(end), node_id, self._ttl_ms]
        return Append(int(self._run["finish"](keys=keys, args=args)))

    def restore(self, lease: Lease, events: Sequence[Event]) -> Lease | None:
        """Give Redis back what it has lost of this owner's job: `events` are those that its attempt has written.

        Returns the lease that goes on, or None: the job is over or somebody else's.
        """
        own = [(f"{lease.attempt}-{index}", encode(event)) for index, event in enumerate(events, lease.last_index + 1)]
        deadline = int(lease.fields["deadline"])
        expires = deadline + self._ttl_ms if deadline else 0
        known = {name: value for name, value in lease.fields.items() if name != "left"}  # readers may have come back
        fields = [part for pair in known.items() for part in pair]
        entries = [part for pair in (*lease.journal, *own) for part in pair]
        keys = [*self._job_keys(lease.job_id, lease.line), names.EPOCH]
        args = [lease.job_id, lease.attempt, lease.owner, lease.epoch, names.new_id(), self._lease_ms,
                self._open_journal_ms, expires, len(fields), *fields, *entries]  # fmt: skip
        epoch = self._run["restore"](keys=keys, args=args)
        return replace(lease, epoch=epoch) if epoch else None

    def abort(
        self, job_id: str, line: str, end: End, *, force: bool = False, by: str = CONTROL, pause: bool = False
    ) -> str | None:
        """End a job that nobody owns, or ask its owner to.

        Args:
            force: end it, whoever owns it.
            by: under whose name the end is kept.
            pause: its owner is to keep what there is of it, for another job that goes on with that.

        Returns "ended", "asked" or None, when there was nothing to end.
        """
        keys = [*self._job_keys(job_id, line), names.ends_key(by)]
        args = [job_id, encode(end), self._ttl_ms, "force" if force else "", by, "pause" if pause else "1"]
        with broker_errors():
            answer = self._run["abort"](keys=keys, args=args)
        return {0: None, 1: "ended", 2: "asked"}[int(answer[0])]

    def asked(self, job_id: str) -> End | None:
        """The end that the owner of a job was asked to give it, if he was."""
        with broker_errors():
            text = self._redis.hget(names.job_key(job_id), "end")
        event = decode(text) if text else None
        return event if isinstance(event, End) else None

    def release(self, lease: Lease, *, died: bool = False) -> Append:
        """Give the job back to its line; `died` when its owner could not go on because of its backend's death."""
        keys = [names.job_key(lease.job_id), names.waiting_key(lease.line), names.leases_key(lease.line)]
        args = [lease.job_id, lease.attempt, lease.owner, int(died)]
        return Append(int(self._run["release"](keys=keys, args=args)))

    def requeue_expired(self, line: str) -> dict[str, int]:
        """Put the jobs of a line whose leases ran out back into it; how many owners each has lost, by its id."""
        seconds, micros = self._redis.time()
        now = int(seconds) * 1000 + int(micros) // 1000
        expired = self._redis.zrangebyscore(names.leases_key(line), "-inf", now, start=0, num=1000)
        return {job_id: deaths for job_id in expired if (deaths := self._requeue(job_id, line))}

    def requeue_of(self, owner: str, line: str) -> dict[str, int]:
        """As `requeue_expired`, for the jobs that this owner held, who is known to be dead.

        `owner` is what its processes had in common: the part of their names before the point.
        """
        held = self._owners([line])
        dead = {job_id: name for job_id, name in held.items() if name.partition(".")[0] == owner}
        return {job_id: deaths for job_id, name in dead.items() if (deaths := self._requeue(job_id, line, name))}

    def held(self, line: str) -> int:
        """How many jobs of a line somebody works on."""
        with broker_errors():
            return int(self._redis.zcard(names.leases_key(line)))

    def _requeue(self, job_id: str, line: str, dead_owner: str = "") -> int:
        keys = [names.job_key(job_id), names.waiting_key(line), names.leases_key(line)]
        return int(self._run["requeue"](keys=keys, args=[job_id, dead_owner]))

    def waiting(self, line: str, *, older_than: float = 0.0) -> list[str]:
        """The jobs of a line that joined it more than so many seconds ago, the longest waiting first."""
        seconds, micros = self._redis.time()
        limit = int(seconds) * 1000 + int(micros) // 1000 - int(older_than * 1000)
        return list(self._redis.zrangebyscore(names.waiting_key(line), "-inf", limit, start=0, num=1000))

    def places(self, lines: Mapping[str, str]) -> dict[str, int]:
        """The places, from 1, of those of these jobs that wait in their lines (the values)."""
        pipe = self._redis.pipeline(transaction=False)
        for job_id, line in lines.items():
            pipe.zrank(names.waiting_key(line), job_id)
        with broker_errors():
            ranks = pipe.execute() if lines else []
        return {job_id: rank + 1 for job_id, rank in zip(lines, ranks, strict=True) if rank is not None}

    def demand(self, lines: Sequence[str]) -> dict[str, Demand]:
        """Who waits in each of these lines."""
        seconds, micros = self._redis.time()
        now = int(seconds) * 1000 + int(micros) // 1000
        pipe = self._redis.pipeline(transaction=False)
        for line in lines:
            pipe.zcard(names.waiting_key(line))
            pipe.zcount(names.waiting_key(line), "-inf", now - int(PATIENCE * 1000))
            pipe.zrange(names.waiting_key(line), 0, 0, withscores=True)
        with broker_errors():
            found = pipe.execute()
        return {
            line: Demand(
                waiting=waiting, late=late, longest=max((now - score) / 1000 for _, score in first or [("", now)])
            )
            for line, waiting, late, first in zip(lines, found[::3], found[1::3], found[2::3], strict=True)
        }

    def owners(self, lines: Sequence[str]) -> Counter[str]:
        """How many jobs of these lines each owner works on. `requeue_of` says what an owner is."""
        with broker_errors():
            return Counter(name.partition(".")[0] for name in self._owners(lines).values())

    def at_work(self, line: str) -> tuple[dict[str, str], int]:
        """Whose the jobs of a line are that somebody works on (the owners, as in `owners`), and how many jobs wait."""
        with broker_errors():
            held = {job_id: name.partition(".")[0] for job_id, name in self._owners([line]).items()}
            return held, int(self._redis.zcard(names.waiting_key(line)))

    def holders(self, job_ids: Sequence[str]) -> dict[str, str | None]:
        """Who worked on each of these jobs last; None for one that waits. Those that Redis does not know are left out."""
        pipe = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.hmget(names.job_key(job_id), ["state", "owner"])
        with broker_errors():
            rows = pipe.execute() if job_ids else []
        return {
            job_id: None if state == "waiting" else (owner or "").partition(".")[0]
            for job_id, (state, owner) in zip(job_ids, rows, strict=True)
            if state
        }

    def _owners(self, lines: Sequence[str]) -> dict[str, str]:
        """Whose the jobs of these lines are that somebody works on."""
        pipe = self._redis.pipeline(transaction=False)
        for line in lines:
            pipe.zrange(names.leases_key(line), 0, -1)
        held = [job_id for job_ids in pipe.execute() for job_id in job_ids] if lines else []
        found: list[str | None] = []
        for start in range(0, len(held), AT_ONCE):
            for job_id in held[start : start + AT_ONCE]:
                pipe.hget(names.job_key(job_id), "owner")
            found += pipe.execute()
        return {job_id: name for job_id, name in zip(held, found, strict=True) if name}

    def live(self, job_ids: Sequence[str]) -> dict[str, LiveState]:
        """What Redis knows of these jobs; those it does not know are left out."""
        pipe = self._redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.hmget(names.job_key(job_id), ["state", "attempt", "node", "line", "watch", "keep", "left"])
        with broker_errors():
            rows = answers(pipe) if job_ids else []
        found = {job_id: _live(row) for job_id, row in zip(job_ids, rows, strict=True)}
        return {job_id: state for job_id, state in found.items() if state}

    def kept(self, job_id: str) -> Kept | None:
        """What reading the job's answer needs; None if Redis does not know it."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.hmget(names.job_key(job_id), ["state", "key", "outline", "line", "created", "deadline"])
        pipe.exists(names.journal_key(job_id))
        pipe.time()
        with broker_errors():
            (state, key_id, outline, line, created, deadline), has_journal, (seconds, _) = pipe.execute()
        if not state or (state == "ended" and not has_journal):
            return None
        return Kept(
            job_id=job_id,
            key_id=key_id,
            outline=json.loads(outline),
            line=line,
            created=int(created),
            left=int(deadline) / 1000 - int(seconds),
        )

    def ends(self, node_ids: Iterable[str]) -> dict[str, dict[str, str]]:
        """Ends that are still to be written down, by the node that wrote them: job id to `<attempt> <event>`."""
        writers = [*node_ids, CONTROL]
        pipe = self._redis.pipeline(transaction=False)
        for writer in writers:
            pipe.hgetall(names.ends_key(writer))
        return {writer: ends for writer, ends in zip(writers, answers(pipe), strict=True) if ends}

    def forget_ends(self, node_id: str, job_ids: Sequence[str]) -> None:
        """Drop ends that have been written down."""
        if job_ids:
            self._redis.hdel(names.ends_key(node_id), *job_ids)

    @staticmethod
    def _job_keys(job_id: str, line: str) -> list[str]:
        return [names.job_key(job_id), names.journal_key(job_id), names.waiting_key(line), names.leases_key(line)]
