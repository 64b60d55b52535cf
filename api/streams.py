"""The jobs that this web process follows for its clients. Owns how a following ends, whoever ends it.

A client that leaves is noticed by `api.disconnects`, a client that takes nothing and the end of the process here. What
the journal's entries become for the client is made in `api.openai.serving` and in `api.events`.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Self

import redis
from flask import request

from api.disconnects import watch
from api.metrics import Metrics
from api.sse import RETRY, sse
from localai_q.bus.journal import Entry, Listener, Place
from localai_q.bus.leases import Kept
from localai_q.cluster.events import Delta, End, Event, Vector
from localai_q.cluster.jobs import Keep
from localai_q.cluster.waiting import Standing
from localai_q.config import Settings
from localai_q.errors import Cancelled, DeadlineExceeded, LocalAIError, Stopping
from localai_q.services import generations, waiting
from localai_q.services.router import Router
from localai_q.services.snapshots import Snapshots
from localai_q.services.wiring import Services

log = logging.getLogger(__name__)

LATE = 5.0  # seconds past its deadline at which a job that nobody ends is given up
LOOK = 1.0  # seconds between two looks where the jobs stand of which nothing is heard
SILENT = 0.5  # seconds after which nothing is heard of a job: whoever has begun by a look is known by the next one
LATEST = 0.2  # weight of the latest request in a model's pace
SWEEP = 1.0  # seconds between two looks for stalled clients
FAREWELL = 1.0  # seconds between two tries to say that a reader has left


class Following:
    """One accepted job, followed for one client."""

    def __init__(self, streams: Streams, job_id: str) -> None:
        self.job_id = job_id
        self.started = time.monotonic()
        self.heard = self.started  # when an entry was last read
        self.writing_since: float | None = None  # when the client was last given something that it has not taken yet
        self.kept: Kept | None = None  # once the job is accepted or found
        self.model = ""
        self.fresh = False  # the client has just sent the request
        self.standing: Standing | None = None  # where the job stands, while it waits
        self._streams = streams
        self._late = 0.0
        self._ended = False
        self._heard_of = False
        self._gone: LocalAIError | None = None  # why nobody follows any more
        self._keep_stalled = False
        self._closed = False
        self._connection: Any = request.environ.get("gunicorn.socket")
        self._reader = streams.listener.open(job_id)
        self._unwatch = watch(request.environ, lambda: self.end(Cancelled()))
        streams.add(self)

    def follow(self, kept: Kept, model: str) -> Self:
        """The job was accepted, or found."""
        self.kept, self.model = kept, model
        self._late = time.monotonic() + kept.left + LATE
        return self

    def entries(self, *, after: Place = (0, 0), fresh: bool = False) -> Iterator[Entry | None]:
        """The journal's entries behind a place, up to the end; None after each second without one.

        Raises:
            Cancelled: the client has gone.
            Stopping: this process must end.
            DeadlineExceeded: nobody has ended the job in time.
        """
        assert self.kept is not None
        self.fresh, first = fresh, True
        for entry in self._reader.entries(after=after, fresh=fresh):
            if self._gone:
                raise self._gone
            if entry is None and time.monotonic() > self._late:
                raise DeadlineExceeded
            if entry:
                if not self._heard_of:
                    self._heard_of = True
                    self._streams.router.heard(self.job_id)
                self.heard, self.standing = time.monotonic(), None
                self._ended = isinstance(entry.event, End)
                if fresh:  # a job counts once, however many come back for it
                    first = self._count(entry.event, first)
            yield entry

    def frames(self, entries: Iterator[Entry | None], frame: Callable[[Entry | None, float], bytes]) -> Iterator[bytes]:
        """What the client is sent, to its end or to the error that it ends with; then nobody follows any more.

        Args:
            entries: as `entries` gives them.
            frame: makes bytes of an entry, or of a second without one; it is told for how many seconds nothing was sent.
        """
        said = float("-inf")
        try:
            for entry in entries:
                made = frame(entry, time.monotonic() - said)
                if made:
                    said = self.writing_since = time.monotonic()
                    yield made
                    self.writing_since = None
        except Stopping:
            yield RETRY
        except LocalAIError as error:
            if not isinstance(error, Cancelled):
                yield sse(json.dumps(error.body()))
        finally:
            self.close()

    def _count(self, event: Event, first: bool) -> bool:
        """Measure the job; whether its first token is still to come."""
        since = time.monotonic() - self.started
        if isinstance(event, End):
            self._streams.note_end(self.model, event, since)
        if first and isinstance(event, Delta | Vector):
            self._streams.metrics.first_token.labels(self.model).observe(since)
            return False
        return first

    def end(self, why: LocalAIError) -> None:
        """Have it end, from another thread."""
        self._gone = self._gone or why
        self._reader.wake()

    def cut(self) -> None:
        """Break the connection to a client that takes nothing."""
        log.warning("the client of job %s has stalled; its connection is closed", self.job_id)
        self._keep_stalled = self._streams.settings.stalled_job == "grace"
        self.end(Cancelled())
        # By a second descriptor: gevent would make the writer that waits on the first believe that it was closed.
        with suppress(OSError), self._connection.dup() as connection:
            connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop following. A job that has not ended and that nobody else follows has the fate that was asked for."""
        if self._closed:
            return
        self._closed = True
        self._unwatch()
        self._reader.close()
        self._streams.remove(self)
        if self.kept:
            self._streams.router.ended(self.job_id, self.kept.line)
        if self.kept and not self._ended:
            spares = self._keep_stalled or isinstance(self._gone, Stopping)
            self._streams.say_farewell(self.kept, spares=spares)


