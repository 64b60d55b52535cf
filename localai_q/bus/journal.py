"""Reading a job's journal: entries in order, without gap or repetition, live and from the log.

Announcements come over one pub/sub connection per process and may be lost; the log in Redis is the truth. A reader
accepts the next index only; on a gap, a reconnect, an overflow or a silence it reads the log, and by the same script
says again that this process waits for the job. Writing is in `localai_q.bus.leases`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import redis

from localai_q import names
from localai_q.bus import presence
from localai_q.bus.connection import answers, broker_errors
from localai_q.bus.scripting import script
from localai_q.cluster.events import End, Event, decode
from localai_q.cluster.jobs import Keep
from localai_q.errors import GenerationFailed, Unavailable

log = logging.getLogger(__name__)

QUEUE_SIZE = 256  # announcements kept for a reader that is slow; beyond that it reads the log
SILENCE = 1.0  # seconds after which a reader looks into the log; each further look of a silence waits twice as long
LONGEST_SILENCE = 8  # SILENCEs between two looks at most
PAGE = 500  # entries read from the log at once
UNKNOWN = 2  # what the script `detach` answers for a job that Redis does not know
RECHECK = ""  # an announcement may have been missed
UNREADABLE = "The replica has written what cannot be read."
LOST = "The queue (Redis) lost a part of this stream that was sent already."

Place = tuple[int, int]  # attempt and index of an entry; (0, 0) is before the first


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One event of a journal, with its place."""

    attempt: int
    index: int
    event: Event

    @property
    def id(self) -> str:
        return f"{self.attempt}-{self.index}"

    @property
    def place(self) -> Place:
        return self.attempt, self.index


def at(client: redis.Redis, job_id: str, place: Place) -> Entry | None:
    """The entry of this place, if the journal has it."""
    found = f"{place[0]}-{place[1]}"
    with broker_errors():
        rows = client.xrange(names.journal_key(job_id), min=found, max=found)
    return _entry(found, rows[0][1]["e"]) if rows else None


def tail(client: redis.Redis, job_id: str, count: int) -> list[Entry]:
    """The newest entries of a job, so many at most, in their order."""
    with broker_errors():
        rows = client.xrevrange(names.journal_key(job_id), count=count)
    found = [(place, _readable(fields)) for place, fields in reversed(rows)]
    return [_placed(place, event) for place, event in found if event]


def latest(client: redis.Redis, job_ids: list[str]) -> dict[str, Event]:
    """The newest event of each job that has one."""
    pipe = client.pipeline(transaction=False)
    for job_id in job_ids:
        pipe.xrevrange(names.journal_key(job_id), count=1)
    with broker_errors():
        found = answers(pipe) if job_ids else []
    events = {job: _readable(rows[0][1]) for job, rows in zip(job_ids, found, strict=True) if rows}
    return {job: event for job, event in events.items() if event}


