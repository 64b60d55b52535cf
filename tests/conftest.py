"""What tests stand on: one embedded Postgres and one embedded Valkey per session, each test with clean data in them.

A test's database has the tables and no row. Servers that a test wants to kill it starts itself.
"""

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from e2e_cluster import folder_of_homes
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool
from xdist.scheduler import LoadScopeScheduling

from localai_q import ports
from localai_q.config import Settings, load_settings
from localai_q.embedded.postgres import Postgres
from localai_q.embedded.valkey import Valkey

TEMPLATE = "template_of_tests"
SECRET_TOKEN = "join-us"
ONE_PROCESS = ("shared", "faults")  # folders whose tests share a cluster
counter = itertools.count(1)


class ByCluster(LoadScopeScheduling):
    """Where tests run in several processes: those that share a cluster, or a file, run in one."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, _ = nodeid.partition("::")
        folder = Path(file).parent.name
        return folder if folder in ONE_PROCESS else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByCluster:
    return ByCluster(config, log)


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps the tests away from a cluster that the person who runs them may have."""
    home = tmp_path_factory.mktemp("default-home")
    for name in [name for name in os.environ if name.startswith("LOCALAI_")]:
        del os.environ[name]
    os.environ["LOCALAI_Q_HOME"] = str(home)
    return home


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    # Not below pytest's folder: another session closes that to other users, such as the one Postgres runs as under root.
    with folder_of_homes("lqpg") as folder:
        server = Postgres(folder)
        server.start()
        server.wait_ready()
        yield server
        server.stop(5.0)


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    server = Valkey(tmp_path_factory.mktemp("valkey"), port=ports.choose(), password="tests")
    server.start()
    server.wait_ready()
    yield server
    logging.disable()  # threads that live as long as the process would complain of its absence
    server.stop(3.0)


@pytest.fixture(scope="session")
def make_database(postgres: Postgres) -> Iterator[Callable[..., str]]:
    """Makes a database and returns its URL: a clone of the migrated template, or an empty one."""
    from localai_q.store import migrate

    owner = create_engine(postgres.url, isolation_level="AUTOCOMMIT")
    with owner.connect() as connection:  # the databases are to survive the tests, not a loss of power
        connection.execute(text("ALTER SYSTEM SET fsync = off"))
        connection.execute(text("SELECT pg_reload_conf()"))

    def make(name: str, template: str = TEMPLATE) -> str:
        # None is dropped: that would cost a checkpoint each.
        name = name if name == TEMPLATE else f"{name}_{next(counter)}"
        with owner.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
        return make_url(postgres.url).set(database=name).render_as_string(hide_password=False)

    migrate.upgrade(make(TEMPLATE, "template0"))
    yield make
    owner.dispose()


class Emptied:
    """Migrated databases without a row. One is used again when nobody is connected to it any more: a copy costs 8 MB."""

    def __init__(self, make: Callable[..., str], server: Postgres) -> None:
        self._make = make
        self._owner = create_engine(server.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        self._known: list[str] = []

    def give(self) -> str:
        """The URL of one."""
        for url in self._known:
            if not self._in_use(url):
                _empty(url)
                return url
        self._known.append(self._make("test"))
        return self._known[-1]

    def _in_use(self, url: str) -> bool:
        query = text("SELECT count(*) FROM pg_stat_activity WHERE datname = :name")
        with self._owner.connect() as connection:
            return bool(connection.execute(query, {"name": make_url(url).database}).scalar())


def _empty(url: str) -> None:
    from localai_q.store.tables import metadata

    emptying = create_engine(url, poolclass=NullPool)
    with emptying.begin() as connection:
        connection.execute(text("; ".join(f"DELETE FROM {table.name}" for table in reversed(metadata.sorted_tables))))


@pytest.fixture(scope="session")
def emptied(make_database: Callable[..., str], postgres: Postgres) -> Emptied:
    return Emptied(make_database, postgres)


@pytest.fixture
def database_url(emptied: Emptied) -> Iterator[str]:
    from localai_q.store.engine import engine

    url = emptied.give()
    yield url
    engine(url).dispose()


@pytest.fixture
def redis_client(valkey: Valkey) -> redis.Redis:
    """The client that our processes use too, on an empty Valkey; with a pool of its own, for threads keep connections."""
    from localai_q.bus.connection import client

    client.cache_clear()
    found = client(valkey.url)
    found.flushall()
    return found


@pytest.fixture
def settings(database_url: str, valkey: Valkey, tmp_path: Path) -> Settings:
    return load_settings(
        home=tmp_path / "home",
        database_url=database_url,
        redis_url=valkey.url,
        registration_token=SECRET_TOKEN,
        lease=30.0,
        max_waiting=20,
    )


@pytest.fixture
def services(settings: Settings, redis_client: redis.Redis):
    """Use cases on both servers; doorbells ring there, too."""
    from localai_q.celery import app
    from localai_q.services.wiring import connect

    app.conf.broker_url = settings.redis_url
    return connect(settings)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model's file, named by its SHA-256 as a node has it."""
    from localai_q.gallery import catalog
    from workers.node.fetcher import Wanted, fetch
    from workers.node.sources import Access

    model = catalog.default_model()
    wanted = Wanted(source=model.source, sha256=model.sha256)
    return fetch(wanted, tmp_path_factory.mktemp("models"), Access(load_settings(), "", "", ""), lambda _: None)
