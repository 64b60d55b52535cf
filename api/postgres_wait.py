"""How a web process waits for Postgres: as gevent does, so that no stream is blocked meanwhile, and not for long.

A database that hangs would hold each request until its client gives up. Once it has, the next ones are told so sooner.
"""

from __future__ import annotations

import time
from typing import Any

import psycopg2
from psycogreen.gevent import gevent_wait_callback
from psycopg2.extensions import set_wait_callback

PATIENCE = 4.0  # seconds for one answer
SUSPICION = 0.3  # the same, when the last one did not come
SUSPECTED = 10.0  # seconds for which that is remembered


class Wait:
    """psycopg2's wait callback."""

    def __init__(self) -> None:
        self._hung_at = float("-inf")

    def __call__(self, connection: Any) -> None:
        """Wait until the connection has its answer.

        Raises:
            psycopg2.OperationalError: it does not come.
        """
        suspected = time.monotonic() - self._hung_at < SUSPECTED
        try:
            gevent_wait_callback(connection, timeout=SUSPICION if suspected else PATIENCE)
        except TimeoutError as error:
            self._hung_at = time.monotonic()
            raise psycopg2.OperationalError("Postgres does not answer") from error
        self._hung_at = float("-inf")


def install() -> None:
    """Have every connection of this process wait so."""
    set_wait_callback(Wait())
