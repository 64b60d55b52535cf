"""What nodes report of their replicas, and what becomes of the registry's rows: adopted, cleared, measured, shown."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from cluster_data import add_model, claim, model_named, node_named, ready_node, reported, rung, watched
from sqlalchemy import text
from test_nodes_service import served_for, silent_for
from test_replicas_service import GB, all_replicas, ask, has, only

from localai_q import names, ports
from localai_q.bus.connection import client
from localai_q.cluster.capacity import Site
from localai_q.cluster.memory import Memory
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.states import NodeState, ReplicaState
from localai_q.errors import Unavailable
from localai_q.services import fleet, jobs, models, nodes, replicas
from localai_q.services.reports import LOST
from localai_q.services.wiring import Services, make_leases
from localai_q.store import measures
from localai_q.store import replicas as rows


@pytest.fixture
def ready(services: Services, node: Node) -> Replica:
    """A replica of a model of one GB that serves and was reported."""
    model_id = add_model(services, memory=GB, slots=2)
    has(services, node, 8)
    model = model_named(services, "m")
    replicas.place(services, model, node.id)
    placed = only(services)
    with services.db.transaction() as db:
        for state in (ReplicaState.INSTALLING, ReplicaState.LOADING, ReplicaState.READY):
            rows.move(db, placed.id, state)
    beat(services, placed)
    found = only(services)
    assert (found.model_id, found.reserved) == (model_id, Memory(ram=GB))
    return found


def beat(services: Services, *live: Replica, **values: object) -> dict:
    """The node reports these replicas' processes."""
    told = [reported(replica, **values) for replica in live]
    return nodes.heartbeat(services, node_named(services, "n1"), hardware={}, reported=told)


def lose(services: Services) -> None:
    with services.db.transaction() as db:
        db.execute(text("DELETE FROM replicas"))


def measured(services: Services) -> list[tuple[float, float]]:
    with services.db.transaction() as db:
        return [(each.tokens_per_second, each.load_seconds) for each in measures.every(db)]


def test_a_live_replica_whose_row_was_lost_is_entered_again_with_its_booking(
    services: Services, ready: Replica
) -> None:
    lose(services)
    assert beat(services, ready) == {"state": NodeState.READY, "stop": []}
    again = only(services)
    assert (again.id, again.state, again.number, again.slots) == (ready.id, ReplicaState.READY, 1, 2)
    assert (again.reserved, again.unseen) == (ready.reserved, ready.unseen)
    beat(services, ready)
    assert only(services) == again, "once"
    ask(services)
    replicas.reconcile(services)
    assert only(services) == again, "nothing is loaded besides it"


def test_what_an_adopted_replica_takes_is_not_taken_off_twice(services: Services, ready: Replica) -> None:
    lose(services)
    nodes.heartbeat(
        services, node_named(services, "n1"), hardware={"ram_available": 5 * GB}, reported=[reported(ready)]
    )
    assert Site(node_named(services, "n1"), [only(services)]).free.ram == 5 * GB


def test_a_context_that_was_cut_to_fit_is_adopted_as_it_is(services: Services, ready: Replica) -> None:
    lose(services)
    beat(services, ready, context_size=512)
    assert only(services).context_size == 512


def test_a_node_that_an_old_copy_of_the_registry_calls_ready_speaks_before_anything_goes_there(
    services: Services, ready: Replica
) -> None:
    lose(services)
    silent_for(services, "n1", nodes.UNHEALTHY_AFTER + 1)
    asked = ask(services)
    replicas.reconcile(services)
    replicas.place(services, model_named(services, "m"), ready.node_id)
    assert all_replicas(services) == []
    assert services.leases.live([asked])[asked].state == "waiting", "nobody is told that it cannot be had"
    assert beat(services, ready) == {"state": NodeState.READY, "stop": []}
    replicas.reconcile(services)
    assert only(services).id == ready.id, "the live process serves"


