"""A model that somebody waits for comes up on a node, stage by stage; what fails is told, waited for and tried again.

The node's side is done by the test: it ends the stages' jobs as a node would, and reports as a node would.
"""

import pytest
from cluster_data import add_model, claim, ready_node, rung
from sqlalchemy import text

from localai_q import names
from localai_q.cluster.events import End
from localai_q.cluster.jobs import Keep
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.requests import GenerationRequest
from localai_q.cluster.stages import SILENT_LOAD
from localai_q.cluster.states import JobState, ReplicaState
from localai_q.errors import GenerationFailed, ModelUnavailable, to_record
from localai_q.services import generations, jobs, models, nodes, replicas
from localai_q.services.snapshots import Snapshots
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from localai_q.store import replicas as rows
from localai_q.store.keys import ApiKey

FILE = "file:/models/x.gguf"
ADMIN = ApiKey(id="admin", name="admin", role="admin", hint="", created=0.0)


def ask(services: Services, model: str = "m") -> str:
    request = GenerationRequest(kind="chat", model=model, body={"messages": []})
    accepted = generations.submit(
        services, Snapshots(services), request, key_id="k", job_id=names.new_id(), watcher="w", keep=Keep.NOT
    )
    return accepted.job_id


def all_replicas(services: Services) -> list[Replica]:
    with services.db.transaction() as db:
        return rows.every(db)


def only(services: Services) -> Replica:
    (found,) = all_replicas(services)
    return found


def older(services: Services, seconds: float) -> None:
    """Let so much time pass for every replica."""
    with services.db.transaction() as db:
        db.execute(text("UPDATE replicas SET changed_at = changed_at - make_interval(secs => :s)"), {"s": seconds})


def stage(services: Services, node: Node, *, failed: str = "") -> dict:
    """Do the one job that waits for the node, and have its end written down. Its request."""
    line = names.node_jobs_queue(node.id)
    (job_id,) = services.leases.waiting(line)
    lease = claim(services, job_id, line, node.id)
    error = to_record(GenerationFailed(failed)) if failed else None
    end = End(state=JobState.FAILED if failed else JobState.DONE, error=error, result={})
    assert services.leases.finish(lease, 1, end, node_id=node.id)
    jobs.apply_ends(services)
    return lease.request


def report(services: Services, node: Node, state: ReplicaState, reason: str = "") -> None:
    nodes.report_replica(services, node, only(services).id, state, reason)


def error_of(services: Services, job_id: str) -> dict | None:
    jobs.apply_ends(services)
    with services.db.transaction() as db:
        found = job_rows.by_id(db, job_id)
    assert found is not None
    return found.error


@pytest.fixture
def node(services: Services) -> Node:
    return ready_node(services)


def test_a_model_that_somebody_waits_for_comes_up_stage_by_stage(services: Services, node: Node) -> None:
    add_model(services, source=FILE, sha256="a" * 64, size=5, slots=3)
    ask(services)
    replicas.reconcile(services)
    found = only(services)
    assert (found.state, found.node_id, found.slots) == (ReplicaState.INSTALLING, node.id, 3)
    replicas.reconcile(services)
    assert only(services) == found  # nothing happens before the stage's end
    assert stage(services, node) == {"kind": "install_backend", "backend": "echo"}
    replicas.reconcile(services)
    assert only(services).state is ReplicaState.STAGING
    assert stage(services, node) == {
        "kind": "fetch_model", "source": FILE, "sha256": "a" * 64, "size": 5, "name": "m"
    }  # fmt: skip
    replicas.reconcile(services)
    assert only(services).state is ReplicaState.LOADING
    assert rung(services, names.node_queue(node.id)) == [f"start_replica({found.id})"]
    report(services, node, ReplicaState.READY)
    assert only(services).state is ReplicaState.READY
    replicas.reconcile(services)
    assert len(all_replicas(services)) == 1


def test_a_model_without_a_file_is_loaded_when_its_backend_is_there(services: Services, node: Node) -> None:
    add_model(services)
    ask(services)
    replicas.reconcile(services)
    stage(services, node)
    replicas.reconcile(services)
    assert only(services).state is ReplicaState.LOADING


def test_nobody_waits_and_nothing_is_loaded(services: Services, node: Node) -> None:
    add_model(services)
    replicas.reconcile(services)
    assert all_replicas(services) == []


def test_a_model_for_all_nodes_is_brought_up_on_each_before_anybody_asks(services: Services, node: Node) -> None:
    ready_node(services, "n2")
    add_model(services, spread_all=True)
    replicas.reconcile(services)
    replicas.reconcile(services)
    assert len({found.node_id for found in all_replicas(services)}) == len(all_replicas(services)) == 2


def test_a_failed_stage_is_told_to_those_who_wait_and_refused_to_those_who_come(services: Services, node: Node) -> None:
    add_model(services)
    waiting = ask(services)
    replicas.reconcile(services)
    stage(services, node, failed="no network to PyPI")
    replicas.reconcile(services)
    failed = only(services)
    assert (failed.state, failed.failures) == (ReplicaState.FAILED, 1)
    assert failed.reason == "installing: no network to PyPI"
    replicas.reconcile(services)
    assert services.leases.live([waiting])[waiting].state == "waiting"  # a first failure is only tried again
    older(services, 2.0)
    replicas.reconcile(services)
    stage(services, node, failed="no network to PyPI")
    replicas.reconcile(services)
    replicas.reconcile(services)
    error = error_of(services, waiting)
    assert error["error"] == "ModelUnavailable"
    assert "no network to PyPI" in error["message"]
    with pytest.raises(ModelUnavailable, match="no network to PyPI"):
        ask(services)


