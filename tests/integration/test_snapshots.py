"""What the database is asked for one request, and how a web process keeps what it knows of the registry."""

import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import psycopg2.extensions
import pytest
from cluster_data import add_model, model_named
from psycopg2.extras import wait_select
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from waiting import wait_for

from localai_q import names
from localai_q.cluster.jobs import Keep
from localai_q.cluster.requests import GenerationRequest
from localai_q.errors import Unavailable
from localai_q.services import generations, snapshots
from localai_q.services.router import Router
from localai_q.services.snapshots import Snapshots
from localai_q.services.wiring import Services
from localai_q.store import engine

PING = "SELECT 1"


def ask(services: Services, web: Router) -> str:
    request = GenerationRequest(kind="chat", model="m", body={"messages": [{"role": "user", "content": "x"}]})
    return generations.submit(
        services, web, request, key_id="k", job_id=names.new_id(), watcher="w", keep=Keep.NOT
    ).job_id


@pytest.fixture
def trips() -> Iterator[list[Any]]:
    """The round trips to Postgres, as psycopg2 waits for each."""
    made: list[Any] = []

    def wait(connection: Any) -> None:
        made.append(connection)
        wait_select(connection)

    psycopg2.extensions.set_wait_callback(wait)
    yield made
    psycopg2.extensions.set_wait_callback(None)


@pytest.fixture
def known(services: Services, monkeypatch: pytest.MonkeyPatch) -> Iterator[Snapshots]:
    """A registry with a model that was read, and is not read again by itself."""
    add_model(services)
    found = Snapshots(services)
    found.now()
    monkeypatch.setattr(found, "_lasts", math.inf)
    yield found
    found._asked = -math.inf  # nobody has asked for long


def test_a_request_costs_one_round_trip_and_is_in_the_database_then(
    services: Services, known: Snapshots, trips: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    web = Router(services, known)
    ask(services, web)
    monkeypatch.setattr(engine, "RESTED", math.inf)
    trips.clear()
    job_id = ask(services, web)
    assert len(trips) == 1
    with services.db.transaction() as db:
        assert db.execute(text("SELECT state FROM jobs WHERE id = :id"), {"id": job_id}).scalar_one() == "open"


def test_a_connection_that_has_rested_is_tried_with_one_round_trip(
    services: Services, trips: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with services.db.statement() as db:
        db.execute(text(PING))
    for rested, more in ((math.inf, 0), (-1.0, 1)):
        monkeypatch.setattr(engine, "RESTED", rested)
        trips.clear()
        with services.db.statement() as db:
            db.execute(text(PING))
        assert len(trips) == 1 + more


def test_what_follows_a_single_statement_is_a_transaction_again(services: Services) -> None:
    add_model(services)
    for statement in (PING, "SELECT nothing FROM nowhere"):
        with suppress(ProgrammingError), services.db.statement() as db:
            db.execute(text(statement))
        with suppress(ZeroDivisionError), services.db.transaction() as db:
            db.execute(text("DELETE FROM models"))
            raise ZeroDivisionError
        assert model_named(services, "m")


def test_the_registry_is_read_ahead_while_somebody_asks_and_not_for_ever(
    services: Services, known: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "_lasts", 0.01)
    monkeypatch.setattr(snapshots, "FRESH", 0.01)
    known.start()
    seen = {id(known.now())}
    assert wait_for(lambda: (seen.add(id(known._last)), len(seen) > 3)[1], 60), "although nobody has asked again"
    known._asked -= snapshots.KEPT

    def rests() -> bool:
        before = known._read
        time.sleep(0.5)
        return known._read == before

    assert wait_for(rests, 60), "it is not read for nobody"
    before = known._read
    known.now(younger_than=math.inf)
    assert wait_for(lambda: known._read > before, 60), "somebody has asked"


def test_a_database_that_is_away_for_a_moment_does_not_end_the_reading_ahead(
    services: Services, known: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "_lasts", 0.01)
    monkeypatch.setattr(snapshots, "FRESH", 0.01)
    take, tries = snapshots.take, []

    def away(of: Services) -> Any:
        tries.append(1)
        if len(tries) < 4:
            raise Unavailable("away")
        return take(of)

    before = known.now()
    monkeypatch.setattr(snapshots, "take", away)
    known.start()
    known.now(younger_than=math.inf)
    assert wait_for(lambda: known._last is not before, 60)


def test_who_needs_it_as_it_is_now_does_not_get_what_was_begun_before(
    services: Services, known: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on, take = threading.Event(), threading.Event(), snapshots.take

    def slowly(of: Services) -> Any:
        found = take(of)
        reading.set()
        assert go_on.wait(30)
        return found

    with ThreadPoolExecutor() as pool:
        monkeypatch.setattr(snapshots, "take", slowly)
        first = pool.submit(known.now, younger_than=0.0)
        assert reading.wait(30)
        with services.db.transaction() as db:
            db.execute(text("UPDATE models SET name = 'renamed'"))
        second = pool.submit(known.now, younger_than=0.0)
        go_on.set()
        assert list(first.result(30).models) == ["m"]
        assert list(second.result(30).models) == ["renamed"]
