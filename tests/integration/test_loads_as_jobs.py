"""A load is a job: made with its replica's move, ended with what becomes of that, cancelled, tried again, and never lost.

The replica's process is played by the test, which claims the job as that does; what the process does is in `test_children`.
"""

from collections.abc import Callable
from dataclasses import asdict, replace

import httpx
import pytest
from cluster_data import (
    FACTS,
    add_model,
    claim,
    expire,
    model_named,
    ready_node,
    reported,
    rung,
    watched,
)
from sqlalchemy import text

from localai_q import names
from localai_q.bus import presence
from localai_q.bus.leases import Lease, Refusal
from localai_q.cluster.capacity import Booking
from localai_q.cluster.events import End, Progress
from localai_q.cluster.jobs import LOAD, Job
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.stages import ENDING
from localai_q.cluster.states import JobState, ReplicaState
from localai_q.errors import ModelUnavailable, Paused, to_record
from localai_q.services import jobs, models, nodes, replicas
from localai_q.services.nodes import OFFLINE_AFTER
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from localai_q.store import replicas as rows

OPEN, DONE, FAILED, CANCELLED = JobState


def installed(services: Services) -> None:
    """Bring every replica up to its load."""
    replicas.reconcile(services)
    with services.db.transaction() as db:
        for found in rows.every(db):
            if found.state is ReplicaState.INSTALLING and found.job_id:
                job_rows.end(db, found.job_id, End(state=DONE, result={}), attempt=1)
    replicas.reconcile(services)


def begun(services: Services, **config: object) -> tuple[Replica, str]:
    """A replica of the model `m` that loads, and the id of its load."""
    add_model(services, "m", min_replicas=1, **config)
    installed(services)
    found = only(services)
    assert found is not None
    assert found.state is ReplicaState.LOADING
    assert found.job_id
    return found, found.job_id


def only(services: Services) -> Replica | None:
    with services.db.transaction() as db:
        found = rows.every(db)
    assert len(found) < 2, found
    return found[0] if found else None


def row(services: Services, job_id: str) -> Job:
    with services.db.transaction() as db:
        found = job_rows.by_id(db, job_id)
    assert found is not None
    return found


def message(job: Job) -> str:
    return str((job.error or {}).get("message", ""))


def held(services: Services, found: Replica, job_id: str) -> Lease:
    return claim(services, job_id, names.replica_queue(found.id), found.node_id)


def settled(services: Services, job_id: str) -> Job:
    """The job once control has looked, of which nothing may be left then."""
    replicas.reconcile(services)
    jobs.apply_ends(services)
    found = row(services, job_id)
    assert services.leases.waiting(found.line) == []
    assert services.leases.held(found.line) == 0
    return found


def after(services: Services, seconds: float) -> None:
    """Let so much time pass for what has ended and changed."""
    with services.db.transaction() as db:
        db.execute(text("UPDATE jobs SET ended_at = ended_at - make_interval(secs => :s)"), {"s": seconds})
        db.execute(text("UPDATE replicas SET changed_at = changed_at - make_interval(secs => :s)"), {"s": seconds})


def test_it_is_made_with_the_move_and_its_node_is_told_once(services: Services, node: Node) -> None:
    found, job_id = begun(services)
    line = names.replica_queue(found.id)
    job = row(services, job_id)
    assert (job.kind, job.state, job.line, job.subject) == (LOAD, OPEN, line, "m")
    assert (job.model_id, job.node_id) == (found.model_id, node.id)
    assert services.leases.waiting(line) == [job_id]
    assert rung(services, names.node_queue(node.id))[-1:] == [f"start_replica({found.id})"]
    assert [rung(services, queue) for queue in (line, names.model_queue(found.model_id))] == [[], []]
    assert f"run_job({job_id})" not in rung(services, names.node_jobs_queue(node.id)), (
        "what does other jobs never gets it"
    )
    assert nodes.replica_spec(services, node, found.id)["job"] == job_id
    lease = held(services, found, job_id)
    assert lease.request == {"kind": LOAD, "replica": found.id, "name": "m"}
    replicas.reconcile(services)
    assert only(services) == found


def report(state: ReplicaState, reason: str = "") -> Callable[[Services, Node, Replica], None]:
    return lambda services, node, found: nodes.report_replica(services, node, found.id, state, reason)


def lost(services: Services, node: Node, found: Replica) -> None:
    """The node reports three times without a process of the replica."""
    for _ in range(3):
        nodes.heartbeat(services, node, hardware={})


