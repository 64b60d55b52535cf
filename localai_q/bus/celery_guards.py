"""What Celery 5.7 and kombu 5.7 need on Redis to take exactly as many tasks as there are slots, and to live through a
restart of the broker.

Three things, each guarded by a test:

- the wake hook: with `worker_disable_prefetch` a worker that is full stops polling, and nothing wakes its event loop
  when a slot becomes free (a stall of about 0.2 s per task); we wake it. Sending task events happens to wake it, too,
  which is nothing to build on;
- closing a channel whose transport is dead raises AttributeError, which three kombu methods do not expect, and which
  ends the worker;
- gossip and mingle talk between all workers (quadratic in their number) and serve nothing here.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from celery import Celery, bootsteps, signals
from celery.worker.consumer.gossip import Gossip
from celery.worker.consumer.mingle import Mingle
from kombu.connection import Connection
from kombu.message import Message

log = logging.getLogger(__name__)

SETTLE = 0.002  # seconds: the ended task leaves Celery's books just after `task_postrun`


class WakeHook(bootsteps.StartStopStep):
    """Wakes the consumer's event loop when a task ends."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        hub = consumer.hub
        if hub is None:
            return

        def wake(**_: Any) -> None:
            hub.call_soon(hub.call_later, SETTLE, _nothing)

        self._wake = wake  # the signal holds it weakly
        signals.task_postrun.connect(wake, dispatch_uid="localai_q.wake")

    def stop(self, consumer: Any) -> None:
        signals.task_postrun.disconnect(dispatch_uid="localai_q.wake")


def install(app: Celery) -> None:
    """Put all guards in place."""
    app.steps["consumer"].add(WakeHook)
    Gossip.compatible_transports = frozenset()
    Mingle.compatible_transports = frozenset()
    Connection.maybe_close_channel = _tolerant(Connection.maybe_close_channel)
    Message.ack_log_error = _tolerant(Message.ack_log_error)
    Message.reject_log_error = _tolerant(Message.reject_log_error)


def _nothing() -> None:
    """A turn of the loop is all that is wanted: each turn asks again whether there is a free slot."""


def _tolerant(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except AttributeError as error:
            log.warning("the broker's connection was gone already: %s", error)
            return None

    return guarded