class Listener:
    """The one pub/sub connection of a web process, and the readers that wait on it."""

    def __init__(self, client: redis.Redis) -> None:
        self.watcher = names.new_id()
        self._redis = client
        self._attach = script(client, "attach")
        self._detach = script(client, "detach")
        self._readers: dict[str, list[queue.Queue[str]]] = {}
        self._lock = threading.Lock()
        self._stopping = False
        self._announce()  # before the first job can name this process as its watcher
        threading.Thread(target=self._run, name="journal-listener", daemon=True).start()

    def stop(self) -> None:
        """Hear nothing any more: this process ends."""
        self._stopping = True

    def open(self, job_id: str) -> Reader:
        """A reader of the job's announcements from now on. Close it."""
        inbox: queue.Queue[str] = queue.Queue(maxsize=QUEUE_SIZE)
        with self._lock:
            self._readers.setdefault(job_id, []).append(inbox)
        return Reader(self, job_id, inbox)

    def close(self, job_id: str, inbox: queue.Queue[str]) -> None:
        with self._lock:
            left = [other for other in self._readers.get(job_id, []) if other is not inbox]
            if left:
                self._readers[job_id] = left
            else:
                self._readers.pop(job_id, None)

    def attach(self, job_id: str, after: Place) -> list[tuple[str, str]]:
        """Wait for the job's events, and get what its log has behind a place: up to `PAGE` pairs of id and event.

        Raises:
            GenerationFailed: the log has not got that place any more, and others in its stead.
        """
        keys = [names.job_key(job_id), names.journal_key(job_id)]
        with broker_errors():
            rows = self._attach(keys=keys, args=[self.watcher, f"{after[0]}-{after[1]}", PAGE])
        if rows is None:
            raise GenerationFailed(LOST)
        return [(place, fields[1]) for place, fields in rows]

    def detach(self, job_id: str) -> Keep | None:
        """Wait for the job no more, unless another reader here does.

        Returns:
            What is to become of the job if nobody waits for it now, else None.

        Raises:
            Unavailable: Redis does not know the job; its owner may be about to restore it.
        """
        if job_id in self._readers:
            return None
        with broker_errors():
            answer = self._detach(keys=[names.job_key(job_id)], args=[self.watcher])
        if int(answer[0]) == UNKNOWN:
            raise Unavailable("The queue (Redis) does not know this job.")
        return Keep(answer[1]) if int(answer[0]) else None

    @property
    def open_readers(self) -> int:
        return sum(map(len, self._readers.values()))

    def _run(self) -> None:
        while not self._stopping:
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
            while not self._stopping:
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

    def __init__(self, listener: Listener, job_id: str, inbox: queue.Queue[str]) -> None:
        self._listener = listener
        self._job_id = job_id
        self._inbox = inbox
        self._place: Place = (0, 0)
        self._silent = 0  # SILENCEs since the last entry

    def close(self) -> None:
        self._listener.close(self._job_id, self._inbox)

    def wake(self) -> None:
        """Have a waiting `entries` look up at once, e.g. because its client has gone."""
        _put(self._inbox, RECHECK)

    def entries(self, *, after: Place = (0, 0), fresh: bool = False) -> Iterator[Entry | None]:
        """The entries behind a place in order, up to and with the end; None after each second without one.

        Args:
            fresh: nobody has worked on the job yet, so its first announcement is its first entry.

        Raises:
            GenerationFailed: Redis has lost entries that were read already, and others stand in their place; or the log has
                what cannot be read.
        """
        self._place = after
        if not fresh:
            _put(self._inbox, RECHECK)
        while True:
            for entry in self._next():
                yield entry
                if entry and isinstance(entry.event, End):
                    return

    def _next(self) -> Iterable[Entry | None]:
        try:
            announcement = self._inbox.get(timeout=SILENCE)
        except queue.Empty:
            return self._in_silence()
        if announcement == RECHECK:
            return self._from_log()
        place, _, text = announcement.partition(" ")
        try:
            entry = _entry(place, text)
        except GenerationFailed:  # what the log has counts, not what was announced
            return self._from_log()
        # Indexes run on across attempts. What another attempt wrote must go on from what was read, which the log knows.
        if entry and entry.index == self._place[1] + 1 and entry.attempt == (self._place[0] or entry.attempt):
            return [self._take(entry)]
        return self._from_log() if entry and self._is_news(entry) else ()

    def _in_silence(self) -> Iterable[Entry | None]:
        """A look into the log, ever more rarely: announcements that were lost one by one show as gaps."""
        self._silent += 1
        if self._silent & (self._silent - 1) == 0 or self._silent % LONGEST_SILENCE == 0:
            return self._from_log()
        return (None,)

    def _from_log(self) -> Iterator[Entry | None]:
        before = looked = self._place
        while rows := self._look(looked):
            for place, text in rows:
                entry = _entry(place, text)
                if entry and self._is_news(entry):
                    yield self._take(entry)
            if len(rows) < PAGE:
                break
            looked = _place(rows[-1][0])  # which need not be that of an event
        if self._place == before:
            yield None

    def _look(self, after: Place) -> list[tuple[str, str]]:
        """What the log has behind a place; nothing while Redis is away, for it comes back."""
        try:
            return self._listener.attach(self._job_id, after)
        except Unavailable as error:
            log.warning("job %s cannot be read at the moment: %s", self._job_id, error)
            return []

    def _is_news(self, entry: Entry) -> bool:
        newer, further = entry.attempt >= self._place[0], entry.index > self._place[1]
        if newer != further and entry.attempt != self._place[0]:
            raise GenerationFailed(LOST)
        return further

    def _take(self, entry: Entry) -> Entry:
        self._place = entry.place
        self._silent = 0
        return entry


def _entry(place: str, text: str) -> Entry | None:
    """The entry of a row; None for a marker. `GenerationFailed`: its writer has written what is neither."""
    try:
        event = decode(text)
        return _placed(place, event) if event else None
    except ValueError as error:
        raise GenerationFailed(UNREADABLE) from error


def _placed(place: str, event: Event) -> Entry:
    attempt, index = _place(place)
    return Entry(attempt=attempt, index=index, event=event)


def _place(text: str) -> Place:
    attempt, _, index = text.partition("-")
    return int(attempt), int(index)


def _readable(fields: dict[str, str]) -> Event | None:
    """The event of a row. Who looks at many jobs is not held up by what one node has written."""
    try:
        return decode(fields.get("e", ""))
    except ValueError:
        return None