def adopted(services: Services, node: Node, found: Replica) -> None:
    """The replica's row was lost, and its process was found by a heartbeat."""
    with services.db.transaction() as db:
        rows.forget(db, found.id)
    nodes.heartbeat(services, node, hardware={}, reported=[reported(found, state="loading")])
    assert only(services) is not None


def falls_silent(services: Services, node: Node, found: Replica) -> None:
    seconds = (OFFLINE_AFTER + 1) * services.settings.heartbeat
    with services.db.transaction() as db:
        db.execute(text("UPDATE nodes SET last_heartbeat = now() - make_interval(secs => :s)"), {"s": seconds})
    presence.announce(services.redis, "w1")
    services.redis.set(names.SERVED_SINCE, 0, px=60_000)
    nodes.watch_health(services)


ENDINGS = {
    "ready": (report(ReplicaState.READY), DONE, ""),
    "died": (report(ReplicaState.FAILED, "exit code -9: its words"), FAILED, "exit code -9: its words"),
    "stalled": (report(ReplicaState.FAILED, "loading stalled: nothing"), FAILED, "loading stalled: nothing"),
    "gone": (report(ReplicaState.GONE), FAILED, "What was loaded is not there any more."),
    "lost": (lost, FAILED, "its process is gone, and nobody was told how it ended"),
    "stopped": (lambda s, n, f: replicas.stop(s, f.id, "in the way"), FAILED, "Not needed: in the way."),
    "adopted": (adopted, FAILED, "What was loaded is not there any more."),
    "model removed": (lambda s, n, f: models.remove(s, "m"), FAILED, "The model 'm' was removed."),
    "node stopped": (lambda s, n, f: nodes.deregister(s, n), FAILED, "The node 'n1' has left before this was done."),
    "node restarted": (lambda s, n, f: ready_node(s), FAILED, "The node 'n1' was started anew before this was done."),
    "node deleted": (lambda s, n, f: nodes.remove(s, "n1", force=True), FAILED,
                     "The node 'n1' was deleted before this was done."),
    "node silent": (falls_silent, FAILED, "The node 'n1' is offline before this was done."),
}  # fmt: skip


@pytest.mark.parametrize("claimed", [True, False], ids=["claimed", "waiting"])
@pytest.mark.parametrize("what", ENDINGS)
def test_what_becomes_of_the_replica_becomes_of_its_load(
    services: Services, node: Node, what: str, claimed: bool
) -> None:
    found, job_id = begun(services)
    if claimed:
        held(services, found, job_id)
    happen, state, why = ENDINGS[what]
    happen(services, node, found)
    ended = settled(services, job_id)
    assert (ended.state, message(ended)) == (state, why)
    assert services.leases.claim(job_id, ended.line, owner="o", node_id=node.id) == Refusal(job_id=job_id, why="ended")


def test_what_its_owner_says_of_its_end_counts(services: Services, node: Node) -> None:
    found, job_id = begun(services)
    lease = held(services, found, job_id)
    end = End(state=FAILED, error=to_record(ModelUnavailable("the file is damaged")))
    services.leases.finish(lease, lease.last_index + 1, end, node_id=node.id)
    nodes.report_replica(services, node, found.id, ReplicaState.FAILED, "it ended")
    assert message(settled(services, job_id)) == "the file is damaged"


def test_a_load_that_is_done_makes_no_replica_ready_and_teaches_nothing(services: Services, node: Node) -> None:
    found, job_id = begun(services)
    lease = held(services, found, job_id)
    told = {"facts": asdict(FACTS), "sha256": "a" * 64, "size": 1}
    services.leases.finish(lease, lease.last_index + 1, End(state=DONE, result=told), node_id=node.id)
    assert settled(services, job_id).state is DONE
    after(services, ENDING + 1)
    replicas.reconcile(services)
    assert only(services).state is ReplicaState.LOADING
    assert model_named(services, "m").facts is None
    lost(services, node, found)
    assert only(services).state is ReplicaState.FAILED


def test_one_that_nobody_has_claimed_is_cancelled_and_fails_once_its_process_has_had_time(
    services: Services, node: Node, http: httpx.Client
) -> None:
    found, job_id = begun(services)
    assert http.delete(f"/api/jobs/{job_id}").json()["state"] == "cancelled"
    assert settled(services, job_id).state is CANCELLED
    replicas.reconcile(services)
    assert only(services).state is ReplicaState.LOADING, "what its process has is not free yet"
    answer = http.post(f"/api/jobs/{job_id}/retry")
    assert (answer.status_code, "in a moment" in answer.text) == (409, True)
    after(services, ENDING + 1)
    replicas.reconcile(services)
    failed = only(services)
    assert (failed.state, failed.reason) == (ReplicaState.FAILED, "loading: The job was cancelled.")
    assert nodes.report_replica(services, node, found.id, ReplicaState.FAILED, "The job was cancelled.") is None
    assert only(services).failures == 1
    after(services, 2)
    installed(services)
    again = only(services)
    assert again.state is ReplicaState.LOADING
    assert again.job_id != job_id


