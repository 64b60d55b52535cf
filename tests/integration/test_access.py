"""Who may call what: every route has a guard, and a node acts for itself only, with reports that are short and true.

The application is called in this process, on real stores.
"""

import logging
import re
from collections.abc import Iterator

import pytest
from cluster_data import SECRET, join, node_named, ready_node, web_process
from flask import Flask
from flask.testing import FlaskClient

from api.auth import GUARDS
from api.node import LARGEST_REPORT
from localai_q.cluster.reports import MOST_REPLICAS
from localai_q.cluster.states import NodeState
from localai_q.services import keys
from localai_q.services.wiring import Services

PUBLIC = {"/healthz", "/readyz", "/api/node/register"}
PROCESS = {"id": "r", "model_id": "m", "revision": 1, "number": 1, "state": "ready", "slots": 4}


@pytest.fixture
def app(services: Services) -> Iterator[Flask]:
    with web_process(services.settings) as made:
        yield made


@pytest.fixture
def http(app: Flask) -> Iterator[FlaskClient]:
    with app.test_client() as client:
        yield client


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def routes(app: Flask, blueprint: str) -> list[tuple[str, str]]:
    """Every method and path of a blueprint."""
    return [
        (method, rule.rule)
        for rule in app.url_map.iter_rules()
        if rule.endpoint.partition(".")[0] == blueprint
        for method in sorted((rule.methods or set()) - {"OPTIONS"})
    ]


def test_every_route_has_a_guard_and_the_public_ones_are_just_these(app: Flask) -> None:
    for rule in app.url_map.iter_rules():
        blueprint, dot, _ = rule.endpoint.partition(".")
        assert dot, f"{rule.rule} is outside of every blueprint"
        assert blueprint in GUARDS, rule.rule
    assert {path for _, path in routes(app, "public")} == PUBLIC


def test_an_admin_route_refuses_nobody_nonsense_users_and_nodes(
    app: Flask, http: FlaskClient, services: Services
) -> None:
    node = ready_node(services)
    _, user = keys.create(services, name="u", role="user")
    _, admin = keys.create(services, name="a", role="admin")
    expected = [({}, 401), (bearer("lai-wrong"), 401), (bearer(SECRET), 401), (bearer(node.secret_hash), 401),
                (bearer(services.settings.registration_token), 401), (bearer(user), 403)]  # fmt: skip
    found = [route for name in ("admin", "backends", "quantization") for route in routes(app, name)]
    assert len(found) > 25
    for method, path in found:
        url = re.sub("<[^>]*>", node.id, path)
        for headers, status in expected:
            assert http.open(url, method=method, headers=headers).status_code == status, (method, path, headers)
    assert node_named(services, "n1") == node, "nothing of that had an effect"
    assert http.get("/api/nodes", headers=bearer(admin)).status_code == 200


def test_a_nodes_route_is_for_that_node_only(app: Flask, http: FlaskClient, services: Services) -> None:
    node, other, pending = ready_node(services), ready_node(services, "n2"), join(services, "n3", "its-own")
    join(services, "n4", "another")
    _, admin = keys.create(services, name="a", role="admin")
    for method, path in routes(app, "node"):

        def call(node_id: str, secret: str, method: str = method, path: str = path) -> int:
            url = re.sub("<[^>]*>", "x", path.replace("<node_id>", node_id))
            return http.open(url, method=method, headers=bearer(secret)).status_code

        for secret in ("wrong", node.secret_hash, admin, "its-own"):
            assert call(node.id, secret) == 403, (method, path)
        assert call(pending["id"], "its-own") == 403, "it waits for approval"
        assert call("nobody", SECRET) == 403
    assert node_named(services, "n1") == node
    assert node_named(services, "n2") == other
    assert node_named(services, "n3").state is NodeState.PENDING


def test_a_node_drains_and_resumes_itself(http: FlaskClient, services: Services) -> None:
    node = ready_node(services)
    for act, state in (("drain", "draining"), ("resume", "ready")):
        answer = http.post(f"/api/node/{node.id}/{act}", headers=bearer(SECRET))
        assert answer.get_json() == {"id": node.id, "name": "n1", "state": state}


