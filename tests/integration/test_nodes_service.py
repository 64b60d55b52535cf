"""How a machine joins, what it is told, and what becomes of it when it falls silent."""

import time
from dataclasses import replace

import pytest
from cluster_data import SECRET, add_model, claim, join, node_named, ready_node, reported
from sqlalchemy import text
from waiting import listening

from localai_q import names
from localai_q.bus import presence
from localai_q.cluster.capacity import Booking
from localai_q.cluster.nodes import Replica
from localai_q.cluster.states import JobState, NodeState, ReplicaState
from localai_q.errors import Conflict, Forbidden, NotFound
from localai_q.services import fleet, jobs, nodes
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from localai_q.store import replicas


def place(services: Services, node_name: str, model_id: str) -> Replica:
    with services.db.transaction() as db:
        found = replicas.place(db, model_id=model_id, node_id=node_named(services, node_name).id, number=1, revision=1,
                               slots=4, booking=Booking())  # fmt: skip
    assert found is not None
    return found


def replica(services: Services, replica_id: str) -> Replica | None:
    with services.db.transaction() as db:
        return replicas.by_id(db, replica_id)


def silent_for(services: Services, name: str, heartbeats: float) -> None:
    with services.db.transaction() as db:
        db.execute(
            text("UPDATE nodes SET last_heartbeat = now() - make_interval(secs => :s) WHERE name = :name"),
            {"s": heartbeats * services.settings.heartbeat, "name": name},
        )


def served_for(services: Services, heartbeats: float) -> None:
    """A web process is there, and has been for so long."""
    presence.announce(services.redis, "w1")
    since = time.time() - heartbeats * services.settings.heartbeat
    services.redis.set(names.SERVED_SINCE, since, ex=5)


def error_of(services: Services, job_id: str) -> str:
    with services.db.transaction() as db:
        found = job_rows.by_id(db, job_id)
    assert found is not None
    assert found.state is JobState.FAILED
    return found.error["message"]


class TestRegistration:
    def test_a_machine_waits_for_approval_and_is_told_nothing_before(self, services: Services) -> None:
        answer = join(services)
        assert answer.keys() == {"id", "name", "state"}
        assert answer["state"] == NodeState.PENDING
        assert join(services)["id"] == answer["id"]
        assert node_named(services, "n1").hardware == {"cpus": 2}

    def test_an_approved_machine_is_ready_and_told_how_to_reach_redis_by_the_host_that_it_called(
        self, services: Services
    ) -> None:
        join(services)
        assert nodes.approve(services, "n1")["approved"]
        answer = join(services, host="10.0.0.5")
        port = services.settings.redis_url.rpartition(":")[2]
        assert answer["state"] == NodeState.READY
        assert answer["redis_url"] == f"redis://node-{answer['id']}@10.0.0.5:{port}", (
            "and its own secret is the password"
        )
        assert answer["lease"] == services.settings.lease
        assert answer["heartbeat"] == services.settings.heartbeat
        assert {"journal_ttl", "journal_max"} <= answer.keys()
        six = join(services, host="fe80::1")
        assert f"@[fe80::1]:{port}" in six["redis_url"]

    def test_a_redis_that_is_not_on_this_machine_is_named_as_it_is(self, services: Services) -> None:
        def url(**changes: str) -> str:
            changed = type(services)(services.settings.model_copy(update=changes), *list(vars(services).values())[1:])
            return nodes.redis_url_for(changed, "10.0.0.5")

        assert url(redis_url="redis://:p@redis.example/3") == "redis://:p@redis.example/3"
        assert url(public_redis_url="rediss://public/0") == "rediss://public/0"
        assert url(redis_url="redis://localhost/0") == "redis://10.0.0.5:6379/0"

    @pytest.mark.parametrize("token", ["", "wrong", "joín-us"])
    def test_a_wrong_token_is_refused_and_leaves_no_node(self, services: Services, token: str) -> None:
        with pytest.raises(Forbidden, match="registration token"):
            join(services, token=token)
        assert fleet.listed(services) == []

    def test_without_a_token_of_its_own_a_cluster_lets_nobody_in(self, services: Services) -> None:
        closed = services.settings.model_copy(update={"registration_token": ""})
        with pytest.raises(Forbidden):
            join(type(services)(closed, *list(vars(services).values())[1:]), token="")

    def test_a_name_belongs_to_the_secret_that_took_it(self, services: Services) -> None:
        ready_node(services)
        with pytest.raises(Conflict, match="LOCALAI_NODE_NAME"):
            join(services, secret="another")
        assert node_named(services, "n1").state is NodeState.READY

    def test_auto_approval_makes_a_new_machine_ready(self, services: Services) -> None:
        open_house = services.settings.model_copy(update={"auto_approve": True})
        answer = join(type(services)(open_house, *list(vars(services).values())[1:]))
        assert answer["state"] == NodeState.READY

    def test_a_machine_that_comes_back_has_no_replicas(self, services: Services) -> None:
        ready_node(services)
        ready_node(services, "n2")
        model_id = add_model(services)
        mine, other = place(services, "n1", model_id), place(services, "n2", model_id)
        answer = join(services)
        assert answer["state"] == NodeState.READY
        assert replica(services, mine.id) is None
        assert replica(services, other.id) is not None

    def test_approval_is_by_id_or_name_and_survives_a_restart_of_the_node(self, services: Services) -> None:
        node_id = join(services)["id"]
        nodes.approve(services, node_id)
        assert join(services)["state"] == NodeState.READY
        nodes.deregister(services, node_named(services, "n1"))
        assert node_named(services, "n1").state is NodeState.OFFLINE
        assert join(services)["state"] == NodeState.READY
        with pytest.raises(NotFound, match="nodes list"):
            nodes.approve(services, "nothing")


