"""A model is changed: what concerns its replicas gives it a new revision, which those of the old one are fenced from."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from cluster_data import FACTS, add_model, model_named, ready_node, rung, watched
from sqlalchemy import text

from localai_q import names
from localai_q.bus.leases import Lease, Refusal
from localai_q.cluster.jobs import Keep
from localai_q.cluster.models import AROUND_REPLICAS, Document, ModelConfig
from localai_q.cluster.nodes import Replica
from localai_q.cluster.requests import GenerationRequest
from localai_q.cluster.states import COMING_UP, ReplicaState
from localai_q.errors import Conflict, InvalidValue, LocalAIError, ModelNotFound, NotFound, UnknownParameter
from localai_q.services import generations, jobs, models, nodes, replicas
from localai_q.services.router import Router
from localai_q.services.snapshots import Snapshots
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from localai_q.store import models as model_rows
from localai_q.store import replicas as rows
from workers.claims import Claims
from workers.replica.runner import Runner

STOPPING, READY = ReplicaState.STOPPING, ReplicaState.READY


def ask(services: Services, snapshots: Snapshots | None = None, kind: str = "chat") -> str:
    request = GenerationRequest(kind=kind, model="m", body={"messages": []})
    accepted = generations.submit(services, Router(services, snapshots or Snapshots(services)), request, key_id="k",
                                  job_id=names.new_id(), watcher="w", keep=Keep.NOT)  # fmt: skip
    return accepted.job_id


def line_of(services: Services) -> str:
    return names.model_queue(model_named(services, "m").id)


def claimed(services: Services, job_id: str, revision: int) -> Lease | Refusal:
    return services.leases.claim(job_id, line_of(services), owner="r", node_id="n", revision=revision)


def all_replicas(services: Services) -> list[Replica]:
    with services.db.transaction() as db:
        return rows.every(db)


def by_revision(services: Services) -> dict[int, ReplicaState]:
    return {replica.revision: replica.state for replica in all_replicas(services)}


def until_loading(services: Services) -> Replica:
    """Bring replicas up as far as a node's work is not needed; the newest."""
    replicas.reconcile(services)
    for job_id in services.leases.waiting(names.node_jobs_queue(all_replicas(services)[0].node_id)):
        with services.db.transaction() as db:
            db.execute(text("UPDATE jobs SET state = 'done' WHERE id = :id"), {"id": job_id})
    replicas.reconcile(services)
    return all_replicas(services)[-1]