def test_what_nobody_asked_for_comes_at_once_when_a_silent_node_speaks(services: Services, node: Node) -> None:
    add_model(services, min_replicas=1)
    silent_for(services, "n1", nodes.UNHEALTHY_AFTER + 1)
    replicas.reconcile(services)
    assert all_replicas(services) == []
    beat(services)
    replicas.reconcile(services)
    assert only(services).node_id == node.id


def test_a_node_that_was_offline_brings_its_replicas_back(services: Services, ready: Replica) -> None:
    served_for(services, 100)
    silent_for(services, "n1", 100)
    nodes.watch_health(services)
    assert node_named(services, "n1").state is NodeState.OFFLINE
    assert all_replicas(services) == []
    assert beat(services, ready) == {"state": NodeState.READY, "stop": []}
    assert only(services).id == ready.id


def test_a_node_that_drains_gets_its_replica_back_to_finish_it(services: Services, ready: Replica) -> None:
    lose(services)
    nodes.drain(services, node_named(services, "n1"))
    assert beat(services, ready) == {"state": NodeState.DRAINING, "stop": []}
    replicas.reconcile(services)
    assert only(services).state is ReplicaState.STOPPING
    assert rung(services, names.node_queue(ready.node_id))[-1].endswith(f"({ready.id})")


def test_what_is_not_as_the_registry_wants_it_is_stopped(services: Services, ready: Replica) -> None:
    lose(services)
    assert beat(services, ready, revision=2)["stop"] == [ready.id]
    assert beat(services, ready, model_id="other")["stop"] == [ready.id]
    models.remove(services, "m")
    assert beat(services, ready)["stop"] == [ready.id]
    assert all_replicas(services) == []


def test_a_node_cannot_adopt_the_replica_of_another(services: Services, ready: Replica) -> None:
    thief = ready_node(services, "n2")
    answer = nodes.heartbeat(services, thief, hardware={}, reported=[reported(ready)])
    assert answer["stop"] == [ready.id]
    assert only(services) == ready


def test_a_place_that_is_taken_is_taken(services: Services, ready: Replica) -> None:
    lose(services)
    replicas.place(services, model_named(services, "m"), ready.node_id)
    placed = only(services)
    assert beat(services, ready)["stop"] == [ready.id]
    assert only(services) == placed


def test_reports_at_once_make_one_row(services: Services, ready: Replica) -> None:
    lose(services)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: beat(services, ready), range(8)))
    assert all(answer["stop"] == [] for answer in answers)
    assert only(services).id == ready.id


def test_a_row_without_a_process_is_cleared_when_it_was_missed_twice_and_what_it_held_is_given_back(
    services: Services, ready: Replica
) -> None:
    watched(services)
    job_id = ask(services)
    line = names.model_queue(ready.model_id)
    lease = services.leases.claim(job_id, line, owner=f"{ready.id}.x", node_id=ready.node_id, revision=1)
    beat(services)
    assert only(services).state is ReplicaState.READY
    beat(services, ready)
    beat(services)
    assert only(services).state is ReplicaState.READY, "twice in a row"
    assert services.leases.renew([lease]) == [1]
    beat(services)
    cleared = only(services)
    assert (cleared.state, cleared.reason) == (ReplicaState.FAILED, LOST)
    assert services.leases.waiting(line) == [job_id]
    with services.db.transaction() as db:
        db.execute(text("UPDATE replicas SET changed_at = changed_at - interval '1 minute'"))
    replicas.reconcile(services)
    assert only(services).state is ReplicaState.INSTALLING, "it is placed anew"


def test_what_was_ordered_a_moment_ago_is_not_missed(services: Services, ready: Replica) -> None:
    beat(services)
    with services.db.transaction() as db:
        rows.touch(db, ready.id)
    beat(services)
    assert only(services).state is ReplicaState.READY
    beat(services)
    assert only(services).state is ReplicaState.READY
    beat(services)
    assert only(services).state is ReplicaState.FAILED


