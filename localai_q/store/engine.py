"""The connection pool of a process, and how the driver's failures become our errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from localai_q.errors import Unavailable


@cache
def engine(database_url: str) -> Engine:
    """The process's engine for this URL. Dead connections are noticed before they are used."""
    return create_engine(
        database_url,
        pool_size=10,
        max_overflow=20,
        pool_timeout=5,
        pool_pre_ping=True,
        connect_args={"connect_timeout": 3, "options": "-c statement_timeout=15000"},
    )


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
