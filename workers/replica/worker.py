"""The replica role of a Celery worker: brings its backend up before it consumes, and ends with it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Any

from celery import signals

from localai_q import names
from localai_q.bus.connection import client
from localai_q.bus.doorbells import Doorbells
from localai_q.bus.leases import Leases
from localai_q.bus.probe import Probe
from localai_q.celery import app, use_broker
from localai_q.config import settings
from localai_q.errors import StartupError
from localai_q.processes import watch_parent
from workers.child import FINISH, ChildSpec, ReplicaSpec, StatusPipe, read_spec
from workers.claims import Claims
from workers.identity import Identity
from workers.replica.backend import Backend
from workers.replica.loading import Load
from workers.replica.runner import Runner

log = logging.getLogger(__name__)

CHATTY = ("celery.app.trace", "celery.worker.strategy")  # two lines for each request, which the job's row tells better


def prepare(worker: Any, conf: Any) -> None:
    """Start the backend, load the model, and make the worker its consumer."""
    spec = read_spec()
    assert spec.replica is not None
    watch_parent(os.getppid(), lambda: os.kill(os.getpid(), signal.SIGTERM))
    status = StatusPipe(spec.status_fd)
    identity = Identity(spec.identity)
    use_broker(conf, spec.redis_url, spec.node_id, identity.secret)
    conf.worker_concurrency = spec.replica.model.slots
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    replica, redis = spec.replica, client(spec.redis_url, identity.secret)
    claims = make_claims(spec, replica, redis)
    try:
        status.say("loading")
        load = Load(claims, redis, replica)
        backend = load.run(lambda: Backend(replica, on_death=lambda reason: _end_worker(status, reason)))
    except StartupError as error:
        status.say("failed", error.message)
        raise
    line = names.model_queue(replica.model.id)
    runner = Runner(claims, backend, Doorbells(app), identity=replica.model.name, line=line)
    status.figures = runner.figures
    drain_timeout = settings().drain_timeout
    queue, slots = names.replica_queue(replica.id), replica.model.slots
    probe = Probe(app, redis, queue, slots=slots, drain=drain_timeout)

    @app.task(name=names.RUN_GENERATION)
    def run_generation(job_id: str) -> None:
        runner.run(job_id)

    ending = Ending(runner, drain_timeout)
    signals.worker_ready.connect(lambda **_: signal.signal(FINISH, ending.finish), weak=False)
    signals.worker_ready.connect(lambda **_: status.say("ready"), weak=False)
    signals.worker_ready.connect(lambda **_: probe.start(lambda reason: status.say("failed", reason)), weak=False)
    signals.worker_shutting_down.connect(lambda **_: probe.stop(), weak=False)
    signals.worker_shutting_down.connect(lambda **_: ending.begin(), weak=False)
    signals.worker_shutdown.connect(lambda **_: backend.stop(), weak=False)


def make_claims(spec: ChildSpec, replica: ReplicaSpec, redis: Any) -> Claims:
    """What this process holds leases with: of its load, and of its model's jobs after that."""
    leases = Leases(redis, lease=spec.lease, journal_ttl=spec.journal_ttl, journal_max=spec.journal_max)
    return Claims(
        redis, leases, owner=replica.id, node_id=spec.node_id, lease=spec.lease, revision=replica.model.revision
    )


class Ending:
    """The end of this process: it takes nothing more, and lets running jobs finish.

    Args:
        patience: seconds that they have after a SIGTERM, before they are given back to their line. `FINISH` sets no limit.
    """

    def __init__(self, runner: Runner, patience: float) -> None:
        self._runner = runner
        self._patience = patience
        self._unhurried = False

    def finish(self, *_: Any) -> None:
        """As the handler of `FINISH`: end by way of Celery's own shutdown."""
        self._unhurried = True
        os.kill(os.getpid(), signal.SIGTERM)

    def begin(self) -> None:
        """Celery shuts down; called once more for each further SIGTERM, which is in a hurry."""
        self._runner.draining = True
        if self._unhurried:
            self._unhurried = False
            return
        timer = threading.Timer(self._patience, self._runner.give_back_all)
        timer.daemon = True
        timer.start()


def _end_worker(status: StatusPipe, reason: str) -> None:
    """The backend has died: say so and end; what runs ends by itself, for its calls have failed."""
    log.error("%s", reason)
    status.say("failed", reason)
    os.kill(os.getpid(), signal.SIGTERM)
