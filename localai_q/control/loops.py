"""The loops. Each is thin: it calls one use case, as long as this process leads it, and survives whatever that raises."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import redis

from localai_q import names
from localai_q.errors import Unavailable
from localai_q.services import backends, cleaning, installs, jobs, models, node_users, nodes, quantizations, replicas
from localai_q.services.wiring import Services
from localai_q.store import leaders

log = logging.getLogger(__name__)

LEAD = 10.0  # seconds for which a lead is taken; it is renewed every third of that, and the beat of a sound loop noted
GAP = 0.05  # seconds between two turns of a loop, however often it is woken
KEPT_DAYS = 30  # of ended jobs
UPGRADES_EVERY = 6 * 3600.0  # seconds


@dataclass(frozen=True)
class Loop:
    """Something that is done again and again."""

    name: str
    every: float  # seconds
    turn: Callable[[Services], object]
    wake: threading.Event  # set: a turn is due now


def prune(services: Services) -> None:
    """Forget jobs and wishes that ended long ago, and uploaded files that nothing names."""
    from localai_q.store import jobs as rows

    with services.db.transaction() as db:
        rows.forget(db, older_than=KEPT_DAYS * 24 * 3600.0)
    backends.prune(services, days=KEPT_DAYS)
    models.forget_unnamed(services)


def make_loops() -> list[Loop]:
    """All loops of the control process."""
    return [
        Loop("ends", 1.0, jobs.apply_ends, threading.Event()),
        Loop("replicas", 1.0, replicas.reconcile, threading.Event()),
        Loop("recovery", 2.0, jobs.recover, threading.Event()),
        Loop("users", 1.0, node_users.restore, threading.Event()),
        Loop("health", 2.0, nodes.watch_health, threading.Event()),
        Loop("backends", 1.0, backends.fulfil, threading.Event()),
        Loop("quantizations", 1.0, quantizations.advance, threading.Event()),
        Loop("upgrades", UPGRADES_EVERY, backends.check_upgrades, threading.Event()),
        Loop("preloads", 2.0, installs.preload, threading.Event()),
        Loop("files", 30.0, cleaning.tidy, threading.Event()),
        Loop("prune", 3600.0, prune, threading.Event()),
    ]


class Control:
    """Runs the loops of one control process, each in a thread."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._owner = names.new_id()
        self._stopping = threading.Event()
        self.loops = make_loops()

    def start(self) -> None:
        for loop in self.loops:
            threading.Thread(target=self._run, args=(loop,), name=f"control-{loop.name}", daemon=True).start()
        threading.Thread(target=self._listen, name="control-wake", daemon=True).start()

    def stop(self) -> None:
        """End the loops and give up their leads."""
        self._stopping.set()
        for loop in self.loops:
            loop.wake.set()
        with self._services.db.transaction() as db:
            leaders.retire(db, self._owner)

    def _run(self, loop: Loop) -> None:
        led_until, due, sound = 0.0, 0.0, True
        while not self._stopping.is_set():
            now = time.monotonic()
            try:
                if now >= led_until - LEAD * 2 / 3:
                    led_until = now + LEAD if self._lead(loop, beat=sound) else 0.0
                if now < led_until and (now >= due or loop.wake.is_set()):
                    loop.wake.clear()
                    due, sound = now + min(loop.every, LEAD), False
                    loop.turn(self._services)
                    due, sound = now + loop.every, True
            except (Unavailable, redis.RedisError, OSError) as error:
                log.warning("loop %s: %s", loop.name, error)
            except Exception:
                log.exception("loop %s failed; it goes on", loop.name)
            self._stopping.wait(GAP)
            loop.wake.wait(min(loop.every, LEAD / 3))

    def _lead(self, loop: Loop, *, beat: bool) -> bool:
        with self._services.db.transaction() as db:
            return leaders.lead(db, loop.name, self._owner, seconds=LEAD, beat=beat)

    def _listen(self) -> None:
        """Have the loops look at once when something has happened."""
        by_name = {loop.name: loop for loop in self.loops}
        while not self._stopping.is_set():
            try:
                with self._services.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
                    pubsub.subscribe(names.WAKE_CHANNEL, names.ENDS_CHANNEL)
                    while not self._stopping.is_set():
                        message = pubsub.get_message(timeout=2.0)
                        if message:
                            by_name["ends" if message["channel"] == names.ENDS_CHANNEL else "replicas"].wake.set()
            except (redis.RedisError, OSError) as error:
                log.warning("lost the wake channel, connecting again: %s", error)
                time.sleep(0.5)