def test_an_admin_drains_labels_shows_and_deletes_over_http(http: FlaskClient, services: Services) -> None:
    ready_node(services)
    headers = bearer(keys.create(services, name="a", role="admin")[1])

    def call(method: str, path: str, status: int = 200, **more):
        answer = http.open(f"/api/nodes/{path}", method=method, headers=headers, **more)
        assert answer.status_code == status, answer.text
        return answer.get_json()

    assert call("PUT", "n1/labels", json={"zone": "attic"})["given"] == {"zone": "attic"}
    assert call("PATCH", "n1/labels", json={"a/b": "1"})["given"] == {"zone": "attic", "a/b": "1"}
    assert call("DELETE", "n1/labels/a/b")["given"] == {"zone": "attic"}
    assert call("GET", "n1/labels")["labels"] == {
        "node.name": "n1", "node.replica-slots": "1", "zone": "attic"
    }  # fmt: skip
    call("PUT", "n1/labels", 400, json=["x"])
    assert call("PATCH", "n1/labels", 400, json={"a b": "x"})["error"]["code"] == "invalid_value"
    assert call("DELETE", "n1/labels")["given"] == {}
    assert call("GET", "models") == {"models": []}
    assert call("POST", "n1/drain")["state"] == "draining"
    assert call("GET", "n1")["remains"] == {"replicas": 0, "in_flight": 0}
    assert call("DELETE", "n1", 409)["error"]["code"] == "conflict"
    call("DELETE", "n1?force=perhaps", 400)
    assert call("DELETE", "n1?force=true")["removed"]
    call("GET", "n1", 404)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"hardware": {"ram_total": 1, "ram_available": 2}}, 400),
        ({"hardware": {"cpus": -1}}, 400),
        ({"hardware": {"gpus": [{"index": 0, "vram_total": "24GB"}]}}, 400),
        ({"replicas": [PROCESS | {"id": f"r{number}"} for number in range(MOST_REPLICAS + 1)]}, 400),
        ({"replicas": [PROCESS, PROCESS]}, 400),
        ({"replicas": [PROCESS | {"id": "x" * 65}]}, 400),
        ({"replicas": [PROCESS | {"id": "../r"}]}, 400),
        ({"replicas": [PROCESS | {"in_flight": -1}]}, 400),
        ({"replicas": [PROCESS | {"tokens_per_second": "fast"}]}, 400),
        ({"replicas": [PROCESS | {"tokens_per_second": 1e12}]}, 400),
        ({"replicas": [{"id": "r"}]}, 400),
        ({"replicas": ["r"]}, 400),
        ({"running": ["r"]}, 400),
        ({"state": "ready"}, 400),
        ({"replicas": ["x" * LARGEST_REPORT]}, 413),
    ],
)
def test_an_oversized_or_lying_heartbeat_is_refused_and_logged(
    http: FlaskClient, services: Services, caplog: pytest.LogCaptureFixture, body: dict, status: int
) -> None:
    node = ready_node(services)
    with caplog.at_level(logging.WARNING, "api.node"):
        answer = http.post(f"/api/node/{node.id}/heartbeat", json=body, headers=bearer(SECRET))
    assert answer.status_code == status, answer.text
    assert node.id in caplog.text
    assert answer.get_json()["error"]["message"] in caplog.text
    assert node_named(services, "n1").hardware == node.hardware


def test_a_heartbeat_says_what_is_known_and_no_more(http: FlaskClient, services: Services) -> None:
    node = ready_node(services)
    told = {"hardware": {"cpus": 4, "colour": "red", "gpus": []}, "replicas": [PROCESS | {"mood": "good"}]}
    answer = http.post(f"/api/node/{node.id}/heartbeat", json=told, headers=bearer(SECRET))
    assert answer.get_json() == {"state": "ready", "stop": ["r"]}
    assert node_named(services, "n1").hardware == {"cpus": 4, "gpus": []}


def test_a_stolen_identity_and_a_wrong_token_are_refused_and_logged(
    http: FlaskClient, services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    node, thief = ready_node(services), join(services, "n2", "thief")
    assert http.post(f"/api/node/{node.id}/heartbeat", json={}, headers=bearer("thief")).status_code == 403
    assert http.post(f"/api/node/{thief['id']}/resume", headers=bearer("thief")).status_code == 403
    assert (node.id in caplog.text, thief["id"] in caplog.text) == (True, True)
    body = {"name": "n1", "token": "wrong", "secret_hash": "ab" * 32}
    assert http.post("/api/node/register", json=body).status_code == 403
    taken = {**body, "token": services.settings.registration_token}
    assert http.post("/api/node/register", json=taken).status_code == 409
    assert ("wrong token" in caplog.text, "without its secret" in caplog.text) == (True, True)
    large = {**taken, "version": "x" * LARGEST_REPORT}
    assert http.post("/api/node/register", json=large).status_code == 413