def test_a_failed_replica_is_tried_again_after_its_back_off_and_not_before(services: Services, node: Node) -> None:
    add_model(services, spread_all=True)
    replicas.reconcile(services)
    stage(services, node, failed="x")
    replicas.reconcile(services)
    replicas.reconcile(services)
    assert only(services).state is ReplicaState.FAILED
    older(services, 1.1)
    replicas.reconcile(services)
    assert (only(services).state, only(services).failures) == (ReplicaState.INSTALLING, 1)
    stage(services, node, failed="y")
    replicas.reconcile(services)
    older(services, 1.1)
    replicas.reconcile(services)
    assert only(services).state is ReplicaState.FAILED  # the second wait is longer
    older(services, 1.0)
    replicas.reconcile(services)
    stage(services, node)
    replicas.reconcile(services)
    report(services, node, ReplicaState.READY)
    assert (only(services).failures, only(services).reason) == (0, "")


def test_a_cancelled_stage_fails_its_replica(services: Services, node: Node) -> None:
    add_model(services)
    ask(services)
    replicas.reconcile(services)
    (job_id,) = services.leases.waiting(names.node_jobs_queue(node.id))
    assert jobs.cancel(services, job_id, ADMIN) == "cancelled"
    jobs.apply_ends(services)
    replicas.reconcile(services)
    assert only(services).state is ReplicaState.FAILED
    assert only(services).reason == "installing: The job was cancelled."


def test_a_node_that_did_not_hear_to_load_is_told_again(services: Services, node: Node) -> None:
    add_model(services)
    ask(services)
    replicas.reconcile(services)
    stage(services, node)
    replicas.reconcile(services)
    services.redis.delete(names.node_queue(node.id))
    replicas.reconcile(services)
    assert rung(services, names.node_queue(node.id)) == []
    older(services, SILENT_LOAD + 1)
    replicas.reconcile(services)
    replicas.reconcile(services)
    assert rung(services, names.node_queue(node.id)) == [f"start_replica({only(services).id})"]


def test_a_replica_is_stopped_by_its_node_and_then_gone(services: Services, node: Node) -> None:
    add_model(services)
    ask(services)
    replicas.reconcile(services)
    stage(services, node)
    replicas.reconcile(services)
    report(services, node, ReplicaState.READY)
    services.redis.delete(names.node_queue(node.id))
    with services.db.transaction() as db:
        db.execute(text("UPDATE models SET revision = 2"))
    replicas.reconcile(services)
    assert only(services).state is ReplicaState.STOPPING
    assert rung(services, names.node_queue(node.id)) == [f"stop_replica({only(services).id})"]
    replicas.stop(services, only(services).id, "twice")
    assert len(rung(services, names.node_queue(node.id))) == 1
    report(services, node, ReplicaState.GONE)
    assert all_replicas(services) == []


def test_two_models_on_one_node_share_the_installation_of_their_backend(services: Services, node: Node) -> None:
    for name in ("a", "b"):
        add_model(services, name)
        ask(services, name)
    replicas.reconcile(services)
    assert len(services.leases.waiting(names.node_jobs_queue(node.id))) == 1
    stage(services, node)
    replicas.reconcile(services)
    assert [found.state for found in all_replicas(services)] == [ReplicaState.LOADING] * 2


def test_removing_a_model_tells_those_who_wait_and_stops_its_replicas(services: Services, node: Node) -> None:
    add_model(services)
    waiting = [ask(services), ask(services)]
    running = ask(services)
    line = services.leases.live([running])[running].line
    claim(services, running, line)
    replicas.reconcile(services)
    replica_id = only(services).id
    models.remove(services, "m")
    for job_id in waiting:
        assert error_of(services, job_id) == {
            "error": "ModelNotFound", "message": "The model 'm' was removed.", "param": None
        }  # fmt: skip
    assert error_of(services, running) is None  # what runs may end
    assert all_replicas(services) == []
    assert rung(services, names.node_queue(node.id)) == [f"stop_replica({replica_id})"]
    replicas.reconcile(services)
    assert all_replicas(services) == []


def test_a_line_of_any_length_is_told_that_its_model_was_removed(services: Services, node: Node) -> None:
    line = names.model_queue(add_model(services))
    last = ask(services)
    services.redis.zadd(names.waiting_key(line), {f"lost{number}": number for number in range(1500)})
    models.remove(services, "m")
    assert error_of(services, last)["error"] == "ModelNotFound"
    assert services.redis.exists(line, names.waiting_key(line)) == 0


def test_a_stage_ends_with_the_last_model_that_needs_it(services: Services, node: Node) -> None:
    for name in ("a", "b"):
        add_model(services, name)
        ask(services, name)
    replicas.reconcile(services)
    (stage_id,) = services.leases.waiting(names.node_jobs_queue(node.id))
    models.remove(services, "a")
    assert error_of(services, stage_id) is None
    models.remove(services, "b")
    assert error_of(services, stage_id)["message"] == "The model 'b' was removed."
    assert services.leases.waiting(names.node_jobs_queue(node.id)) == []
