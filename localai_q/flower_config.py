"""Flower's options, as `celery -A localai_q flower --conf=localai_q/flower_config.py` reads them from module names.

Flower shows every task and can stop workers: it listens on loopback only, behind a password.
"""

from __future__ import annotations

from localai_q.config import exit_on_startup_error, settings
from localai_q.errors import StartupError

if not settings().flower_password:
    raise exit_on_startup_error(
        StartupError("Flower needs a password: set LOCALAI_Q_FLOWER_PASSWORD, or run 'localai-q up', which makes one")
    )

address = "127.0.0.1"
port = settings().flower_port or 5555
basic_auth = [f"admin:{settings().flower_password}"]
max_tasks = 10_000
persistent = False