class TestAuthentication:
    def test_a_node_is_known_by_its_own_secret_only(self, services: Services) -> None:
        node, other = ready_node(services), ready_node(services, "n2")
        assert nodes.authenticate(services, node.id, SECRET).name == "n1"
        for node_id, secret in ((node.id, "wrong"), (node.id, ""), ("unknown", SECRET), (node.id, node.secret_hash)):
            with pytest.raises(Forbidden, match="not the secret"):
                nodes.authenticate(services, node_id, secret)
        assert other.id != node.id

    def test_a_node_that_waits_for_approval_may_do_nothing(self, services: Services) -> None:
        node_id = join(services)["id"]
        with pytest.raises(Forbidden, match="nodes approve n1"):
            nodes.authenticate(services, node_id, SECRET)


class TestReports:
    def test_a_node_is_told_which_of_its_replicas_should_not_be_there(self, services: Services) -> None:
        node = ready_node(services)
        ready_node(services, "n2")
        model_id = add_model(services)
        mine, other = place(services, "n1", model_id), place(services, "n2", model_id)
        stray = replace(mine, id="stray", model_id="gone")
        told = [reported(each) for each in (mine, other, stray)]
        answer = nodes.heartbeat(services, node, hardware={}, reported=told)
        assert answer["stop"] == sorted([other.id, "stray"])

    def test_what_a_node_has_left_after_a_replica_stands_in_its_report_of_that(self, services: Services) -> None:
        node, model_id = ready_node(services), add_model(services)
        mine = place(services, "n1", model_id)
        nodes.report_replica(services, node, mine.id, ReplicaState.GONE, "", {"ram_available": 7})
        assert node_named(services, "n1").hardware["ram_available"] == 7

    def test_hardware_is_kept_and_not_forgotten_by_an_empty_report(self, services: Services) -> None:
        node = ready_node(services)
        nodes.heartbeat(services, node, hardware={"cpus": 8})
        nodes.heartbeat(services, node, hardware={})
        assert node_named(services, "n1").hardware == {"cpus": 8}

    def test_a_replica_moves_as_its_node_reports_and_only_as_the_table_allows(self, services: Services) -> None:
        node = ready_node(services)
        found = place(services, "n1", add_model(services))
        nodes.report_replica(services, node, found.id, ReplicaState.READY, "")
        assert replica(services, found.id).state is ReplicaState.PLACED  # it has not been loaded: ignored
        nodes.report_replica(services, node, found.id, ReplicaState.FAILED, "no memory")
        failed = replica(services, found.id)
        assert (failed.state, failed.reason, failed.failures) == (ReplicaState.FAILED, "no memory", 1)
        nodes.report_replica(services, node, found.id, ReplicaState.GONE, "")
        assert replica(services, found.id) is None

    def test_a_node_can_neither_report_nor_read_the_replica_of_another(self, services: Services) -> None:
        ready_node(services)
        thief = ready_node(services, "n2")
        found = place(services, "n1", add_model(services))
        for state in (ReplicaState.GONE, ReplicaState.FAILED):
            with pytest.raises(NotFound, match="n2"):
                nodes.report_replica(services, thief, found.id, state, "")
        with pytest.raises(NotFound):
            nodes.replica_spec(services, thief, found.id)
        assert replica(services, found.id) == found

    def test_a_node_is_told_what_it_needs_to_start_a_replica(self, services: Services) -> None:
        node = ready_node(services)
        found = place(services, "n1", add_model(services, context_size=512))
        with services.db.transaction() as db:
            replicas.move(db, found.id, ReplicaState.INSTALLING, job_id="install")
        with pytest.raises(NotFound, match="is installing and not to be started"):
            nodes.replica_spec(services, node, found.id)
        with services.db.transaction() as db:
            replicas.move(db, found.id, ReplicaState.LOADING, job_id="load")
        spec = nodes.replica_spec(services, node, found.id)
        assert (spec["id"], spec["number"], spec["job"]) == (found.id, 1, "load")
        assert (spec["model"]["name"], spec["model"]["context_size"]) == ("m", 512)

    def test_a_report_wakes_control(self, services: Services) -> None:
        node = ready_node(services)
        found = place(services, "n1", add_model(services))
        with listening(services.redis, names.WAKE_CHANNEL) as heard:
            nodes.report_replica(services, node, found.id, ReplicaState.FAILED, "x")
            assert heard() == [(names.WAKE_CHANNEL, node.id)]


