"""What a node may hold: as it says itself, and as an admin says, which goes before that and stays."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cluster_data import add_model, join, model_named, node_named, web_process

from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.states import ReplicaState
from localai_q.services import fleet, keys, models, nodes, replicas
from localai_q.services.wiring import Services
from localai_q.store import replicas as rows

GB = 10**9


@pytest.fixture
def call(services: Services, node: Node) -> Callable[..., dict[str, Any]]:
    """An admin's request about the node; fails on another status than `status`."""
    key = keys.create(services, name="a", role="admin")[1]

    def ask(method: str, path: str, status: int = 200, **more: Any) -> dict[str, Any]:
        with web_process(services.settings) as app, app.test_client() as http:
            answer = http.open(
                f"/api/nodes/n1{path}", method=method, headers={"Authorization": f"Bearer {key}"}, **more
            )
        assert answer.status_code == status, answer.text
        return answer.get_json()

    return ask


def there(services: Services, node: Node) -> list[Replica]:
    with services.db.transaction() as db:
        return rows.every(db, node_id=node.id)


def told(services: Services, node: Node, **hardware: Any) -> None:
    nodes.heartbeat(services, node, hardware=hardware)


def test_a_nodes_own_limits_are_shown_and_an_admins_go_before_them(services: Services, node: Node, call) -> None:
    assert call("GET", "")["max_replicas_per_model"] == 1
    told(services, node, ram_total=10 * GB, budget=9 * GB, max_replicas_per_model=2)
    shown = call("GET", "")
    assert (shown["vram_budget"], shown["vram_budget_bytes"], shown["vram_budget_manually_set"]) == ("", 9 * GB, False)
    assert (shown["max_replicas_per_model"], shown["max_replicas_per_model_manually_set"]) == (2, False)
    assert shown["labels"]["node.replica-slots"] == "2"

    changed = call("PUT", "/vram-budget", json={"value": "80%"})
    assert (changed["vram_budget"], changed["vram_budget_bytes"], changed["vram_budget_manually_set"]) == (
        "80%", 8 * GB, True
    )  # fmt: skip
    assert call("PUT", "/max-replicas-per-model", json={"value": 3})["max_replicas_per_model"] == 3
    nodes.deregister(services, node)
    join(services)
    told(services, node, budget=9 * GB, max_replicas_per_model=2)
    shown = call("GET", "")
    assert (shown["vram_budget_bytes"], shown["max_replicas_per_model"]) == (8 * GB, 3)
    assert shown["labels"]["node.replica-slots"] == "3"

    assert call("DELETE", "/vram-budget")["vram_budget_bytes"] == 9 * GB
    assert call("DELETE", "/max-replicas-per-model")["max_replicas_per_model"] == 2


@pytest.mark.parametrize("value", ["much", "-1", "80 %%", "", 5, None, ["80%"], "9" * 40])
def test_a_budget_of_no_known_form_is_refused_with_those_that_work(services: Services, call, value: Any) -> None:
    error = call("PUT", "/vram-budget", 400, json={"value": value})["error"]
    assert error["param"] == "value"
    if isinstance(value, str) and len(value) < 30:
        assert "8GB, 7.5GiB or 50%" in error["message"]
    assert call("GET", "")["vram_budget"] == ""


@pytest.mark.parametrize("value", [0, -1, 65, "3", 1.5, None, True])
def test_a_number_of_replicas_that_cannot_be_is_refused(services: Services, call, value: Any) -> None:
    assert call("PUT", "/max-replicas-per-model", 400, json={"value": value})["error"]["param"] == "value"
    assert call("PUT", "/max-replicas-per-model", 400, json={})["error"]["code"] == "missing_required_parameter"
    assert call("GET", "")["max_replicas_per_model"] == 1


def test_a_node_that_is_not_there_cannot_be_limited(services: Services, node: Node, call) -> None:
    nodes.remove(services, "n1", force=True)
    for path, value in (("/vram-budget", "80%"), ("/max-replicas-per-model", 2)):
        call("PUT", path, 404, json={"value": value})
        call("DELETE", path, 404)


