"""Reading a job's journal: entries in order, without gap or repetition, live and from the log.

Announcements come over one pub/sub connection per process and may be lost; the log in Redis is the truth. A reader
accepts the next index only; on a gap, a reconnect, an overflow or a silence it reads the log. Writing is in
`localai_q.bus.leases`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import redis

from localai_q import names
from localai_q.bus import presence
from localai_q.bus.connection import broker_errors
from localai_q.cluster.events import End, Event, decode

log = logging.getLogger(__name__)

QUEUE_SIZE = 256  # announcements kept for a reader that is slow; beyond that it reads the log
SILENCE = 1.0  # seconds after which a reader looks into the log
RECHECK = ""  # an announcement may have been missed


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One event of a journal, with its place."""

    attempt: int
    index: int
    event: Event

    @property
    def id(self) -> str:
        return f"{self.attempt}-{self.index}"


def read(client: redis.Redis, job_id: str, after: tuple[int, int] = (0, 0)) -> list[Entry]:
    """The entries behind `after` (attempt, index), markers left out."""
    start = f"({after[0]}-{after[1]}" if after != (0, 0) else "-"
    with broker_errors():
        rows = client.xrange(names.journal_key(job_id), min=start)
    entries = (_entry(place, fields["e"]) for place, fields in rows)
    return [entry for entry in entries if entry]


def latest(client: redis.Redis, job_ids: list[str]) -> dict[str, Event]:
    """The newest event of each job that has one."""
    pipe = client.pipeline(transaction=False)
    for job_id in job_ids:
        pipe.xrevrange(names.journal_key(job_id), count=1)
    with broker_errors():
        answers = pipe.execute() if job_ids else []
    events = {job: decode(rows[0][1]["e"]) for job, rows in zip(job_ids, answers, strict=True) if rows}
    return {job: event for job, event in events.items() if event}


class Listener:
    """The one pub/sub connection of a web process, and the readers that wait on it."""

    def __init__(self, client: redis.Redis) -> None:
        self.watcher = names.new_id()
        self._redis = client
        self._readers: dict[str, list[queue.Queue[str]]] = {}
        self._lock = threading.Lock()
        self._announce()  # before the first job can name this process as its watcher
        threading.Thread(target=self._run, name="journal-listener", daemon=True).start()

    def open(self, job_id: str) -> Reader:
        """A reader of the job's announcements from now on. Close it."""
        inbox: queue.Queue[str] = queue.Queue(maxsize=QUEUE_SIZE)
        with self._lock:
            self._readers.setdefault(job_id, []).append(inbox)
        return Reader(self, self._redis, job_id, inbox)

    def close(self, job_id: str, inbox: queue.Queue[str]) -> None:
        with self._lock:
            left = [other for other in self._readers.get(job_id, []) if other is not inbox]
            if left:
                self._readers[job_id] = left
            else:
                self._readers.pop(job_id, None)

    @property
    def open_readers(self) -> int:
        return sum(map(len, self._readers.values()))

    def _run(self) -> None:
        while True:
            try:
                self._listen()
            except (redis.RedisError, OSError) as error:
                log.warning("lost the announcements of tokens, connecting again: %s", error)
                time.sleep(0.2)

    def _announce(self) -> None:
        try:
            presence.announce(self._redis, self.watcher)
        except (redis.RedisError, OSError) as error:
            log.warning("cannot show that this process is there: %s", error)

    def _listen(self) -> None:
        due = 0.0
        with self._redis.pubsub() as pubsub:
            pubsub.subscribe(f"web:{self.watcher}")
            while True:
                if time.monotonic() >= due:
                    presence.announce(self._redis, self.watcher)
                    due = time.monotonic() + presence.REFRESHED
                message = pubsub.get_message(timeout=max(due - time.monotonic(), 0.01))
                if message is None:
                    continue
                # redis-py subscribes again after a cut without a word: this message is the only trace of it.
                if message["type"] == "subscribe":
                    self._recheck_all()
                elif message["type"] == "message":
                    self._deliver(message["data"])

    def _deliver(self, announcement: str) -> None:
        job_id, _, rest = announcement.partition(" ")
        for inbox in self._readers.get(job_id, ()):
            _put(inbox, rest)

    def _recheck_all(self) -> None:
        with self._lock:
            inboxes = [inbox for readers in self._readers.values() for inbox in readers]
        for inbox in inboxes:
            _put(inbox, RECHECK)


def _put(inbox: queue.Queue[str], item: str) -> None:
    try:
        inbox.put_nowait(item)
    except queue.Full:  # the reader finds the gap by the next index, or by its own look into the log
        return


class Reader:
    """Follows one job."""

    def __init__(self, listener: Listener, client: redis.Redis, job_id: str, inbox: queue.Queue[str]) -> None:
        self._listener = listener
        self._redis = client
        self._job_id = job_id
        self._inbox = inbox
        self._place = (0, 0)
        self._started = False

    def close(self) -> None:
        self._listener.close(self._job_id, self._inbox)

    def wake(self) -> None:
        """Have a waiting `entries` look up at once, e.g. because its client has gone."""
        _put(self._inbox, RECHECK)

    def entries(self, after: tuple[int, int] = (0, 0)) -> Iterator[Entry | None]:
        """Entries behind `after` in order, up to and with the end; None after each second without one."""
        self._place = after
        self._started = after == (0, 0)  # a new job's first announcement is its first entry
        while True:
            for entry in self._next():
                yield entry
                if entry and isinstance(entry.event, End):
                    return

    def _next(self) -> list[Entry | None]:
        if not self._started:
            self._started = True
            return list(self._from_log())
        try:
            announcement = self._inbox.get(timeout=SILENCE)
        except queue.Empty:
            announcement = RECHECK
        if announcement != RECHECK:
            place, _, text = announcement.partition(" ")
            entry = _entry(place, text)
            if entry is None or entry.index <= self._place[1]:
                return []
            # Indexes run on across attempts, so the next index is the next entry whoever wrote it.
            if entry.index == self._place[1] + 1:
                self._place = (entry.attempt, entry.index)
                return [entry]
        return [*self._from_log()] or [None]

    def _from_log(self) -> Iterator[Entry]:
        for entry in read(self._redis, self._job_id, self._place):
            self._place = (entry.attempt, entry.index)
            yield entry


def _entry(place: str, text: str) -> Entry | None:
    event = decode(text)
    attempt, _, index = place.partition("-")
    return Entry(attempt=int(attempt), index=int(index), event=event) if event else None
