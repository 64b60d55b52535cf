"""Work that this process holds a lease on: claimed, kept alive, written to its journal, ended once.

One `Claims` per process. Three threads serve all its jobs: one renews leases, one writes what the jobs emit (coalesced,
pipelined, first token at once), one hears of cancellations. What the work is, is the business of whoever claims.

What a job has written stays in memory until its end. Where Redis turns out to have lost the job or a part of its journal,
it is given that back, and the write is made again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import redis

from localai_q import names
from localai_q.bus.leases import Append, Lease, Leases, Refusal
from localai_q.cluster.events import Delta, End, Event, decode
from localai_q.cluster.states import JobState
from localai_q.errors import Cancelled, GenerationFailed, Unavailable, to_record

log = logging.getLogger(__name__)

FLUSH = 0.020  # seconds between two writes of a job's tokens; the first token is not held back
RETRY = 0.5  # seconds between tries while Redis is away
FINISH_TRIES = 1200  # an end is tried for ten minutes


def journal_full() -> GenerationFailed:
    """The answer is longer than a journal may be."""
    return GenerationFailed("The request's journal is full; see LOCALAI_Q_JOURNAL_MAX.")


def _cancelled() -> End:
    return End(state=JobState.CANCELLED, error=to_record(Cancelled()))


def _cut_off() -> End:
    return End(state=JobState.FAILED, error=to_record(journal_full()))


class Held:
    """One job that this process works on."""

    def __init__(self, claims: Claims, lease: Lease) -> None:
        self.lease = lease
        self.cancelled = threading.Event()  # stop: the owner asked, the lease is lost, or the journal is full
        self.why = ""  # why it was cancelled: cancelled | lost | journal
        self.pending: list[Event] = []
        self.unsure: list[Event] = []  # may have been written when the connection broke: tried again just as it was
        self.written: list[Event] = []
        self.has_hole = False  # the journal was full, and something is missing from it
        self._claims = claims
        self._on_cancel: Callable[[], object] | None = None

    @property
    def index(self) -> int:
        """The place of the next entry."""
        return self.lease.last_index + 1 + len(self.written)

    def emitted(self) -> list[Event]:
        """What earlier attempts at the job have emitted."""
        return [event for _, text in self.lease.journal if (event := decode(text))]

    def emit(self, event: Event) -> None:
        """Have the event written; returns at once."""
        self._claims.enqueue(self, event)

    def finish(self, end: End) -> bool:
        """Write what is pending and the end. False if the job is not ours any more."""
        return self._claims.finish(self, end)

    def asked(self) -> End:
        """The end that whoever cancelled the job has given it."""
        return self._claims.asked(self.lease.job_id)

    def release(self, *, died: bool = False) -> None:
        """Give the job back to its line."""
        self._claims.release(self, died=died)

    def cancel(self, why: str) -> None:
        """Stop working on the job."""
        if not self.cancelled.is_set():
            self.why = why
            self.cancelled.set()
            if self._on_cancel:
                self._on_cancel()

    def on_cancel(self, callback: Callable[[], object]) -> None:
        """Call this, from another thread, when the job must stop; at once if it must already."""
        self._on_cancel = callback
        if self.cancelled.is_set():
            callback()


class Claims:
    """The leases of this process. `revision`: of the model that it serves, if it serves one."""

    def __init__(
        self, client: Any, leases: Leases, *, owner: str, node_id: str, lease: float, revision: int = 0
    ) -> None:
        self._redis = client
        self._leases = leases
        self._owner = f"{owner}.{names.new_id()}"  # another one for each process, even of the same owner
        self._node_id = node_id
        self._revision = revision
        self._renew_every = min(lease / 3, 2.0)
        self._held: dict[str, Held] = {}
        self._lock = threading.Lock()
        self._io = threading.Lock()  # writes of one job keep their order
        self._dirty = threading.Event()
        self._first = threading.Event()
        for target in (self._renew_loop, self._flush_loop, self._cancel_loop):
            threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True).start()

    def claim(self, job_id: str, line: str) -> Held | Refusal:
        """Take the job, if it is to be had."""
        answer = self._leases.claim(job_id, line, owner=self._owner, node_id=self._node_id, revision=self._revision)
        if isinstance(answer, Refusal):
            if answer.why == "cancelled":  # its owner died after it was asked to stop, and nobody else would end it
                self._leases.abort(job_id, line, self._leases.asked(job_id) or _cancelled(), by=self._node_id)
            return answer
        held = Held(self, answer)
        with self._lock:
            self._held[job_id] = held
        return held

    def count(self) -> int:
        """How many jobs this process works on."""
        return len(self._held)

    def enqueue(self, held: Held, event: Event) -> None:
        if held.has_hole:
            return
        with self._lock:
            first = not held.written and not held.pending
            last = held.pending[-1] if held.pending else None
            if isinstance(last, Delta) and isinstance(event, Delta) and last.joins(event):
                held.pending[-1] = last.join(event)
            else:
                held.pending.append(event)
        if first:
            self._first.set()
        self._dirty.set()

    def finish(self, held: Held, end: End) -> bool:
        def write() -> Append:
            self._write([held])
            if held.unsure:
                return Append.LOST
            true = _cut_off() if held.has_hole and end.state == JobState.DONE else end
            return self._leases.finish(held.lease, held.index, true, node_id=self._node_id)

        for _ in range(FINISH_TRIES):
            try:
                return self._leave(held, write)
            except (redis.RedisError, OSError) as error:
                log.warning("the end of job %s cannot be written yet: %s", held.lease.job_id, error)
                time.sleep(RETRY)
        self.drop(held)
        return False

    def asked(self, job_id: str) -> End:
        for _ in range(FINISH_TRIES):
            try:
                return self._leases.asked(job_id) or _cancelled()
            except Unavailable as error:
                log.warning("why job %s was cancelled cannot be read yet: %s", job_id, error)
                time.sleep(RETRY)
        return _cancelled()

    def release(self, held: Held, *, died: bool) -> None:
        def write() -> Append:
            self._write([held])
            return self._leases.release(held.lease, died=died)

        try:
            self._leave(held, write)
        except (redis.RedisError, OSError) as error:
            log.warning("job %s cannot be given back, its lease will run out: %s", held.lease.job_id, error)
            self.drop(held)

    def _leave(self, held: Held, write: Callable[[], Append]) -> bool:
        """Make this last write of a job, and let go of it. False if the job is not ours any more."""
        with self._io:
            while (answer := write()) is Append.LOST and self._restore(held):
                continue
            self.drop(held)
        return answer is Append.WRITTEN

    def cancel_all(self, why: str) -> None:
        """Stop all work, e.g. because the process must end."""
        for held in self.held():
            held.cancel(why)

    def held(self) -> list[Held]:
        with self._lock:
            return list(self._held.values())

    def drop(self, held: Held) -> None:
        """Let go of a job that is not ours any more."""
        with self._lock:
            self._held.pop(held.lease.job_id, None)

    def _flush_loop(self) -> None:
        while True:
            self._dirty.wait()
            self._dirty.clear()
            self._first.clear()
            try:
                with self._io:
                    self._write(self.held())
            except (redis.RedisError, OSError) as error:
                log.warning("tokens cannot be written yet: %s", error)
                time.sleep(RETRY)
            self._first.wait(FLUSH)

    def _write(self, jobs: list[Held]) -> None:
        """Write what these jobs have pending. What could not be written is pending again, in its order."""
        lost = self._append(jobs)
        for held in lost:
            self._restore(held)
        self._append(lost)

    def _append(self, jobs: list[Held]) -> list[Held]:
        """Write what these jobs have pending, and return those that Redis has lost."""
        batches = [(held, events) for held in jobs if (events := self._take(held))]
        if not batches:
            return []
        try:
            answers = self._leases.append([(held.lease, held.index, events) for held, events in batches])
        except (redis.RedisError, OSError):
            for held, events in batches:
                self._put_back(held, events)
            raise
        for (held, events), answer in zip(batches, answers, strict=True):
            self._note(held, events, answer)
        return [held for (held, _), answer in zip(batches, answers, strict=True) if answer is Append.LOST]

    def _take(self, held: Held) -> list[Event]:
        with self._lock:
            events, held.pending, held.unsure = held.unsure + held.pending, [], []
        return events

    def _put_back(self, held: Held, events: list[Event]) -> None:
        with self._lock:
            held.unsure = events
        self._dirty.set()

    def _note(self, held: Held, events: list[Event], answer: Append) -> None:
        match answer:
            case Append.WRITTEN | Append.CANCEL:
                held.written += events
            case Append.LOST:
                self._put_back(held, events)
            case Append.JOURNAL_FULL:
                held.has_hole = True
                held.cancel("journal")
                self._take(held)  # what comes behind a hole would make a wrong text
        self._heed(held, answer)

    def _heed(self, held: Held, answer: Append) -> None:
        """Stop the work if Redis said so."""
        if answer is Append.CANCEL:
            held.cancel("cancelled")
        elif answer is Append.FENCED:
            held.cancel("lost")

    def _restore(self, held: Held) -> bool:
        """Give Redis back what it has lost of a job. False if the job is not ours any more; then nothing is pending."""
        lease = self._leases.restore(held.lease, held.written)
        if lease is None:
            self._take(held)
            held.cancel("lost")
            return False
        log.warning("Redis had lost job %s or a part of its journal", held.lease.job_id, extra={"action": "restore"})
        held.lease = lease
        return True

    def _renew_loop(self) -> None:
        while True:
            time.sleep(self._renew_every)
            held = self.held()
            try:
                answers = self._leases.renew([each.lease for each in held])
                for each, answer in zip(held, answers, strict=True):
                    self._heed(each, answer)
                self._restore_all([each for each, answer in zip(held, answers, strict=True) if answer is Append.LOST])
            except (redis.RedisError, OSError) as error:
                log.warning("leases cannot be renewed yet: %s", error)

    def _restore_all(self, lost: list[Held]) -> None:
        for held in lost:
            with self._io:
                if held in self.held():  # it may have ended meanwhile
                    self._restore(held)

    def _cancel_loop(self) -> None:
        while True:
            try:
                with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
                    pubsub.subscribe(names.cancel_channel(self._node_id))
                    while True:
                        message = pubsub.get_message(timeout=5.0)
                        if message:
                            self._cancel_one(str(message["data"]))
            except (redis.RedisError, OSError) as error:
                log.warning("lost the channel of cancellations, connecting again: %s", error)
                time.sleep(RETRY)

    def _cancel_one(self, job_id: str) -> None:
        with self._lock:
            held = self._held.get(job_id)
        if held:
            held.cancel("cancelled")