@pytest.mark.parametrize("path", ["/api/jobs/{}", "/api/operations/{}/cancel"])
def test_one_that_is_under_way_is_cancelled_by_its_owner(
    services: Services, node: Node, http: httpx.Client, path: str
) -> None:
    found, job_id = begun(services)
    lease = held(services, found, job_id)
    http.request("DELETE" if "jobs" in path else "POST", path.format(job_id)).raise_for_status()
    assert row(services, job_id).state is OPEN
    assert services.redis.hget(names.job_key(job_id), "cancel") == "1"
    end = End(state=CANCELLED, error={"error": "Cancelled", "message": "The job was cancelled."})
    services.leases.finish(lease, lease.last_index + 1, end, node_id=node.id)
    nodes.report_replica(services, node, found.id, ReplicaState.FAILED, "The job was cancelled.")
    assert settled(services, job_id).state is CANCELLED
    assert only(services).reason == "The job was cancelled."


def test_one_that_no_process_begins_is_ended_and_fails(services: Services, node: Node) -> None:
    hurried = replace(services, settings=services.settings.model_copy(update={"load_stall": 1.0, "heartbeat": 3600.0}))
    found, job_id = begun(hurried)
    line = names.replica_queue(found.id)
    services.redis.zadd(names.waiting_key(line), {job_id: 1}, xx=True)
    with services.db.transaction() as db:
        db.execute(text("UPDATE jobs SET created_at = created_at - interval '10 seconds'"))
    watched(hurried)
    jobs.recover(hurried)
    assert message(settled(hurried, job_id)) == "its node has not begun it for 1 s"


@pytest.mark.parametrize("loses", ["lease", "line", "claim"])
def test_one_whose_owner_or_data_is_lost_waits_for_its_own_process(services: Services, node: Node, loses: str) -> None:
    found, job_id = begun(services)
    line = names.replica_queue(found.id)
    if loses != "line":
        held(services, found, job_id)
    services.redis.delete(*queues(found))
    with services.db.transaction() as db:
        db.execute(text("UPDATE jobs SET created_at = created_at - interval '1 minute'"))
    for death in range(1, 4 if loses == "lease" else 2):  # however often, for it is no request that kills its owners
        if loses == "lease":
            expire(services, job_id, line)
        else:
            services.redis.flushdb()
        watched(services)
        jobs.recover(services)
        assert services.leases.waiting(line) == [job_id]
        assert held(services, found, job_id).attempt > death
    assert [rung(services, queue) for queue in queues(found)] == [[]] * 4, "nobody is told, but by what is to start it"
    assert row(services, job_id).state is OPEN


def queues(found: Replica) -> list[str]:
    return [names.node_queue(found.node_id), names.node_jobs_queue(found.node_id), names.replica_queue(found.id),
            names.model_queue(found.model_id)]  # fmt: skip


def failed(services: Services, node: Node, **config: object) -> tuple[Replica, str]:
    """A replica of which the load has failed a moment ago, and the id of that."""
    found, job_id = begun(services, **config)
    lease = held(services, found, job_id)
    event = Progress(stage="loading")
    services.leases.append([(lease, lease.last_index + 1, [event])])
    end = End(state=FAILED, error=to_record(ModelUnavailable("the backend ended; its last words: no such tensor")))
    services.leases.finish(lease, lease.last_index + 2, end, node_id=node.id)
    nodes.report_replica(services, node, found.id, ReplicaState.FAILED, "the backend ended")
    settled(services, job_id)
    return found, job_id


def test_one_that_has_failed_is_tried_again_at_once_and_once(
    services: Services, node: Node, http: httpx.Client
) -> None:
    found, job_id = failed(services, node)
    assert only(services).state is ReplicaState.FAILED
    retry = f"/api/jobs/{job_id}/retry"
    answer = http.post(retry)
    assert answer.status_code == 202
    again = only(services)
    assert (again.state, again.job_id, again.failures) == (ReplicaState.LOADING, answer.json()["jobID"], 1)
    assert again.job_id != job_id
    assert rung(services, names.node_queue(node.id))[-1] == f"start_replica({found.id})"
    assert http.post(retry).json()["jobID"] == again.job_id
    assert held(services, found, again.job_id).attempt == 1
    nodes.report_replica(services, node, found.id, ReplicaState.READY, "")
    refused = http.post(retry)
    assert (refused.status_code, refused.json()["error"]["message"]) == (
        409, "This copy is ready: only one that has failed can be loaded again."
    )  # fmt: skip


