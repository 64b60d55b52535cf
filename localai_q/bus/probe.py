"""Whether this worker still takes what lies on its queue. Owns the message by which a silent one finds that out.

A consumer can be connected and take nothing, which raises no error anywhere. So when no task has come for a while, the
worker leaves a message on its own queue, and ends if it does not take that, for who started it to start it again. Only a
silence counts in which a slot was free, Redis answered and this process ran: whatever else is wrong has its own remedy.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import redis
from celery import Celery, signals

from localai_q import names
from localai_q.bus.doorbells import Doorbells
from localai_q.errors import Unavailable

log = logging.getLogger(__name__)

SILENCE = 20.0  # seconds without a task after which there should be something to take
PATIENCE = 20.0  # seconds in which it should have been taken
LOOK = 1.0  # seconds between two looks
LAST_PATIENCE = 5.0  # seconds in which a worker that was told to end does so, once its tasks had their time
HELD_UP = 5.0  # seconds between two looks that show that this process, or Redis, did not run
LEFT = 600  # seconds after which a message that nobody took is removed


class Probe:
    """Watches one worker.

    Args:
        queue: of this worker alone.
        slots: tasks that it does at once.
        drain: seconds that its running tasks have when it must end.
    """

    def __init__(
        self, app: Celery, client: redis.Redis, queue: str, *, slots: int, drain: float = 0.0,
        silence: float = SILENCE, patience: float = PATIENCE,
    ) -> None:  # fmt: skip
        self._redis = client
        self._doorbells = Doorbells(app)
        self._queue = queue
        self._slots = slots
        self._drain = drain
        self._silence = silence
        self._patience = patience
        self._running = 0
        self._silent_since = time.monotonic()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        app.task(_nothing, name=names.PROBE)
        signals.task_prerun.connect(self._took, weak=False)
        signals.task_postrun.connect(self._ended, weak=False)

    def start(self, on_deaf: Callable[[str], object] = lambda _: None) -> None:
        """Watch from now on; before the worker is ended `on_deaf` is told why."""
        self._silent_since = time.monotonic()
        threading.Thread(target=self._watch, args=(on_deaf,), name="probe", daemon=True).start()

    def stop(self) -> None:
        """The worker is about to end: it need take nothing any more."""
        self._stopping.set()

    def _took(self, **_: Any) -> None:
        with self._lock:
            self._running += 1
            self._silent_since = time.monotonic()

    def _ended(self, **_: Any) -> None:
        with self._lock:
            self._running -= 1
            self._silent_since = time.monotonic()

    def _watch(self, on_deaf: Callable[[str], object]) -> None:
        if self._becomes_deaf():
            reason = f"the worker is connected to Redis and takes nothing from {self._queue}"
            log.error("%s", reason)
            on_deaf(reason)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(self._drain + LAST_PATIENCE)
            os._exit(1)

    def _becomes_deaf(self) -> bool:
        """Return True when the worker takes nothing any more, False when it is to be watched no more."""
        looked = time.monotonic()
        while not self._stopping.wait(LOOK):
            before, looked = looked, time.monotonic()
            held_up = looked - before > HELD_UP
            if held_up or self._running >= self._slots or not self._offer(looked - self._silent_since):
                self._silent_since = looked
            elif looked - self._silent_since >= self._silence + self._patience:
                return True
        return False

    def _offer(self, silent: float) -> bool:
        """After a silence see to it that something can be taken. False if Redis does not answer."""
        try:
            if silent < self._silence:
                return bool(self._redis.ping())
            if not self._redis.llen(self._queue):
                self._doorbells.ring(names.PROBE, names.new_id(), queue=self._queue)
                self._redis.expire(self._queue, LEFT)
        except (redis.RedisError, Unavailable, OSError) as error:
            log.info("Redis does not answer: %s", error)
            return False
        return True


def _nothing(_: str) -> None:
    """That this runs is all that is wanted."""