def test_a_budget_of_an_admin_is_kept_when_replicas_are_placed(services: Services, node: Node) -> None:
    told(services, node, ram_total=10 * GB, ram_available=10 * GB, budget=10 * GB)
    fleet.limit(services, "n1", "vram_budget", "50%")
    add_model(services, "small", memory=3 * GB, min_replicas=1)
    add_model(services, "tall", memory=3 * GB, min_replicas=1)
    replicas.reconcile(services)
    assert len(there(services, node)) == 1
    fleet.limit(services, "n1", "vram_budget", "")
    replicas.reconcile(services)
    assert len(there(services, node)) == 2


def test_several_replicas_on_one_node_have_numbers_and_bookings_of_their_own(services: Services, node: Node) -> None:
    told(services, node, ram_available=10 * GB)
    fleet.limit(services, "n1", "max_replicas_per_model", 3)
    add_model(services, memory=3 * GB, min_replicas=5, max_replicas=5)
    replicas.reconcile(services)
    found = there(services, node)
    assert [replica.number for replica in found] == [1, 2, 3]
    assert len({replica.id for replica in found}) == 3
    with services.db.transaction() as db:
        rows.forget(db, found[1].id)
    replicas.reconcile(services)
    assert sorted(replica.number for replica in there(services, node)) == [1, 2, 3]
    (shown,) = fleet.listed(services)
    assert sorted(replica["number"] for replica in shown["replicas"]) == [1, 2, 3]


def test_many_who_place_at_once_never_exceed_the_limit(services: Services, node: Node) -> None:
    fleet.limit(services, "n1", "max_replicas_per_model", 3)
    add_model(services)
    model = model_named(services, "m")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: replicas.place(services, model, node.id), range(8)))
    assert sorted(replica.number for replica in there(services, node)) == [1, 2, 3]


def test_two_models_that_exclude_each_other_never_get_onto_one_node_however_many_place(
    services: Services, node: Node
) -> None:
    known = [model_named(services, n) for n in "abcdef" if add_model(services, n, concurrency_groups=("heavy", n))]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda model: replicas.place(services, model, node.id), known))
    (first,) = there(services, node)
    with services.db.transaction() as db:
        rows.move(db, first.id, ReplicaState.FAILED, reason="x")
    other = next(model for model in known if model.id != first.model_id)
    replicas.place(services, other, node.id)
    assert len(there(services, node)) == 2
    with services.db.transaction() as db:
        db.exec_driver_sql("UPDATE replicas SET changed_at = now() - interval '1 hour'")
    replicas._retry(services, first.id, {model.id: model for model in known})
    assert [r.state for r in there(services, node) if r.id == first.id] == [ReplicaState.FAILED]


def test_a_wish_that_cannot_be_met_is_shown_and_said_once_and_ends_with_what_makes_room(
    services: Services, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    told(services, node, ram_available=4 * GB)
    add_model(services, memory=3 * GB, min_replicas=2, max_replicas=2)
    caplog.set_level(logging.INFO, "localai_q.services.replicas")
    for _ in range(4):
        replicas.reconcile(services)
    (shown,) = models.listed(services)
    assert (shown["unmet"]["wanted"], shown["unmet"]["has"]) == (2, 1)
    assert shown["unmet"]["reason"] == "min_replicas is 2"
    assert shown["unmet"]["nodes"] == {"n1": "has a replica that is installing"}
    assert caplog.text.count("model m has 1 of 2 replicas (min_replicas is 2), and no node takes one more: n1: ") == 1
    fleet.limit(services, "n1", "max_replicas_per_model", 2)
    replicas.reconcile(services)
    assert "needs 3.0 GB, 1.0 GB free" in models.listed(services)[0]["unmet"]["nodes"]["n1"]
    told(services, node, ram_available=8 * GB)
    replicas.reconcile(services)
    replicas.reconcile(services)
    assert len(there(services, node)) == 2
    assert models.listed(services)[0]["unmet"] is None
    assert caplog.text.count("does not lack replicas any more") == 1
    assert caplog.text.count("model m has") == 1


def test_a_limit_of_a_node_is_looked_up_by_its_name_too(services: Services, node: Node) -> None:
    assert fleet.limits(services, "n1") == fleet.limits(services, node.id)
    assert node_named(services, "n1").replica_slots == 1
