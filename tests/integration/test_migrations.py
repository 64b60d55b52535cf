"""Migrations bring any database to the shape that the code expects, whoever runs them and however often."""

import threading
from collections.abc import Callable

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text
from waiting import LIMIT

from localai_q.errors import StartupError
from localai_q.store import migrate
from localai_q.store.tables import metadata


@pytest.fixture
def empty_url(make_database: Callable[..., str]) -> str:
    return make_database("migrated_by_hand", "template0")


def differences(url: str) -> list:
    engine = create_engine(url)
    with engine.connect() as connection:
        found = compare_metadata(
            MigrationContext.configure(connection, opts={"compare_server_default": True}), metadata
        )
    engine.dispose()
    return found


def test_an_empty_database_gets_the_shape_of_the_tables_and_a_second_run_changes_nothing(empty_url: str) -> None:
    assert differences(empty_url)
    migrate.upgrade(empty_url)
    assert differences(empty_url) == []
    migrate.upgrade(empty_url)
    assert differences(empty_url) == []


def test_processes_that_migrate_at_once_all_succeed(empty_url: str) -> None:
    failures: list[Exception] = []

    def run() -> None:
        try:
            migrate.upgrade(empty_url)
        except Exception as error:  # noqa: BLE001  (a thread's failure is shown by the test)
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert failures == []
    assert differences(empty_url) == []


def test_the_lock_of_migrations_is_free_afterwards(empty_url: str) -> None:
    migrate.upgrade(empty_url)
    engine = create_engine(empty_url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": migrate.LOCK}).scalar_one()
        assert "jobs" in inspect(connection).get_table_names()
    engine.dispose()


def test_a_database_that_cannot_be_reached_is_named_in_one_line() -> None:
    with pytest.raises(StartupError, match="LOCALAI_DATABASE_URL") as raised:
        migrate.upgrade("postgresql+psycopg2://x@127.0.0.1:1/x")
    assert "\n" not in raised.value.message


def test_a_database_of_a_newer_version_is_refused_with_a_reason(empty_url: str) -> None:
    migrate.upgrade(empty_url)
    engine = create_engine(empty_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(StartupError, match="newer"):
        migrate.upgrade(empty_url)