class TestHealth:
    def test_a_silent_node_is_unhealthy_and_then_offline_without_replicas(self, services: Services) -> None:
        ready_node(services)
        ready_node(services, "n2")
        found = place(services, "n1", add_model(services))
        served_for(services, 100)
        silent_for(services, "n1", nodes.UNHEALTHY_AFTER - 0.5)
        nodes.watch_health(services)
        assert node_named(services, "n1").state is NodeState.READY
        silent_for(services, "n1", nodes.UNHEALTHY_AFTER + 0.5)
        nodes.watch_health(services)
        assert node_named(services, "n1").state is NodeState.UNHEALTHY
        assert replica(services, found.id) is not None
        silent_for(services, "n1", nodes.OFFLINE_AFTER + 0.5)
        nodes.watch_health(services)
        assert node_named(services, "n1").state is NodeState.OFFLINE
        assert replica(services, found.id) is None
        assert node_named(services, "n2").state is NodeState.READY

    @pytest.mark.parametrize("silence", [nodes.UNHEALTHY_AFTER + 0.5, nodes.OFFLINE_AFTER + 0.5])
    def test_a_node_that_reports_again_is_ready_again_and_told_so(self, services: Services, silence: float) -> None:
        node = ready_node(services)
        served_for(services, 100)
        silent_for(services, "n1", silence)
        nodes.watch_health(services)
        gone = node_named(services, "n1")
        assert gone.state is not NodeState.READY
        answer = nodes.heartbeat(services, gone, hardware={})
        assert answer == {"state": NodeState.READY, "stop": []}
        assert node_named(services, "n1").state is NodeState.READY
        assert node.id == gone.id

    def test_a_node_that_waits_for_approval_is_never_silent(self, services: Services) -> None:
        join(services)
        silent_for(services, "n1", 100)
        nodes.watch_health(services)
        assert node_named(services, "n1").state is NodeState.PENDING

    def test_nobody_is_judged_for_a_time_in_which_no_web_process_could_be_told(self, services: Services) -> None:
        ready_node(services)
        silent_for(services, "n1", 100)
        nodes.watch_health(services)  # there is no web process
        served_for(services, nodes.UNHEALTHY_AFTER - 0.5)
        nodes.watch_health(services)  # it is back, and has not been for long enough
        assert node_named(services, "n1").state is NodeState.READY
        served_for(services, nodes.UNHEALTHY_AFTER + 0.5)
        nodes.watch_health(services)
        assert node_named(services, "n1").state is NodeState.UNHEALTHY
        served_for(services, nodes.OFFLINE_AFTER + 0.5)
        nodes.watch_health(services)
        assert node_named(services, "n1").state is NodeState.OFFLINE

    def test_a_web_process_that_is_missed_once_begins_anew(self, services: Services) -> None:
        served_for(services, 100)
        assert presence.served_for(services.redis) > 100
        services.redis.pexpire(names.web_alive_key("w1"), 5000)  # ten seconds without a sign of life
        assert presence.served_for(services.redis) == 0.0
        presence.announce(services.redis, "w1")
        assert presence.served_for(services.redis) < 1.0


@pytest.mark.parametrize("how", ["started anew", "left", "offline"])
def test_the_jobs_of_a_node_end_with_its_process(services: Services, how: str) -> None:
    node = ready_node(services)
    job_id = jobs.submit_node_job(services, kind="fetch_model", node_id=node.id, model_id=None, request={"source": "x"})
    lease = claim(services, job_id, names.node_jobs_queue(node.id), node.id)
    if how == "started anew":
        join(services)
    elif how == "left":
        nodes.deregister(services, node)
    else:
        served_for(services, 100)
        silent_for(services, "n1", 100)
        nodes.watch_health(services)
    assert how in error_of(services, job_id)
    assert services.leases.renew([lease]) == [0]
    assert jobs.apply_ends(services) == 0


def test_a_list_of_nodes_shows_replicas_and_no_secret(services: Services) -> None:
    ready_node(services)
    place(services, "n1", add_model(services))
    (shown,) = fleet.listed(services)
    assert "secret_hash" not in shown
    assert [(each["model"], each["state"]) for each in shown["replicas"]] == [("m", ReplicaState.PLACED)]
