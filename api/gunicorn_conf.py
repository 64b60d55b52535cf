"""gunicorn's settings: where it listens, how many processes, and what must happen before anything is imported.

The master applies migrations and makes the admin key; the workers serve. gevent patches the standard library before the
application is imported, and psycopg2 is made to wait in gevent's way (`api.postgres_wait`).
"""

from __future__ import annotations

from typing import Any

from localai_q.config import exit_on_startup_error, settings, share_metrics
from localai_q.errors import StartupError

try:
    _settings = settings()
    _settings.require_stores()
    if _settings.web_workers > 1:
        share_metrics(_settings.home)
except StartupError as _error:
    raise exit_on_startup_error(_error) from _error

bind = [_settings.address]
workers = _settings.web_workers
worker_class = "gevent"
worker_connections = 2000
graceful_timeout = int(_settings.web_drain) + 2
timeout = 60
keepalive = 75
loglevel = _settings.log_level.lower()
proc_name = "localai_q-web"
control_socket_disable = True


def on_starting(server: Any) -> None:
    """Once, in the master, before there are workers."""
    import api.app  # noqa: F401  (the workers are forked: what is imported here they need not import)
    from localai_q.services import keys, models
    from localai_q.services.wiring import connect
    from localai_q.store import migrate
    from localai_q.store.engine import engine

    try:
        migrate.upgrade(_settings.database_url)
        services = connect(_settings)
        keys.ensure_admin(services)
        models.ensure_default(services)
        engine(_settings.database_url).dispose()  # a connection must not cross a fork
    except StartupError as error:
        raise exit_on_startup_error(error) from error


def post_fork(server: Any, worker: Any) -> None:
    """In each worker, before it loads the application."""
    from api.postgres_wait import install

    install()


def post_worker_init(worker: Any) -> None:
    """In each worker: end its streams in time, when it is told to stop, so that their clients can come back."""
    import gevent

    def stop_streams() -> None:
        while worker.alive:
            gevent.sleep(0.1)
        gevent.sleep(_settings.web_drain)
        worker.wsgi.extensions["localai_q"].stop()

    gevent.spawn(stop_streams)


def child_exit(server: Any, worker: Any) -> None:
    """In the master, for each worker that has ended."""
    if workers > 1:
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(worker.pid)
