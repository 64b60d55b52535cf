"""The Celery application that `celery -A localai_q` finds, and which role a worker process takes.

A worker's role follows from its queues: none named, it is a node; `control`, the control process; a node's jobs or a
model's queues, a child that a node has started. Each role's module prepares the process; what a role does is there.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from celery import Celery, signals

from localai_q import names
from localai_q.bus import celery_events, celery_guards, safe_transport
from localai_q.bus.connection import Secret, credentials
from localai_q.config import exit_on_startup_error, settings
from localai_q.errors import LocalAIError, StartupError

log = logging.getLogger(__name__)

# By name and not by import: this package serves both sides and depends on neither.
ROLES = {
    "control": "localai_q.control.worker",
    "node": "workers.node.worker",
    "jobs": "workers.node.jobs",
    "replica": "workers.replica.worker",
}


def role_of(queues: str | list[str] | None) -> str:
    """The role of a worker that was given these queues (`-Q`)."""
    listed = [name for name in queues.split(",") if name] if isinstance(queues, str) else list(queues or [])
    if not listed:
        return "node"
    if listed == [names.CONTROL_QUEUE]:
        return "control"
    return "jobs" if listed[0].startswith("node.") else "replica"


def use_broker(conf: Any, redis_url: str, node_id: str, secret: Secret) -> None:
    """Have a worker of a node talk to this Redis, with keys of that node's own for what kombu has to remember.

    `secret`: the password of the user whom the URL names without one.
    """
    conf.broker_url = redis_url
    conf.broker_transport_options = {
        **broker_options(),
        "unacked_key": names.unacked_key(node_id),
        "unacked_index_key": names.unacked_index_key(node_id),
        "unacked_mutex_key": names.unacked_mutex_key(node_id),
        safe_transport.CREDENTIALS: credentials(redis_url, secret),
    }


def broker_options() -> dict[str, Any]:
    """kombu's options for Redis: strict first-in-first-out per queue, and sockets that notice a dead broker."""
    return {
        "priority_steps": [0],
        "socket_timeout": 15,
        "socket_connect_timeout": 3,
        "socket_keepalive": True,
        "health_check_interval": 5,
    }


def make_app() -> Celery:
    """The application. Messages are JSON; nothing is stored as a result; a task is taken when a slot is free."""
    app = Celery("localai_q", broker=settings().redis_url or "redis://unregistered.invalid/0")
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        result_backend=None,
        task_ignore_result=True,
        task_acks_late=False,
        worker_pool="threads",
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_send_task_events=True,
        task_send_sent_event=False,
        worker_enable_remote_control=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        broker_pool_limit=10,
        broker_transport_options=broker_options(),
    )
    celery_guards.install(app)
    celery_events.install(app)
    safe_transport.install(app)
    return app


app = make_app()


@signals.celeryd_init.connect
def prepare(instance: Any, conf: Any, options: dict[str, Any], **_: Any) -> None:
    """Give a starting worker its role.

    Celery swallows what a handler raises and goes on with its default broker, so everything ends in SystemExit here.
    """
    role = role_of(options.get("queues"))
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request of a node to the API
    try:
        importlib.import_module(ROLES[role]).prepare(instance, conf)
    except StartupError as error:
        raise exit_on_startup_error(error) from error
    except LocalAIError as error:
        raise exit_on_startup_error(StartupError(error.message)) from error
    except Exception as error:
        log.exception("the %s worker cannot start", role)
        raise exit_on_startup_error(StartupError(f"the {role} worker cannot start: {error!r}")) from error
