"""Brings a database to the shape that this version needs. Any process may call it; one at a time does it."""

from __future__ import annotations

from importlib import resources

from alembic import command
from alembic.config import Config
from alembic.script.revision import ResolutionError
from alembic.util import CommandError
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from localai_q.errors import StartupError

LOCK = 0x10CA1A1  # advisory lock of this project's migrations


def upgrade(database_url: str) -> None:
    """Apply what is missing.

    Raises:
        StartupError: the database cannot be reached, or is newer than this version.
    """
    engine = create_engine(database_url)
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
            connection.commit()
            try:
                command.upgrade(config(connection), "head")
                connection.commit()
            finally:
                connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": LOCK})
                connection.commit()
    except OperationalError as error:
        reason = str(error.orig).strip().partition("\n")[0]
        raise StartupError(f"cannot reach Postgres (LOCALAI_DATABASE_URL): {reason}") from error
    except CommandError as error:
        if not isinstance(error.__cause__, ResolutionError):
            raise
        raise StartupError(f"the database is of a newer version than this one ({error}): install the newer") from error
    finally:
        engine.dispose()


def config(connection: object) -> Config:
    """Alembic's configuration for this connection."""
    made = Config()
    made.set_main_option("script_location", str(resources.files("localai_q.store") / "migrations"))
    made.attributes["connection"] = connection
    return made
