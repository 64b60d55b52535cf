"""Where this web process sends requests, and what it remembers for that. One `Router` per process.

It knows what its own requests do and, freshly read, what those of other processes do; which replica has read which
beginnings, its own and what others tell it; and which doorbells were rung for one replica. The decision itself is
`localai_q.cluster.routing`. All of this is a help only: a process that dies or knows nothing costs time, never a job.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import secrets
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from hashlib import blake2b

import redis

from localai_q import names
from localai_q.bus import pressure
from localai_q.cluster.affinity import LINK, MOST_WINDOWS, Chain, Prefixes, chain_of, head_of
from localai_q.cluster.defaults import with_defaults
from localai_q.cluster.models import Model
from localai_q.cluster.requests import GenerationRequest
from localai_q.cluster.routing import Guards, Load, Route, Snapshot, route
from localai_q.cluster.states import ReplicaState
from localai_q.errors import LocalAIError, ModelDisabled, ModelUnavailable, UnsupportedByModel
from localai_q.services.snapshots import Snapshots
from localai_q.services.wiring import Services

log = logging.getLogger(__name__)

UNCLAIMED = 0.2  # seconds after which a doorbell that was rung for one replica is rung for all
AGAIN = 1.0  # seconds before what has failed is tried again
TICK = 0.05  # seconds between two looks at jobs that are due for one
LOOKS = 60.0  # seconds after which nobody looks any more who has taken a job
FRESH = 0.2  # seconds for which what others do is taken for known, at least
STALE = 5.0  # seconds, at most
COSTLY = 20  # times the work of reading that, in seconds: many jobs are looked at more seldom
DEAF = 5.0  # seconds for which a replica that has not taken what it was told of is not told of more
ON_ITS_WAY = 1.0  # seconds in which a job of this process that nobody holds may still be on its way
MOST_WATCHED = 10_000  # jobs whose taking is watched; control rings again for those above
MOST_NEWS = 256  # beginnings that wait to be told; the oldest go first
TOLD_AT_ONCE = 32  # beginnings in one message, which take at most a kilobyte each
SILENT_QUEUE = 60  # seconds for which an unheard doorbell lies on the queue of a replica


@dataclass(frozen=True, kw_only=True)
class Trip:
    """A request on its way to its line."""

    job_id: str
    request: GenerationRequest  # with what its model adds
    model: Model
    way: Route
    chain: Chain


@dataclass(kw_only=True)
class _Watched:
    """A job of which it is not known yet who takes it."""

    trip: Trip
    since: float
    due: float  # when to look
    rung_for: str | None  # the replica that alone was told of it


class _View:
    """What the replicas of one model have to do, as far as this process knows."""

    def __init__(self) -> None:
        self.due = float("-inf")  # when to read again what others do
        self._own: dict[str, float] = {}  # when jobs of this process set out
        self._where: dict[str, str] = {}  # the replicas of jobs; empty: whichever has a slot
        self._counts: Counter[str] = Counter()
        self._others_waiting = 0
        self._deaf: dict[str, float] = {}  # until when, by replica id

    def load(self, now: float) -> Load:
        deaf = [replica_id for replica_id, until in self._deaf.items() if now < until]
        return Load(in_flight=self._counts, waiting=self._others_waiting + self._counts[""], deaf=deaf)

    def missed(self, job_id: str, replica_id: str, now: float) -> None:
        """The replica has not taken the job, of which all are told now."""
        self._deaf[replica_id] = now + DEAF
        self.move(job_id, "")

    def took(self, job_id: str, replica_id: str) -> None:
        """The replica works on the job."""
        self._deaf.pop(replica_id, None)
        self.move(job_id, replica_id)

    def add(self, job_id: str, replica_id: str, now: float) -> None:
        """A job of this process sets out."""
        self._own[job_id] = now
        self.move(job_id, replica_id)

    def move(self, job_id: str, replica_id: str) -> None:
        """It is known where it is."""
        if job_id in self._own:
            self._forget(job_id)
            self._where[job_id] = replica_id
            self._counts[replica_id] += 1

    def end(self, job_id: str) -> None:
        self._own.pop(job_id, None)
        self._forget(job_id)

    def refresh(self, held: dict[str, str], waiting: int, now: float) -> None:
        """So it stands in Redis: the replicas of jobs that are worked on, and how many jobs wait."""
        self._own = {job: since for job, since in self._own.items() if job in held or now - since < ON_ITS_WAY}
        coming = {job: self._where[job] for job in self._own if job not in held}
        self._where = {**held, **coming}
        self._counts = Counter(self._where.values())
        self._others_waiting = max(waiting - len(coming), 0)
        self._deaf = {replica_id: until for replica_id, until in self._deaf.items() if now < until}

    def _forget(self, job_id: str) -> None:
        if (before := self._where.pop(job_id, None)) is not None:
            self._counts[before] -= 1


class Router:
    """Routes requests and sees to it that they are taken."""

    def __init__(self, services: Services, snapshots: Snapshots) -> None:
        self._services = services
        self._snapshots = snapshots
        self._id = names.new_id()
        settings = services.settings
        self._key = blake2b(settings.registration_token.encode(), person=b"prefixes").digest()
        self._prefixes = Prefixes(ttl=settings.prefix_cache_ttl, most=settings.prefix_cache_entries)
        self._guards = Guards(min_match=settings.min_prefix_match, balance_abs=settings.balance_abs_threshold,
                              balance_rel=settings.balance_rel_threshold)  # fmt: skip
        self._views: dict[str, _View] = {}  # by line
        self._watched: dict[str, _Watched] = {}
        self._news: deque[tuple[str, Chain]] = deque(maxlen=MOST_NEWS)
        self._pressed: Counter[str] = Counter()
        self._turns = itertools.count(secrets.randbelow(1 << 16))  # so that processes begin with different replicas
        self._latest: Snapshot | None = None
        self._tidied: Snapshot | None = None
        self._work = threading.Event()
        self._stopping = False

    def start(self) -> None:
        """Watch what is taken, and hear what other processes have seen."""
        targets = (
            (self._tend_always, self._listen_always) if self._services.settings.prefix_cache else (self._tend_always,)
        )
        for target in targets:
            threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True).start()

    def stop(self) -> None:
        """Watch and hear nothing any more: this process ends."""
        self._stopping = True
        self._work.set()

    def route(self, request: GenerationRequest, job_id: str, *, younger_than: float | None = None) -> Trip:
        """Choose where the request goes. Say by `sent` that it did, or by `ended` that it did not.

        Args:
            younger_than: how old what is known of the cluster may be, as for `Snapshots.now`.

        Raises:
            ModelNotFound, ModelDisabled, UnsupportedByModel, ModelUnavailable, Unavailable: it goes nowhere.
        """
        try:
            return self._route(request, job_id, *self._snapshots.model(request.model, younger_than=younger_than))
        except (UnsupportedByModel, ModelUnavailable, ModelDisabled):  # as the model was a moment ago
            return self._route(request, job_id, *self._snapshots.model(request.model, younger_than=0.0))

    def _route(self, request: GenerationRequest, job_id: str, model: Model, snapshot: Snapshot) -> Trip:
        self._latest = snapshot
        request = with_defaults(request, model.config)
        pool, chain, now = snapshot.pool(model), self._chain(model, request), time.monotonic()
        if len(pool.ready) < 2:  # there is no choice
            way = route(model, pool, request.kind, snapshot.taken)
            return Trip(job_id=job_id, request=request, model=model, way=way, chain=chain)
        view = self._view(names.model_queue(model.id), now)
        way = route(model, pool, request.kind, snapshot.taken, load=view.load(now), matched=self._prefixes.match(chain, now),
                    guards=self._guards, turn=next(self._turns))  # fmt: skip
        view.add(job_id, way.replica_id or "", now)
        if way.pressed:
            self._pressed[model.id] += 1
        return Trip(job_id=job_id, request=request, model=model, way=way, chain=chain)

    def sent(self, trip: Trip) -> None:
        """The job is in its line and its doorbell was rung: watch who takes it, where that matters."""
        if (trip.chain or trip.way.replica_id) and len(self._watched) < MOST_WATCHED:
            now = time.monotonic()
            self._watched[trip.job_id] = _Watched(
                trip=trip, since=now, due=now + UNCLAIMED, rung_for=trip.way.replica_id
            )
        self._work.set()

    def heard(self, job_id: str) -> None:
        """Somebody works on the job, or did."""
        watched = self._watched.get(job_id)
        if watched and watched.trip.chain:
            watched.due = 0.0
        else:
            self._watched.pop(job_id, None)

    def ended(self, job_id: str, line: str) -> None:
        """The job has ended, or nobody here waits for it any more."""
        if line in self._views:
            self._views[line].end(job_id)

    def tend(self, now: float) -> None:
        """One look: learn who has taken what is due, ring for what nobody has taken, tell others what is new."""
        self._forget_gone()
        due = {job_id: each for job_id, each in list(self._watched.items()) if each.due <= now}
        holders = self._services.leases.holders(list(due))
        for job_id, each in due.items():
            holder = holders.get(job_id, "")
            if holder is None and now - each.since < LOOKS:
                self._ring_for_all(each, now)
                each.due = now + max(now - each.since, UNCLAIMED)
            else:
                self._watched.pop(job_id, None)
                if holder:
                    self._learn(each.trip, holder, now)
        self._tell()

    def _chain(self, model: Model, request: GenerationRequest) -> Chain:
        if not self._services.settings.prefix_cache or model.config.route_policy != "prefix_cache":
            return ()
        return chain_of(head_of(request), key=self._key, model_id=model.id)

    def _view(self, line: str, now: float) -> _View:
        """What the model's replicas have to do; read again by the first that finds it old."""
        view = self._views.setdefault(line, _View())
        if now >= view.due:
            view.due, began = math.inf, time.process_time()  # nobody else reads it meanwhile
            try:
                view.refresh(*self._services.leases.at_work(line), now)
            finally:
                view.due = now + min(max(FRESH, COSTLY * (time.process_time() - began)), STALE)
        return view

    def _learn(self, trip: Trip, replica_id: str, now: float) -> None:
        if trip.way.queue in self._views:
            self._views[trip.way.queue].took(trip.job_id, replica_id)
        if self._prefixes.observe(trip.chain, replica_id, now):
            self._news.append((replica_id, trip.chain))

    def _ring_for_all(self, watched: _Watched, now: float) -> None:
        """Nobody has taken the job that one replica was told of: whoever is first takes it."""
        if watched.rung_for is None:
            return
        trip = watched.trip
        self._services.doorbells.ring(names.RUN_GENERATION, trip.job_id, queue=trip.way.queue)
        if trip.way.queue in self._views:
            self._views[trip.way.queue].missed(trip.job_id, watched.rung_for, now)
        pipe = self._services.redis.pipeline(transaction=False)
        for key in names.broker_keys(trip.way.doorbell):  # control may have deleted them before
            pipe.expire(key, SILENT_QUEUE)
        pipe.execute()
        watched.rung_for = None
        log.info("replica %s has not taken job %s in time", trip.way.replica_id, trip.job_id)

    def _forget_gone(self) -> None:
        """Replicas that are not ready have nothing in their engines."""
        if self._latest is not self._tidied and self._latest:
            self._tidied = self._latest
            ready = {each.id for each in self._latest.replicas if each.state is ReplicaState.READY}
            for replica_id in self._prefixes.holders - ready:
                self._prefixes.forget(replica_id)
            lines = {names.model_queue(model.id) for model in self._latest.models.values()}
            self._views = {line: view for line, view in self._views.items() if line in lines}

    def _tell(self) -> None:
        while self._news:
            batch = [self._news.popleft() for _ in range(min(len(self._news), TOLD_AT_ONCE))]
            seen = [[replica_id, b"".join(chain).hex()] for replica_id, chain in batch]
            self._services.redis.publish(names.PREFIXES_CHANNEL, json.dumps({"from": self._id, "seen": seen}))
        if self._pressed:
            pressed, self._pressed = self._pressed, Counter()
            pressure.add(self._services.redis, pressed)

    def hear(self, message: str, now: float) -> None:
        """Another process, or this one, has told what it has seen."""
        try:
            told = json.loads(message)
            if told["from"] == self._id:
                return
            for replica_id, links in told["seen"][:TOLD_AT_ONCE]:
                text = bytes.fromhex(links)[: LINK * MOST_WINDOWS]
                chain = tuple(text[at : at + LINK] for at in range(0, len(text), LINK))
                self._prefixes.observe(chain, str(replica_id), now)
        except (ValueError, KeyError, TypeError) as error:
            log.warning("what another process has seen cannot be read: %r", error)

    def _tend_always(self) -> None:
        while not self._stopping:
            self._work.clear()
            if not self._watched and not self._pressed:
                self._work.wait()
            time.sleep(TICK)
            try:
                self.tend(time.monotonic())
            except (LocalAIError, redis.RedisError) as error:
                log.info("who takes what cannot be seen at the moment: %s", error)
                time.sleep(AGAIN)
            except Exception:
                log.exception("who takes what cannot be seen; it is tried again")

    def _listen_always(self) -> None:
        while not self._stopping:
            try:
                self._listen()
            except (redis.RedisError, OSError) as error:
                log.info("cannot hear what other processes have seen, connecting again: %s", error)
                time.sleep(AGAIN)

    def _listen(self) -> None:
        with self._services.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
            pubsub.subscribe(names.PREFIXES_CHANNEL)
            while not self._stopping:
                message = pubsub.get_message(timeout=5.0)
                if message:
                    self.hear(message["data"], time.monotonic())