def gone(services: Services, node: Node, found: Replica) -> None:
    nodes.report_replica(services, node, found.id, ReplicaState.GONE, "")


REFUSED = {
    "gone": (gone, "This copy is not there any more. The next request for its model has another one loaded."),
    "draining": (lambda s, n, f: nodes.drain(s, n), "its node takes nothing new"),
    "full": (lambda s, n, f: full(s), "needs 5.0 GB, 1.0 GB free"),
    "complete": (lambda s, n, f: elsewhere(s), "its model has 1 elsewhere, and max_replicas allows no more"),
    "changed": (lambda s, n, f: models.edit(s, "m", {"context_size": 256}), "its model was changed"),
    "away": (lambda s, n, f: nodes.deregister(s, n), "its node is not there"),
    "removed": (lambda s, n, f: models.remove(s, "m"), "its model was removed"),
}


def elsewhere(services: Services) -> None:
    """Another copy is ready on another node."""
    other, model_id = ready_node(services, "n2", "another"), model_named(services, "m").id
    with services.db.transaction() as db:
        rows.enter(db, names.new_id(), ReplicaState.READY, booking=Booking(), model_id=model_id,
                   node_id=other.id, number=1, revision=1, slots=1)  # fmt: skip


def full(services: Services) -> None:
    with services.db.transaction() as db:
        db.execute(text("""UPDATE nodes SET hardware = '{"ram_available": 1000000000}'"""))


@pytest.mark.parametrize("what", REFUSED)
def test_one_that_cannot_be_tried_again_says_why(services: Services, node: Node, http: httpx.Client, what: str) -> None:
    found, job_id = failed(services, node, memory=5_000_000_000)
    happen, why = REFUSED[what]
    happen(services, node, found)
    answer = http.post(f"/api/jobs/{job_id}/retry")
    assert (answer.status_code, why in answer.json()["error"]["message"]) == (409, True), answer.text
    assert jobs.listed(services, states=["open"], kinds=[LOAD], limit=1) == []


def test_its_log_has_the_last_words_and_is_kept(services: Services, node: Node, http: httpx.Client) -> None:
    _, job_id = failed(services, node)
    services.redis.flushdb()
    assert http.get(f"/api/jobs/{job_id}/log").text == (
        "loading\nfailed: the backend ended; its last words: no such tensor\n"
    )


def test_it_is_an_operation_and_then_history_that_is_forgotten(
    services: Services, node: Node, http: httpx.Client
) -> None:
    found, job_id = begun(services)
    lease = held(services, found, job_id)
    services.leases.append([(lease, lease.last_index + 1, [Progress(stage="loading")])])
    (shown,) = http.get("/api/operations").json()["operations"]
    assert (shown["name"], shown["jobID"], shown["taskType"], shown["nodeName"]) == ("m", job_id, "load", "n1")
    assert (shown["phase"], shown["isQueued"], shown["cancellable"]) == ("loading", False, True)
    assert [job["id"] for job in http.get("/api/jobs?kind=load_model&node=n1").json()["jobs"]] == [job_id]
    services.leases.finish(lease, lease.last_index + 2, End(state=DONE, result={}), node_id=node.id)
    jobs.apply_ends(services)
    dismiss = f"/api/operations/{job_id}/dismiss"
    assert http.post(dismiss).status_code == 409, "its replica is not ready yet"
    nodes.report_replica(services, node, found.id, ReplicaState.READY, "")
    (first, *_) = http.get("/api/operations/history").json()["operations"]
    assert (first["jobID"], first["taskType"], first["outcome"]) == (job_id, "load", "completed")
    assert http.post(dismiss).status_code == 200
    assert http.get(f"/api/jobs/{job_id}").status_code == 404


def test_it_cannot_be_paused_by_anybody(services: Services, node: Node, http: httpx.Client) -> None:
    found, job_id = begun(services)
    assert http.post(f"/api/jobs/{job_id}/pause").status_code == 409
    lease = held(services, found, job_id)
    end = End(state=CANCELLED, error=to_record(Paused()))
    services.leases.finish(lease, lease.last_index + 1, end, node_id=node.id)
    settled(services, job_id)
    after(services, ENDING + 1)
    replicas.reconcile(services)
    assert only(services).state is ReplicaState.FAILED, "what a node calls a pause keeps no replica loading"
