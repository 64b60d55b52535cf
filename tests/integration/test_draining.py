"""A node is drained: it finishes what it has, shows what that is, and stays empty until it is resumed or deleted."""

import pytest
from cluster_data import SECRET, add_model, claim, join, node_named, ready_node, rung

from localai_q import names
from localai_q.bus.leases import Submission
from localai_q.cluster.capacity import Booking
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.states import JobState, NodeState, ReplicaState
from localai_q.errors import Conflict, Forbidden, NotFound
from localai_q.services import fleet, jobs, nodes, replicas
from localai_q.services.snapshots import take
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from localai_q.store import replicas as rows


def replica_in(services: Services, node: Node, model_id: str, state: ReplicaState) -> Replica:
    """A replica brought into this state by allowed moves."""
    road = {
        ReplicaState.PLACED: [],
        ReplicaState.LOADING: [ReplicaState.INSTALLING, ReplicaState.LOADING],
        ReplicaState.READY: [ReplicaState.INSTALLING, ReplicaState.LOADING, ReplicaState.READY],
        ReplicaState.FAILED: [ReplicaState.FAILED],
    }
    with services.db.transaction() as db:
        found = rows.place(db, model_id=model_id, node_id=node.id, number=1, revision=1, slots=4, booking=Booking())
        assert found is not None
        for step in road[state]:
            assert rows.move(db, found.id, step)
    return found


def all_replicas(services: Services) -> list[Replica]:
    with services.db.transaction() as db:
        return rows.every(db)


def state_of(services: Services, name: str = "n1") -> NodeState:
    return node_named(services, name).state


@pytest.fixture
def draining(services: Services, node: Node) -> Node:
    """A node that drains and has a ready replica."""
    replica_in(services, node, add_model(services), ReplicaState.READY)
    nodes.drain(services, node)
    return node_named(services, "n1")


def test_a_ready_replica_is_stopped_and_the_node_is_drained_once_it_is_gone(services: Services, node: Node) -> None:
    found = replica_in(services, node, add_model(services), ReplicaState.READY)
    assert nodes.drain(services, node) == {"id": node.id, "name": "n1", "state": NodeState.DRAINING}
    replicas.reconcile(services)
    assert [each.state for each in all_replicas(services)] == [ReplicaState.STOPPING]
    assert take(services).replicas[0].state is ReplicaState.STOPPING, "which is not routable"
    assert rung(services, names.node_queue(node.id)) == [f"stop_replica({found.id})"]
    replicas.reconcile(services)
    assert state_of(services) is NodeState.DRAINING
    nodes.report_replica(services, node, found.id, ReplicaState.GONE, "")
    replicas.reconcile(services)
    assert state_of(services) is NodeState.DRAINED


def test_what_waits_is_loaded_elsewhere_and_nothing_new_is_placed(services: Services, draining: Node) -> None:
    other = ready_node(services, "n2")
    add_model(services, "everywhere", spread_all=True)
    (found,) = all_replicas(services)
    services.redis.zadd(names.waiting_key(names.model_queue(found.model_id)), {"j1": 1})
    replicas.reconcile(services)
    assert {each.node_id for each in all_replicas(services) if each.id != found.id} == {other.id}
    assert len(all_replicas(services)) == 3


def test_what_was_on_its_way_up_is_dropped_with_its_stage(services: Services, node: Node) -> None:
    add_model(services, spread_all=True)
    replicas.reconcile(services)
    (found,) = all_replicas(services)
    assert found.state is ReplicaState.INSTALLING
    nodes.drain(services, node)
    replicas.reconcile(services)
    assert all_replicas(services) == []
    with services.db.transaction() as db:
        stage = job_rows.by_id(db, found.job_id)
    assert stage is not None
    assert (stage.state, "node n1 is draining" in stage.error["message"]) == (JobState.FAILED, True)
    replicas.reconcile(services)
    assert state_of(services) is NodeState.DRAINED


def test_a_failed_replica_keeps_no_node_from_being_drained(services: Services, node: Node) -> None:
    replica_in(services, node, add_model(services), ReplicaState.FAILED)
    nodes.drain(services, node)
    replicas.reconcile(services)
    replicas.reconcile(services)
    assert state_of(services) is NodeState.DRAINED


