"""The load of this replica's model as the job that it is: claimed before it begins, and ended with it.

The process of which the load has failed, or was cancelled, ends; the node reports that, and another try is another job.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import redis

from localai_q import names
from localai_q.bus import journal
from localai_q.bus.leases import Refusal
from localai_q.cluster.events import End, Progress
from localai_q.cluster.states import JobState
from localai_q.errors import LocalAIError, ModelUnavailable, StartupError, from_record, to_record
from workers.child import ReplicaSpec
from workers.claims import RETRY, Claims, Held
from workers.replica.backend import Backend

log = logging.getLogger(__name__)

PASSING = ("unknown", "leased")  # until control has brought the job back, or has seen that its owner is dead


class Load:
    """One try to load a model.

    Args:
        client: of Redis.
    """

    _held: Held

    def __init__(self, claims: Claims, client: Any, spec: ReplicaSpec) -> None:
        self._claims = claims
        self._redis = client
        self._spec = spec
        self._line = names.replica_queue(spec.id)
        self._refused: LocalAIError | None = None  # why it must not go on
        self._lock = threading.RLock()
        self._is_over = False  # whatever becomes of the lease from then on

    def run(self, start: Callable[[], Backend]) -> Backend:
        """Start a backend and have it load the model.

        Raises:
            StartupError: it cannot, with its own words; or the job was cancelled, or has ended.
        """
        self._held = self._claimed()
        began, backend = time.time(), None
        try:
            self._say("starting", f"the backend {self._spec.model.backend}")
            backend = start()
            self._hold(self._held, backend)
            backend.wait_for_health()
            self._say("loading")
            backend.load()
            with self._lock:
                self._is_over = True
            if self._held.why == "cancelled" or self._refused:
                raise StartupError
        except StartupError as error:
            with self._lock:
                self._is_over = True
            if backend:
                backend.kill()
            raise self._failed(error) from error
        self._held.finish(End(state=JobState.DONE, result={}, timings={"total": time.time() - began}))
        return backend

    def _claimed(self) -> Held:
        """The job's lease, as soon as it is to be had.

        Raises:
            StartupError: the job was cancelled, or has ended.
        """
        while True:
            try:
                answer = self._claims.claim(self._spec.job, self._line)
                if isinstance(answer, Held):
                    return answer
                if answer.why not in PASSING:
                    raise StartupError(self._why(answer).message)
            except (redis.RedisError, OSError) as error:
                log.warning("the load cannot begin yet: %s", error)
            time.sleep(RETRY)

    def _hold(self, held: Held, backend: Backend) -> None:
        self._held = held
        held.on_cancel(lambda: self._heed(held, backend))

    def _heed(self, held: Held, backend: Backend) -> None:
        """The load is to stop; or its lease was lost, and it goes on with another one, unless the job has ended."""
        while not self._heeded(held, backend):
            time.sleep(RETRY)

    def _heeded(self, held: Held, backend: Backend) -> bool:
        """False: whether it may go on is not known yet."""
        with self._lock:
            if self._is_over:
                return True
            if held.why != "cancelled":
                try:
                    answer = self._claims.claim(self._spec.job, self._line)
                except (redis.RedisError, OSError, LocalAIError) as error:
                    log.warning("the load goes on without its lease: %s", error)
                    return False
                if isinstance(answer, Held):
                    self._hold(answer, backend)
                    return True
                if answer.why in PASSING:
                    return False
                self._refused = self._why(answer)
            backend.kill()
            return True

    def _why(self, refusal: Refusal) -> LocalAIError:
        """What the job has ended with that is not to be had."""
        with suppress(LocalAIError):
            ended = journal.latest(self._redis, [self._spec.job]).get(self._spec.job)
            if isinstance(ended, End) and ended.error:
                return from_record(ended.error)
        return ModelUnavailable(f"The job of this load is not to be had: {refusal.why}.")

    def _failed(self, error: StartupError) -> StartupError:
        """End the job with what has kept the model from being loaded."""
        end = End(state=JobState.FAILED, error=to_record(self._refused or ModelUnavailable(error.message)))
        if self._held.why == "cancelled":
            end = self._held.asked()
        self._held.finish(end)
        return StartupError(from_record(end.error or {}).message)

    def _say(self, stage: str, note: str = "") -> None:
        self._held.emit(Progress(stage=stage, note=note))
