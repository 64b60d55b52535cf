"""The connection pool of a process, and how the driver's failures become our errors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import psycopg2
from sqlalchemy import Connection, Dialect, Engine, create_engine, event, func, select
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
        pool_use_lifo=True,  # the one that has rested least is ready at once
        connect_args={"connect_timeout": 3, "options": "-c statement_timeout=15000"},
    )
    event.listen(made, "checkin", _note_rest)
    event.listen(made, "checkout", partial(_try_rested, made.dialect))
    return made


def _note_rest(connection: Any, record: Any) -> None:
    record.info["rests_since"] = time.monotonic()


def _try_rested(dialect: Dialect, connection: Any, record: Any, _: Any) -> None:
    """A round trip for each use would cost as much as the insert that it precedes; one after a rest costs little."""
    if time.monotonic() - record.info.get("rests_since", time.monotonic()) < RESTED:
        return
    try:
        dialect.do_ping(connection)
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
        with _errors(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def statement(self) -> Iterator[Connection]:
        """A connection for one statement, which is a transaction of its own: one round trip instead of three.

        Raises:
            Unavailable: as of `transaction`.
        """
        with _errors(), self._engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            driver.autocommit = True  # SQLAlchemy's own way to say so costs a round trip to take it back
            try:
                yield connection
            finally:
                if not driver.closed:
                    driver.autocommit = False


@contextmanager
def _errors() -> Iterator[None]:
    """Turn the driver's failures into ours."""
    try:
        yield
    except (OperationalError, PoolTimeout) as error:
        raise Unavailable("The database (Postgres) cannot be reached at the moment. Try again soon.") from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise Unavailable("The database (Postgres) was restarted. Try again.") from error
        raise
