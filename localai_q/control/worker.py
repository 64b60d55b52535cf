"""The control role of a Celery worker: migrations at the start, then the loops."""

from __future__ import annotations

from typing import Any

from celery import signals

from localai_q.config import settings
from localai_q.control.loops import Control
from localai_q.services import keys, models, scheduling
from localai_q.services.wiring import connect
from localai_q.store import migrate


def prepare(worker: Any, conf: Any) -> None:
    """Make the worker the control process."""
    conf.worker_concurrency = 2
    services = connect(settings().require_stores())
    migrate.upgrade(settings().database_url)
    keys.ensure_admin(services)
    models.ensure_default(services)
    scheduling.apply_declared(services)
    control = Control(services)
    signals.worker_ready.connect(lambda **_: control.start(), weak=False)
    signals.worker_shutting_down.connect(lambda **_: control.stop(), weak=False)