class TestFields:
    def test_only_what_is_named_changes(self, services: Services) -> None:
        add_model(services, slots=2, options=("a:b",))
        shown = models.edit(services, "m", {"context_size": 512})
        assert (shown["revision"], shown["context_size"], shown["slots"]) == (2, 512, 2)
        found = model_named(services, "m")
        assert (found.revision, found.config) == (
            2, ModelConfig(backend="echo", slots=2, options=("a:b",), context_size=512),
        )  # fmt: skip

    @pytest.mark.parametrize(
        "change",
        [{"spread_all": True}, {"min_replicas": 1}, {"max_replicas": 5}, {"idle_timeout": 9.0}, {"pinned": True},
         {"selector": {"a": "b"}}, {"concurrency_groups": ("a",)}],
    )  # fmt: skip
    def test_where_and_how_many_makes_no_revision(self, services: Services, change: dict) -> None:
        assert change.keys() <= AROUND_REPLICAS
        add_model(services)
        assert models.edit(services, "m", change)["revision"] == 1
        assert model_named(services, "m").config == ModelConfig(backend="echo", **change)

    def test_every_field_around_replicas_is_one(self) -> None:
        assert ModelConfig.model_fields.keys() >= AROUND_REPLICAS

    def test_the_same_again_makes_no_revision(self, services: Services) -> None:
        add_model(services, slots=2)
        assert models.edit(services, "m", {"slots": 2})["revision"] == 1

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"colour": "red"}, UnknownParameter, "colour"),
            ({"name": "other"}, UnknownParameter, "name"),
            ({"slots": 0}, InvalidValue, "slots"),
            ({"min_replicas": 5}, InvalidValue, "above max_replicas"),
            ({"backend": "nonesuch"}, NotFound, "nonesuch"),
            ({"backend": "xllamacpp"}, InvalidValue, "needs a file"),
            ({"source": "file:/x"}, InvalidValue, "needs its SHA-256"),
            ({"source": f"store:{'a' * 64}", "sha256": "a" * 64}, InvalidValue, "has not been uploaded"),
        ],
    )
    def test_what_could_not_be_added_is_refused_and_nothing_changes(
        self, services: Services, change: dict, error: type[LocalAIError], words: str
    ) -> None:
        add_model(services)
        before = model_named(services, "m")
        with pytest.raises(error, match=words):
            models.edit(services, "m", {"threads": 3, **change})
        assert model_named(services, "m") == before

    def test_another_file_needs_its_own_sum(self, services: Services) -> None:
        add_model(services, source="file:/x", sha256="a" * 64, size=5, origin="q8_0 of it")
        with pytest.raises(InvalidValue, match="needs its SHA-256"):
            models.edit(services, "m", {"source": "file:/y"})
        models.edit(services, "m", {"source": "file:/y", "sha256": "b" * 64})
        config = model_named(services, "m").config
        assert (config.source, config.sha256, config.size, config.origin) == ("file:/y", "b" * 64, 0, "")

    def test_an_unknown_model_is_not_found(self, services: Services) -> None:
        with pytest.raises(ModelNotFound, match="no model 'm'"):
            models.edit(services, "m", {"slots": 2})

    def test_of_changes_at_the_same_time_none_is_lost(self, services: Services) -> None:
        add_model(services)
        changes = [{"slots": 7}, {"threads": 7}, {"context_size": 777}, {"max_replicas": 7}, {"memory": 7}]
        with ThreadPoolExecutor(len(changes)) as pool:
            list(pool.map(lambda change: models.edit(services, "m", change), changes))
        found = model_named(services, "m")
        assert found.config == ModelConfig(backend="echo", **{k: v for each in changes for k, v in each.items()})
        assert found.revision == 5, "each of four made another replica"


class TestFence:
    def test_what_was_accepted_before_may_go_to_either(self, services: Services) -> None:
        add_model(services)
        first, second = ask(services), ask(services)
        models.edit(services, "m", {"slots": 2})
        assert isinstance(claimed(services, first, 1), Lease)
        assert isinstance(claimed(services, second, 2), Lease)

    def test_what_is_accepted_after_goes_to_no_old_replica_however_old_the_snapshot(self, services: Services) -> None:
        add_model(services)
        snapshots = Snapshots(services)
        ask(services, snapshots)
        models.edit(services, "m", {"slots": 2})
        assert snapshots.now().models["m"].revision == 1, "this web process has not looked since"
        job_id = ask(services, snapshots)
        assert claimed(services, job_id, 1) == Refusal(job_id=job_id, why="newer")
        assert services.leases.waiting(line_of(services))[-1] == job_id, "it waits as before"
        assert isinstance(claimed(services, job_id, 2), Lease)

    def test_a_job_that_redis_lost_comes_back_behind_the_fence(self, services: Services) -> None:
        add_model(services)
        models.edit(services, "m", {"slots": 2})
        job_id = ask(services)
        services.redis.flushall()
        watched(services)
        with services.db.transaction() as db:
            db.execute(text("UPDATE jobs SET created_at = now() - make_interval(secs => 60)"))
        jobs.recover(services)
        assert claimed(services, job_id, 1) == Refusal(job_id=job_id, why="newer")
        assert isinstance(claimed(services, job_id, 2), Lease)

    def test_an_owner_that_gives_a_job_back_to_redis_keeps_it_behind_the_fence(self, services: Services) -> None:
        add_model(services)
        models.edit(services, "m", {"slots": 2})
        job_id = ask(services)
        lease = claimed(services, job_id, 2)
        services.redis.flushall()
        restored = services.leases.restore(lease, [])
        services.leases.release(restored)
        assert claimed(services, job_id, 1) == Refusal(job_id=job_id, why="newer")

    def test_the_old_replica_rings_for_the_new(self, services: Services) -> None:
        add_model(services)
        models.edit(services, "m", {"slots": 2})
        job_id, line = ask(services), line_of(services)
        services.redis.delete(line)
        claims = Claims(services.redis, services.leases, owner="old", node_id="n", lease=1.0, revision=1)
        backend = SimpleNamespace(dead=threading.Event())
        Runner(claims, backend, services.doorbells, identity="m", line=line).run(job_id)
        assert rung(services, line) == [f"run_generation({job_id})"]
        assert claims.held() == []

    def test_work_of_a_node_has_no_revision(self, services: Services) -> None:
        node = ready_node(services)
        model_id = add_model(services)
        models.edit(services, "m", {"slots": 2})
        request = {"kind": "install_backend", "backend": "echo"}
        job_id = jobs.submit_node_job(services, kind="install_backend", node_id=node.id, model_id=model_id,
                                      request=request)  # fmt: skip
        lease = services.leases.claim(job_id, names.node_jobs_queue(node.id), owner="r", node_id=node.id)
        assert isinstance(lease, Lease)

    def test_what_a_stale_snapshot_refuses_is_looked_at_again(self, services: Services) -> None:
        add_model(services, embeddings=True)
        snapshots = Snapshots(services)
        snapshots.now()
        models.edit(services, "m", {"embeddings": False})
        assert snapshots.now().models["m"].config.embeddings
        with services.db.transaction() as db:
            assert job_rows.by_id(db, ask(services, snapshots)) is not None