def test_a_readiness_that_was_never_heard_is_learned_from_a_report(services: Services, ready: Replica) -> None:
    with services.db.transaction() as db:
        db.execute(text("UPDATE replicas SET state = 'loading', changed_at = now() - interval '1 minute'"))
    beat(services, ready)
    assert only(services).state is ReplicaState.READY


def test_measures_are_kept_with_a_bounded_rate_and_outlive_the_replica(services: Services, ready: Replica) -> None:
    assert measured(services) == []
    beat(services, ready, load_seconds=4.0)
    beat(services, ready, load_seconds=4.0, tokens_per_second=10.0)
    assert measured(services) == [(10.0, 4.0)]
    assert only(services).speed == 10.0
    beat(services, ready, load_seconds=5.0, tokens_per_second=20.0)
    assert measured(services) == [(10.0, 4.0)], "not so soon"
    with services.db.transaction() as db:
        db.execute(text("UPDATE measures SET updated_at = now() - interval '2 minutes'"))
    beat(services, ready, load_seconds=5.0)
    assert measured(services) == [(10.0, 5.0)], "what was not measured is not forgotten"
    nodes.report_replica(services, node_named(services, "n1"), ready.id, ReplicaState.GONE, "")
    assert measured(services) == [(10.0, 5.0)]
    models.remove(services, "m")
    assert measured(services) == []


def test_a_lie_about_a_known_replica_is_corrected_and_logged(
    services: Services, ready: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    other = add_model(services, "other")
    answer = beat(services, ready, model_id=other, in_flight=1000, tokens_per_second=7.0)
    assert answer["stop"] == []
    assert "what cannot be" in caplog.text
    with services.db.transaction() as db:
        assert [each.model_id for each in measures.every(db)] == [ready.model_id]
    assert node_named(services, "n1").report[ready.id]["in_flight"] == ready.slots


def test_what_was_measured_and_reported_is_shown(services: Services, ready: Replica) -> None:
    beat(services, ready, load_seconds=4.0, tokens_per_second=10.0, in_flight=1)
    (shown,) = fleet.show(services, "n1")["replicas"]
    assert (shown["tokens_per_second"], shown["load_seconds"]) == (10.0, 4.0)
    assert shown["reported"] == node_named(services, "n1").reported
    (loaded,) = fleet.loaded_models(services)
    assert (loaded["tokens_per_second"], loaded["in_flight"]) == (10.0, 0)
    beat(services)
    (shown,) = fleet.show(services, "n1")["replicas"]
    assert shown["reported"] is None
    assert {"secret_hash", "report", "missed"}.isdisjoint(fleet.show(services, "n1"))


def test_while_redis_is_away_the_last_report_says_what_a_replica_holds(services: Services, ready: Replica) -> None:
    beat(services, ready, in_flight=1)
    away = replace(services, leases=make_leases(client(f"redis://127.0.0.1:{ports.choose()}"), services.settings))
    shown = fleet.show(away, "n1")
    assert (shown["in_flight"], [each["in_flight"] for each in shown["replicas"]]) == (None, [1])
    beat(services)
    assert [each["in_flight"] for each in fleet.show(away, "n1")["replicas"]] == [None]


def test_while_redis_is_away_nodes_are_heard_and_nothing_is_forgotten(services: Services, ready: Replica) -> None:
    nowhere = client(f"redis://127.0.0.1:{ports.choose()}")
    away = replace(services, redis=nowhere, leases=make_leases(nowhere, services.settings))
    served_for(services, 100)
    silent_for(services, "n1", 100)
    with pytest.raises(Unavailable):
        nodes.watch_health(away)
    assert node_named(services, "n1").state is NodeState.READY
    assert beat(away, ready) == {"state": NodeState.READY, "stop": []}
    assert all_replicas(services) == [ready]


def test_ends_of_what_an_adopted_replica_held_are_written(services: Services, ready: Replica) -> None:
    job_id = ask(services)
    claim(services, job_id, names.model_queue(ready.model_id), ready.node_id)
    lose(services)
    beat(services, ready)
    jobs.apply_ends(services)
    assert services.leases.live([job_id])[job_id].state == "leased"
