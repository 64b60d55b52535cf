"""A model that somebody waits for comes up on a node, stage by stage; what fails is told, waited for and tried again.

The node's side is done by the test: it ends the stages' jobs as a node would, and reports as a node would.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import pytest
from cluster_data import FACTS, add_model, claim, model_named, node_named, ready_node, reported, rung
from sqlalchemy import event, text

from localai_q import names
from localai_q.bus.leases import Lease
from localai_q.cluster.capacity import Booking
from localai_q.cluster.events import End
from localai_q.cluster.jobs import Keep
from localai_q.cluster.memory import Memory
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.reports import RUNNING
from localai_q.cluster.requests import GenerationRequest
from localai_q.cluster.stages import SILENT_LOAD
from localai_q.cluster.states import JobState, ReplicaState
from localai_q.errors import GenerationFailed, ModelUnavailable, to_record
from localai_q.services import generations, jobs, models, nodes, replicas
from localai_q.services.router import Router
from localai_q.services.snapshots import Snapshots
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from localai_q.store import models as model_rows
from localai_q.store import nodes as node_rows
from localai_q.store import replicas as rows
from localai_q.store.engine import engine
from localai_q.store.keys import ApiKey

FILE = "file:/models/x.gguf"
ADMIN = ApiKey(id="admin", name="admin", role="admin", hint="", created=0.0)


def ask(services: Services, model: str = "m") -> str:
    request = GenerationRequest(kind="chat", model=model, body={"messages": []})
    accepted = generations.submit(
        services,
        Router(services, Snapshots(services)),
        request,
        key_id="k",
        job_id=names.new_id(),
        watcher="w",
        keep=Keep.NOT,
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


def stage(services: Services, node: Node, *, failed: str = "", result: dict | None = None) -> dict:
    """Do the one job that waits for the node, and have its end written down. Its request."""
    line = names.node_jobs_queue(node.id)
    (job_id,) = services.leases.waiting(line)
    lease = claim(services, job_id, line, node.id)
    error = to_record(GenerationFailed(failed)) if failed else None
    end = End(state=JobState.FAILED if failed else JobState.DONE, error=error, result=result or {})
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
        "kind": "fetch_model", "source": FILE, "mirrors": [], "sha256": "a" * 64, "size": 5, "name": "m", "parts": 0, "further": []
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


def test_how_a_load_goes_is_shown_with_its_last_failure_and_the_next_attempt(services: Services, node: Node) -> None:
    add_model(services, spread_all=True)
    replicas.reconcile(services)
    (shown,) = models.listed(services)
    assert (shown["loading"]["state"], shown["loading"]["node"], shown["loading"]["attempt"]) == ("installing", "n1", 1)
    assert shown["loading"]["since"] == only(services).changed
    assert shown["failure"] is None
    stage(services, node, failed="no network")
    replicas.reconcile(services)
    failed, (shown,) = only(services), models.listed(services)
    assert shown["loading"] is None
    assert shown["failure"] == {
        "node": "n1", "reason": "installing: no network", "attempts": 1, "retry_at": failed.changed + 1.0
    }  # fmt: skip
    older(services, 1.1)
    replicas.reconcile(services)
    (shown,) = models.listed(services)
    assert (shown["loading"]["attempt"], shown["failure"]["retry_at"]) == (2, None)
    stage(services, node)
    replicas.reconcile(services)
    report(services, node, ReplicaState.READY)
    (shown,) = models.listed(services)
    assert (shown["loading"], shown["failure"]) == (None, None)


def test_a_hundred_who_ask_at_once_cause_one_load(services: Services, node: Node) -> None:
    ready_node(services, "n2")
    model_id = add_model(services)
    roomy = replace(services, settings=services.settings.model_copy(update={"max_waiting": 100}))
    with ThreadPoolExecutor(16) as pool:
        asked = set(pool.map(lambda _: ask(roomy), range(100)))
        list(pool.map(lambda _: replicas.reconcile(services), range(16)))  # as if several led the loop
    place = only(services)
    (stage_id,) = services.leases.waiting(names.node_jobs_queue(place.node_id))
    assert place.job_id == stage_id
    assert set(services.leases.waiting(names.model_queue(model_id))) == asked


def test_a_load_that_takes_long_holds_up_no_other(services: Services, node: Node) -> None:
    add_model(services, "slow", source=FILE, sha256="a" * 64)
    ask(services, "slow")
    replicas.reconcile(services)
    stage(services, node)
    replicas.reconcile(services)
    line = names.node_jobs_queue(node.id)
    (fetch,) = services.leases.waiting(line)
    claim(services, fetch, line, node.id)
    add_model(services, "quick")
    ask(services, "quick")
    replicas.reconcile(services)
    stage(services, node)
    replicas.reconcile(services)
    assert of_model(services, "quick").state is ReplicaState.LOADING
    assert of_model(services, "slow").state is ReplicaState.STAGING


def test_a_request_writes_its_row_twice_and_nothing_else(services: Services, node: Node) -> None:
    add_model(services)
    found = bring_up(services, node, "m")
    written: list[str] = []

    def note(connection: object, cursor: Any, statement: str, *_: object) -> None:
        if statement.startswith(("INSERT", "UPDATE", "DELETE")):
            written.extend([statement.split('"')[0]] * cursor.rowcount)

    made = engine(services.settings.database_url)
    event.listen(made, "after_cursor_execute", note)
    try:
        serve(services, ask(services), found)
    finally:
        event.remove(made, "after_cursor_execute", note)
    assert [statement.split()[:3] for statement in written if "INSERT" in statement] == [["INSERT", "INTO", "jobs"]]
    assert [statement.split()[:2] for statement in written if "INSERT" not in statement] == [["UPDATE", "jobs"]]


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


@pytest.mark.parametrize("wrong", [-3600.0, 3600.0], ids=["behind", "ahead"])
def test_the_clock_of_the_process_that_decides_does_not_matter(
    services: Services, node: Node, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + wrong)
    add_model(services)
    ask(services)
    replicas.reconcile(services)
    stage(services, node)
    replicas.reconcile(services)
    start = f"start_replica({only(services).id})"
    replicas.reconcile(services)
    assert rung(services, names.node_queue(node.id)) == [start], "it is told once"
    older(services, SILENT_LOAD + 1)
    replicas.reconcile(services)
    assert rung(services, names.node_queue(node.id)) == [start, start], "and again after a silence"
    report(services, node, ReplicaState.FAILED, "x")
    replicas.reconcile(services)
    assert only(services).state is ReplicaState.FAILED, "its back-off is not over"
    older(services, 2)
    replicas.reconcile(services)
    assert only(services).state is not ReplicaState.FAILED


def test_a_replica_is_stopped_by_its_node_and_then_gone(services: Services, node: Node) -> None:
    add_model(services)
    ask(services)
    replicas.reconcile(services)
    stage(services, node)
    replicas.reconcile(services)
    report(services, node, ReplicaState.READY)
    services.redis.delete(names.node_queue(node.id))
    replicas.stop(services, only(services).id, "once")
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


def test_who_waits_for_a_model_that_is_disabled_is_told_what_others_are(services: Services, node: Node) -> None:
    add_model(services)
    waiting = ask(services)
    models.edit(services, "m", {"disabled": True})
    replicas.reconcile(services)
    told = error_of(services, waiting)
    assert (told["error"], "--no-disabled" in told["message"]) == ("ModelDisabled", True)


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


GB = 10**9


def has(services: Services, node: Node, ram: float, **hardware: object) -> None:
    """Let the node report that it has so many GB free, and the processes that it should have."""
    told = {"ram_available": int(ram * GB), **hardware}
    own = [r for r in all_replicas(services) if r.node_id == node.id and r.state in RUNNING]
    lives = [reported(replica, state=replica.state.value) for replica in own]
    nodes.heartbeat(services, node_named(services, node.name), hardware=told, reported=lives)


def of_model(services: Services, name: str) -> Replica | None:
    model_id = model_named(services, name).id
    return next((found for found in all_replicas(services) if found.model_id == model_id), None)


def bring_up(services: Services, node: Node, name: str) -> Replica:
    """Have a model asked for, loaded, and the one who asked served."""
    job_id = ask(services, name)
    replicas.reconcile(services)
    stage(services, node)
    replicas.reconcile(services)
    found = of_model(services, name)
    assert found
    nodes.report_replica(services, node, found.id, ReplicaState.READY, "")
    serve(services, job_id, found)
    return found


def serve(services: Services, job_id: str, by: Replica) -> None:
    lease = services.leases.claim(job_id, names.model_queue(by.model_id), owner=f"{by.id}.1", node_id=by.node_id,
                                  revision=by.revision)  # fmt: skip
    assert isinstance(lease, Lease)
    end = End(state=JobState.DONE, result={})
    assert services.leases.finish(lease, lease.last_index + 1, end, node_id=by.node_id)
    jobs.apply_ends(services)


class TestMemory:
    def test_what_a_replica_takes_is_booked_and_shown(self, services: Services, node: Node) -> None:
        has(services, node, 8)
        add_model(services, memory=3 * GB)
        ask(services)
        replicas.reconcile(services)
        assert only(services).reserved == Memory(ram=3 * GB)
        (shown,) = models.listed(services)
        assert shown["replicas"][0]["memory"] == {"ram": 3 * GB, "vram": 0}

    def test_a_heartbeat_does_not_wipe_a_booking(self, services: Services, node: Node) -> None:
        has(services, node, 5)
        for name in ("a", "b"):
            add_model(services, name, memory=3 * GB)
            ask(services, name)
        replicas.reconcile(services)
        has(services, node, 5)
        replicas.reconcile(services)
        assert [found.model_id for found in all_replicas(services)] == [model_named(services, "a").id]

    def test_two_who_place_at_once_never_book_the_same_bytes(self, services: Services, node: Node) -> None:
        has(services, node, 5)
        known = [model_named(services, name) for name in "abcd" if add_model(services, name, memory=3 * GB)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda model: replicas.place(services, model, node.id), known))
        assert len(all_replicas(services)) == 1

    def test_a_placement_waits_for_the_one_before_it_on_the_same_node(self, services: Services, node: Node) -> None:
        has(services, node, 5)
        add_model(services, "a", memory=3 * GB)
        add_model(services, "b", memory=3 * GB)
        a, b = model_named(services, "a"), model_named(services, "b")
        with ThreadPoolExecutor(1) as pool:
            with services.db.transaction() as db:
                assert node_rows.lock(db, node.id)
                second = pool.submit(replicas.place, services, b, node.id)
                with pytest.raises(TimeoutError):
                    second.result(0.3)
                rows.place(db, model_id=a.id, node_id=node.id, number=1, revision=1, slots=1,
                           booking=Booking(memory=Memory(ram=3 * GB)))  # fmt: skip
            second.result(5)
        assert only(services).model_id == a.id

    def test_who_waits_for_what_fits_nowhere_is_told_the_numbers(self, services: Services, node: Node) -> None:
        has(services, node, 1.2)
        add_model(services, memory=3_100_000_000)
        waiting = ask(services)
        replicas.reconcile(services)
        assert "n1: needs 3.1 GB, 1.2 GB free" in error_of(services, waiting)["message"]

    def test_facts_that_a_node_has_read_are_kept_and_booked_before_the_load(
        self, services: Services, node: Node
    ) -> None:
        has(services, node, 8)
        add_model(services, source=FILE, sha256="a" * 64, size=1000)
        ask(services)
        replicas.reconcile(services)
        assert only(services).reserved == Memory(ram=1200)
        stage(services, node)
        replicas.reconcile(services)
        stage(services, node, result={"facts": asdict(FACTS)})
        replicas.reconcile(services)
        assert model_named(services, "m").facts == FACTS
        assert only(services).state is ReplicaState.LOADING
        assert only(services).reserved.ram > FACTS.tensor_bytes

    def test_a_model_that_turns_out_too_large_is_not_loaded(self, services: Services, node: Node) -> None:
        has(services, node, 0.5)
        add_model(services, source=FILE, sha256="a" * 64, size=1000)
        ask(services)
        replicas.reconcile(services)
        stage(services, node)
        replicas.reconcile(services)
        stage(services, node, result={"facts": asdict(FACTS)})
        replicas.reconcile(services)
        assert only(services).state is ReplicaState.FAILED
        assert "500.0 MB free" in only(services).reason

    def test_a_context_that_was_cut_is_what_the_node_is_told(self, services: Services, node: Node) -> None:
        has(services, node, 1.2)
        add_model(services, source=FILE, sha256="a" * 64, size=1000, fit_context=True, context_size=8192)
        with services.db.transaction() as db:
            model_rows.learn(db, model_named(services, "m"), FACTS)
        ask(services)
        replicas.reconcile(services)
        stage(services, node)
        replicas.reconcile(services)
        stage(services, node)
        replicas.reconcile(services)
        told = nodes.replica_spec(services, node, only(services).id)["model"]["context_size"]
        assert 512 <= told < 8192
        assert told % 256 == 0

    def test_nonsense_from_a_node_is_no_fact(self, services: Services, node: Node) -> None:
        add_model(services, source=FILE, sha256="a" * 64)
        ask(services)
        replicas.reconcile(services)
        stage(services, node)
        replicas.reconcile(services)
        stage(services, node, result={"facts": {"blocks": -1}})
        replicas.reconcile(services)
        assert model_named(services, "m").facts is None
        assert only(services).state is ReplicaState.LOADING


class TestEviction:
    @pytest.fixture
    def full(self, services: Services, node: Node) -> Replica:
        """The model `old` is loaded on the only node, which has no room for `new`."""
        has(services, node, 100, budget=5 * GB)
        for name in ("old", "new"):
            add_model(services, name, memory=3 * GB)
        found = bring_up(services, node, "old")
        older(services, 31.0)
        has(services, node, 100, budget=5 * GB)
        return found

    def test_an_idle_model_makes_room_and_the_other_comes_when_it_has_gone(
        self, services: Services, node: Node, full: Replica
    ) -> None:
        waiting = ask(services, "new")
        replicas.reconcile(services)
        assert of_model(services, "old").state is ReplicaState.STOPPING
        assert of_model(services, "old").reason.startswith("makes room for new")
        replicas.reconcile(services)
        assert of_model(services, "new") is None
        nodes.report_replica(
            services, node, full.id, ReplicaState.GONE, "", {"ram_available": 100 * GB, "budget": 5 * GB}
        )
        replicas.reconcile(services)
        assert of_model(services, "new").node_id == node.id
        assert services.leases.live([waiting])[waiting].state == "waiting"

    def test_what_is_gone_has_left_its_memory_by_what_its_node_says(
        self, services: Services, node: Node, full: Replica
    ) -> None:
        has(services, node, 1, budget=5 * GB)
        ask(services, "new")
        replicas.reconcile(services)
        nodes.report_replica(
            services, node, full.id, ReplicaState.GONE, "", {"ram_available": 4 * GB, "budget": 5 * GB}
        )
        replicas.reconcile(services)
        assert of_model(services, "new") is not None

    def test_a_model_at_work_is_waited_for(self, services: Services, node: Node, full: Replica) -> None:
        line = names.model_queue(full.model_id)
        running = services.leases.claim(ask(services, "old"), line, owner=f"{full.id}.1", node_id=node.id, revision=1)
        assert isinstance(running, Lease)
        ask(services, "new")
        replicas.reconcile(services)
        assert of_model(services, "old").state is ReplicaState.READY
        assert services.leases.finish(running, 1, End(state=JobState.DONE, result={}), node_id=node.id)
        replicas.reconcile(services)
        assert of_model(services, "old").state is ReplicaState.STOPPING

    def test_what_has_got_work_since_it_was_decided_is_not_idle(
        self, services: Services, node: Node, full: Replica
    ) -> None:
        assert replicas.is_idle(services, full.id)
        job_id = ask(services, "old")
        assert not replicas.is_idle(services, full.id)  # somebody waits
        running = services.leases.claim(
            job_id, names.model_queue(full.model_id), owner=f"{full.id}.1", node_id=node.id, revision=1
        )
        assert not replicas.is_idle(services, full.id)  # it works
        assert services.leases.finish(running, 1, End(state=JobState.DONE, result={}), node_id=node.id)
        assert replicas.is_idle(services, full.id)

    def test_a_pinned_model_stays(self, services: Services, node: Node, full: Replica) -> None:
        with services.db.transaction() as db:
            db.execute(text("UPDATE models SET config = config || '{\"pinned\": true}' WHERE name = 'old'"))
        waiting = ask(services, "new")
        replicas.reconcile(services)
        assert of_model(services, "old").state is ReplicaState.READY
        assert "needs 3.0 GB, 2.0 GB free" in error_of(services, waiting)["message"]

    def test_only_the_copy_that_did_the_work_was_of_use(self, services: Services, node: Node, full: Replica) -> None:
        with services.db.transaction() as db:
            copy = rows.place(db, model_id=full.model_id, node_id=node.id, number=2, revision=1, slots=4,
                              booking=Booking())  # fmt: skip
            db.execute(text("UPDATE replicas SET used_at = used_at - interval '11 s'"))
        assert copy
        serve(services, ask(services, "old"), copy)
        used = {replica.number: replica.used for replica in all_replicas(services)}
        assert used[2] > used[1]

    def test_use_is_noted_at_most_every_ten_seconds(self, services: Services, node: Node, full: Replica) -> None:
        first = of_model(services, "old").used
        assert first > 0
        serve(services, ask(services, "old"), full)
        assert of_model(services, "old").used == first
        with services.db.transaction() as db:
            db.execute(text("UPDATE replicas SET used_at = used_at - interval '11 s'"))
        serve(services, ask(services, "old"), full)
        assert of_model(services, "old").used > first


class TestScaling:
    def test_the_least_number_is_loaded_before_anybody_asks(self, services: Services, node: Node) -> None:
        add_model(services, min_replicas=1)
        replicas.reconcile(services)
        assert only(services).state is ReplicaState.INSTALLING

    def test_one_more_comes_when_many_wait_for_long(self, services: Services, node: Node) -> None:
        add_model(services, max_replicas=2, slots=1)
        bring_up(services, node, "m")
        ready_node(services, "n2")
        older(services, 6.0)
        line = names.waiting_key(names.model_queue(model_named(services, "m").id))
        job_id = ask(services)
        replicas.reconcile(services)
        assert len(all_replicas(services)) == 1
        services.redis.zincrby(line, -6000, job_id)
        replicas.reconcile(services)
        assert len(all_replicas(services)) == 2
        replicas.reconcile(services)
        assert len(all_replicas(services)) == 2

    def test_an_unused_replica_goes_after_its_time(self, services: Services, node: Node) -> None:
        add_model(services, idle_timeout=60)
        bring_up(services, node, "m")
        replicas.reconcile(services)
        assert only(services).state is ReplicaState.READY
        older(services, 61.0)
        with services.db.transaction() as db:
            db.execute(text("UPDATE replicas SET used_at = used_at - interval '61 s'"))
        replicas.reconcile(services)
        assert only(services).state is ReplicaState.STOPPING
        assert only(services).reason.startswith("unused for 61 s")