class TestReplicas:
    def test_the_old_one_ends_what_it_holds_while_the_new_one_comes_up_beside_it(self, services: Services) -> None:
        node = ready_node(services)
        add_model(services)
        ask(services)
        old = until_loading(services)
        nodes.report_replica(services, node, old.id, READY, "")
        models.edit(services, "m", {"slots": 2})
        new = until_loading(services)
        assert (new.revision, new.number, new.node_id, new.slots) == (2, 2, node.id, 2)
        assert by_revision(services) == {1: STOPPING, 2: ReplicaState.LOADING}
        assert f"stop_replica({old.id})" in rung(services, names.node_queue(node.id))
        nodes.report_replica(services, node, new.id, READY, "")
        nodes.report_replica(services, node, old.id, ReplicaState.GONE, "")
        replicas.reconcile(services)
        assert by_revision(services) == {2: READY}
        (shown,) = models.listed(services)
        assert [replica["revision"] for replica in shown["replicas"]] == [2]

    @pytest.mark.parametrize("change", [{"memory": 1500}, {"selector": {"gpu": "none"}}])
    def test_what_would_end_it_for_good_is_refused_unless_it_is_forced(self, services: Services, change: dict) -> None:
        node = ready_node(services)
        hardware = {"ram_available": 1000, "budget": 1000}
        nodes.heartbeat(services, node, hardware=hardware)
        add_model(services, memory=600)
        models.edit(services, "m", change)  # nothing is loaded yet
        models.edit(services, "m", {"memory": 700, "selector": {}})
        ask(services)
        old = until_loading(services)
        nodes.report_replica(services, node, old.id, READY, "", hardware)
        before = model_named(services, "m")
        with pytest.raises(Conflict, match=f"{node.name}: .*force=true"):
            models.edit(services, "m", change)
        assert model_named(services, "m") == before
        models.edit(services, "m", {"memory": 900})  # where the old one leaves
        models.edit(services, "m", change, force=True)
        replicas.reconcile(services)
        assert {replica.state for replica in all_replicas(services)} == {STOPPING}

    def test_where_both_have_no_room_the_new_one_comes_when_the_old_one_is_gone(self, services: Services) -> None:
        node = ready_node(services)
        hardware = {"ram_available": 1000, "budget": 1000}
        nodes.heartbeat(services, node, hardware=hardware)
        add_model(services, memory=600)
        ask(services)
        old = until_loading(services)
        nodes.report_replica(services, node, old.id, READY, "", hardware)
        models.edit(services, "m", {"slots": 2})
        replicas.reconcile(services)
        assert by_revision(services) == {1: STOPPING}
        nodes.report_replica(services, node, old.id, ReplicaState.GONE, "", hardware)
        replicas.reconcile(services)
        assert by_revision(services) == {2: ReplicaState.INSTALLING}

    def test_one_that_is_to_start_is_not_given_the_configuration_of_another_revision(self, services: Services) -> None:
        node = ready_node(services)
        add_model(services, slots=1)
        ask(services)
        old = until_loading(services)
        assert nodes.replica_spec(services, node, old.id)["model"]["revision"] == 1
        models.edit(services, "m", {"pinned": True})
        assert nodes.replica_spec(services, node, old.id)["model"]["pinned"] is True
        models.edit(services, "m", {"slots": 2})
        with pytest.raises(NotFound, match="was changed after replica"):
            nodes.replica_spec(services, node, old.id)
        replicas.reconcile(services)
        nodes.report_replica(services, node, old.id, ReplicaState.GONE, "")
        new = until_loading(services)
        told = nodes.replica_spec(services, node, new.id)["model"]
        assert (new.revision, told["revision"], told["slots"]) == (2, 2, 2)

    def test_one_that_comes_up_is_dropped_with_its_stage_and_booking(self, services: Services) -> None:
        node = ready_node(services)
        add_model(services, memory=600)
        ask(services)
        replicas.reconcile(services)
        old = all_replicas(services)[0]
        assert old.state is ReplicaState.INSTALLING
        models.edit(services, "m", {"memory": 700})
        replicas.reconcile(services)
        (new,) = all_replicas(services)
        assert (new.revision, new.reserved.ram, new.state in COMING_UP) == (2, 700, True)
        assert new.job_id != old.job_id
        assert services.leases.waiting(names.node_jobs_queue(node.id)) == [new.job_id]

    def test_a_stage_that_another_model_needs_too_goes_on(self, services: Services) -> None:
        ready_node(services)
        add_model(services, min_replicas=1)
        add_model(services, "other", min_replicas=1)
        replicas.reconcile(services)
        (stage,) = {replica.job_id for replica in all_replicas(services)}
        models.edit(services, "m", {"slots": 2})
        replicas.reconcile(services)
        assert {replica.job_id for replica in all_replicas(services)} == {stage}

    def test_what_failed_is_tried_again_at_once_as_it_is_now(self, services: Services) -> None:
        node = ready_node(services)
        add_model(services)
        job_id = ask(services)
        nodes.report_replica(services, node, until_loading(services).id, ReplicaState.FAILED, "no such option")
        models.edit(services, "m", {"options": ["b:c"]})
        replicas.reconcile(services)
        assert by_revision(services) == {2: ReplicaState.INSTALLING}
        assert services.leases.waiting(line_of(services)) == [job_id]

    def test_what_a_node_has_read_in_the_old_file_is_not_believed_of_the_new(self, services: Services) -> None:
        add_model(services, source="file:/x", sha256="a" * 64)
        before = model_named(services, "m")
        models.edit(services, "m", {"source": "file:/y", "sha256": "b" * 64})
        with services.db.transaction() as db:
            model_rows.learn(db, before, FACTS)
        assert model_named(services, "m").facts is None
        with services.db.transaction() as db:
            model_rows.learn(db, model_named(services, "m"), FACTS)
        models.edit(services, "m", {"slots": 2})
        assert model_named(services, "m").facts == FACTS, "it is the same file"


def test_who_applies_a_model_that_somebody_adds_meanwhile_changes_it(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = models.add

    def late(*what: object) -> object:
        monkeypatch.setattr(models, "add", add)
        models.put(services, Document(name="new", backend="echo", slots=3))
        return add(*what)

    monkeypatch.setattr(models, "add", late)
    shown, new = models.put(services, Document(name="new", backend="echo", slots=2))
    assert (shown["slots"], new) == (2, False)