class Streams:
    """All followings of a web process."""

    def __init__(self, services: Services, snapshots: Snapshots, router: Router, metrics: Metrics) -> None:
        self.settings: Settings = services.settings
        self.listener = Listener(services.redis)
        self.router = router
        self.metrics = metrics
        self._services = services
        self._snapshots = snapshots
        self._pace: dict[str, float] = {}  # seconds that a request takes, by model, the latest counting most
        self._open: set[Following] = set()
        self.stopping = False  # this process must end
        for target in (self._sweep, self._look_up):
            threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True).start()

    def add(self, following: Following) -> None:
        self._open.add(following)
        if self.stopping:
            following.end(Stopping())

    def remove(self, following: Following) -> None:
        self._open.discard(following)

    def note_end(self, model: str, end: End, seconds: float) -> None:
        """A generation has ended that was followed here for so many seconds."""
        self.metrics.count_end(model, end, seconds)
        if took := end.timings.get("total"):
            self._pace[model] = LATEST * took + (1 - LATEST) * self._pace.get(model, took)

    def stop(self) -> None:
        """End all followings, now and from now on, so that clients can come back to other processes."""
        self.stopping = True
        self.listener.stop()
        for following in list(self._open):
            following.end(Stopping())

    def say_farewell(self, kept: Kept, *, spares: bool) -> None:
        """Tell that a reader has left; as often as it takes, for a job that nobody reads must not run on unnoticed."""
        try:
            self._leave(kept, spares=spares)
        except LocalAIError as error:
            log.warning("the reader of job %s has left, which cannot be said yet: %s", kept.job_id, error.message)
            threading.Thread(target=self._leave_later, args=(kept, spares), daemon=True).start()

    def _leave_later(self, kept: Kept, spares: bool) -> None:
        late = time.monotonic() + kept.left
        while time.monotonic() < late:
            time.sleep(FAREWELL)
            try:
                return self._leave(kept, spares=spares)
            except LocalAIError:
                continue
        return None

    def _leave(self, kept: Kept, *, spares: bool) -> None:
        keep = self.listener.detach(kept.job_id)
        if keep is Keep.NOT and not spares:
            generations.abandon(self._services, kept)

    def _look_up(self) -> None:
        """Learn where the jobs stand of which nothing is heard. Apart from the streams, for the stores may be away."""
        while not self.stopping:
            time.sleep(LOOK)
            late = time.monotonic() - SILENT
            silent = [each for each in list(self._open) if each.kept and each.heard < late]
            try:
                found = waiting.standings(
                    self._services, self._snapshots, {each.job_id: each.model for each in silent}, self._pace
                )
                for each in silent:
                    each.standing = found.get(each.job_id)
            except (LocalAIError, redis.RedisError) as error:
                log.info("nobody can be told where he stands: %s", error)
            except Exception:
                log.exception("where jobs stand cannot be looked up; it is tried again")

    def _sweep(self) -> None:
        while not self.stopping:
            time.sleep(SWEEP)
            late = time.monotonic() - self.settings.stalled_client
            for following in list(self._open):
                if following.writing_since is not None and following.writing_since < late:
                    following.writing_since = None
                    following.cut()
