"""What `/healthz` and `/readyz` say while something is away. Anybody may ask, so no address is told."""

from typing import Any

import pytest
from cluster_data import web_process

from localai_q import ports
from localai_q.config import Settings
from localai_q.services.wiring import Services
from localai_q.store import leaders

AWAY = "cannot be reached at the moment"


def asked(settings: Settings) -> tuple[int, dict[str, Any]]:
    """The answer of a web process with these settings; it lives, whatever is away."""
    with web_process(settings) as app, app.test_client() as http:
        assert http.get("/healthz").status_code == 200
        answer = http.get("/readyz")
    assert "127.0.0.1" not in answer.text
    return answer.status_code, answer.get_json()


def test_all_that_is_there_is_ready(services: Services) -> None:
    with services.db.transaction() as db:
        assert leaders.lead(db, "ends", "somebody", seconds=60)
    assert asked(services.settings) == (200, {"status": "ok", "database": "ok", "control": "ok", "broker": "ok"})


def test_a_control_process_that_was_never_there_is_named(services: Services) -> None:
    status, body = asked(services.settings)
    assert (status, body["status"], body["database"], body["broker"]) == (503, "unavailable", "ok", "ok")
    assert body["control"] == "no turn lately: never started"


@pytest.mark.parametrize(
    ("setting", "url", "part"),
    [
        ("database_url", "postgresql+psycopg2://nobody@127.0.0.1:{port}/nothing", "database"),
        ("redis_url", "redis://127.0.0.1:{port}/0", "broker"),
    ],
)
def test_a_store_that_is_away_is_named(services: Services, setting: str, url: str, part: str) -> None:
    nowhere = url.format(port=ports.choose())
    status, body = asked(services.settings.model_copy(update={setting: nowhere}))
    assert (status, body["status"]) == (503, "unavailable")
    assert AWAY in body[part]
    other = {"database": "broker", "broker": "database"}[part]
    assert body[other] == "ok"
