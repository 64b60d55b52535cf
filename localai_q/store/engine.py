"""The connection pool of a process, and how the driver's failures become our errors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import psycopg2
from sqlalchemy import Connection, Engine, create_engine, event, func, select
from sqlalchemy.exc import DBAPIError, DisconnectionError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from localai_q.errors import Unavailable

RESTED = 1.0  # seconds


@cache
def engine(database_url: str) -> Engine:
    """The process's engine for this URL. A connection that has rested is tried before it is used."""
    made = create_engine(
        database_url,
        pool_size=10,
        max_overflow=20,
        pool_timeout=5,
        connect_args={"connect_timeout": 3, "options": "-c statement_timeout=15000"},
    )
    event.listen(made, "checkin", _note_rest)
    event.listen(made, "checkout", _try_rested)
    return made


def _note_rest(connection: Any, record: Any) -> None:
    record.info["rests_since"] = time.monotonic()


def _try_rested(connection: Any, record: Any, _: Any) -> None:
    """A round trip for each use would cost as much as the insert that it precedes; one after a rest costs nothing."""
    if time.monotonic() - record.info.get("rests_since", time.monotonic()) < RESTED:
        return
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        connection.rollback()
    except psycopg2.Error as error:
        raise DisconnectionError from error


def clock(db: Connection) -> float:
    """Seconds since the epoch by Postgres' clock, which all times in rows are told by: that of a process may differ."""
    return float(db.execute(select(func.extract("epoch", func.now()))).scalar_one())


class Database:
    """Transactions on Postgres."""

    def __init__(self, database_url: str) -> None:
        self._engine = engine(database_url)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction that is committed at the end of the block.

        Raises:
            Unavailable: Postgres cannot be reached, or the pool is exhausted.
        """
        try:
            with self._engine.begin() as connection:
                yield connection
        except (OperationalError, PoolTimeout) as error:
            raise Unavailable("The database (Postgres) cannot be reached at the moment. Try again soon.") from error
        except DBAPIError as error:
            if error.connection_invalidated:
                raise Unavailable("The database (Postgres) was restarted. Try again.") from error
            raise