def test_what_remains_is_shown(services: Services, draining: Node) -> None:
    (found,) = all_replicas(services)
    line = names.model_queue(found.model_id)
    for job_id in ("j1", "j2"):
        services.leases.submit(Submission(job_id=job_id, line=line, request={}), longest_line=9)
        services.leases.claim(job_id, line, owner=f"{found.id}.x", node_id=draining.id, revision=1)
    own = jobs.submit_node_job(
        services, kind="fetch_model", node_id=draining.id, model_id=None, request={"source": "x"}
    )
    claim(services, own, names.node_jobs_queue(draining.id), draining.id)
    shown = fleet.show(services, "n1")
    assert shown["remains"] == {"replicas": 1, "in_flight": 3}
    assert [(each["in_flight"], each["slots"]) for each in shown["replicas"]] == [(2, 4)]
    nodes.resume(services, draining)
    assert fleet.show(services, draining.id)["remains"] is None
    assert fleet.loaded_models(services) == [
        {"model": "m", "node": "n1", "node_id": draining.id, "id": found.id, "number": 1, "state": ReplicaState.READY,
         "slots": 4, "in_flight": 2, "reason": "", "memory": {"ram": 0, "vram": 0}, "tokens_per_second": 0.0,
         "load_seconds": 0.0, "reported": None}
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["restart", "leave and return", "offline and back", "silence"])
def test_draining_survives_whatever_the_node_does(services: Services, draining: Node, how: str) -> None:
    from test_nodes_service import served_for, silent_for

    if how == "leave and return":
        nodes.deregister(services, draining)
        assert state_of(services) is NodeState.OFFLINE
    if how in ("offline and back", "silence"):
        served_for(services, 100)
        silent_for(services, "n1", 100)
        nodes.watch_health(services)
        assert state_of(services) is NodeState.OFFLINE
    answer = nodes.heartbeat(services, node_named(services, "n1"), hardware={}) if how == "silence" else join(services)
    assert answer["state"] == NodeState.DRAINING
    replicas.reconcile(services)
    if how == "restart":
        assert all_replicas(services) == []
    replicas.reconcile(services)
    assert state_of(services) is NodeState.DRAINED
    assert join(services)["state"] == NodeState.DRAINED


def test_a_node_that_is_away_drains_when_it_returns(services: Services, node: Node) -> None:
    nodes.deregister(services, node)
    assert nodes.drain(services, node_named(services, "n1"))["state"] == NodeState.OFFLINE
    assert join(services)["state"] == NodeState.DRAINING
    nodes.deregister(services, node)
    assert nodes.resume(services, node_named(services, "n1"))["state"] == NodeState.OFFLINE
    assert join(services)["state"] == NodeState.READY


@pytest.mark.parametrize("empty", [True, False])
def test_a_resumed_node_takes_work_again(services: Services, node: Node, empty: bool) -> None:
    nodes.drain(services, node)
    if empty:
        replicas.reconcile(services)
    assert nodes.resume(services, node_named(services, "n1"))["state"] == NodeState.READY
    assert nodes.resume(services, node_named(services, "n1"))["state"] == NodeState.READY
    assert join(services)["state"] == NodeState.READY


@pytest.mark.parametrize("act", [nodes.drain, nodes.resume])
@pytest.mark.parametrize("approved", [True, False])
def test_a_node_that_is_not_in_is_neither_drained_nor_let_in_by_resume(services: Services, act, approved: bool) -> None:
    join(services)
    if approved:
        nodes.approve(services, "n1")
    with pytest.raises(Conflict, match="nodes approve n1"):
        act(services, node_named(services, "n1"))
    assert node_named(services, "n1").approved is approved
    assert state_of(services) is NodeState.PENDING


class TestDeletion:
    def test_a_node_at_work_is_not_deleted_unless_forced(self, services: Services, node: Node) -> None:
        with pytest.raises(Conflict, match="nodes drain n1"):
            nodes.remove(services, "n1", force=False)
        nodes.drain(services, node)
        with pytest.raises(Conflict):
            nodes.remove(services, node.id, force=False)
        assert nodes.remove(services, node.id, force=True) == {"id": node.id, "name": "n1", "removed": True}
        assert fleet.listed(services) == []

    @pytest.mark.parametrize("state", [NodeState.PENDING, NodeState.DRAINED, NodeState.OFFLINE])
    def test_one_that_is_not_at_work_is(self, services: Services, state: NodeState) -> None:
        if state is NodeState.PENDING:
            join(services)
        else:
            found = ready_node(services)
            (nodes.drain if state is NodeState.DRAINED else nodes.deregister)(services, found)
            replicas.reconcile(services)
        assert state_of(services) is state
        nodes.remove(services, "n1", force=False)
        assert fleet.listed(services) == []

    def test_its_secret_is_worth_nothing_and_its_name_is_free(self, services: Services, node: Node) -> None:
        nodes.remove(services, "n1", force=True)
        with pytest.raises(Forbidden, match="not the secret"):
            nodes.authenticate(services, node.id, SECRET)
        answer = join(services, secret="another")
        assert answer["state"] == NodeState.PENDING
        assert answer["id"] != node.id

    def test_what_it_did_is_ended_or_goes_back_into_its_line(self, services: Services, node: Node) -> None:
        found = replica_in(services, node, add_model(services), ReplicaState.READY)
        line = names.model_queue(found.model_id)
        services.leases.submit(Submission(job_id="j1", line=line, request={}), longest_line=9)
        services.leases.claim("j1", line, owner=f"{found.id}.x", node_id=node.id)
        own = jobs.submit_node_job(
            services, kind="fetch_model", node_id=node.id, model_id=None, request={"source": "x"}
        )
        nodes.remove(services, "n1", force=True)
        assert services.leases.waiting(line) == ["j1"]
        assert services.redis.exists(names.node_queue(node.id), names.node_jobs_queue(node.id)) == 0
        with services.db.transaction() as db:
            ended = job_rows.by_id(db, own)
        assert ended is not None
        assert "was deleted" in ended.error["message"]

    def test_what_is_not_there_cannot_be_deleted(self, services: Services) -> None:
        with pytest.raises(NotFound, match="nodes list"):
            nodes.remove(services, "nothing", force=True)
