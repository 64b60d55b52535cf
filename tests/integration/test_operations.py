"""What nodes do and have done, as an admin follows it: operations, events of jobs, and another try."""

import json
import threading
from typing import Any

import httpx
import pytest
from cluster_data import add_model, claim, ready_node
from waiting import LIMIT, wait_for

from api import events as api_events
from localai_q import names
from localai_q.cli.client import Api
from localai_q.cli.jobs import _lines
from localai_q.cluster.backends import MOST_ATTEMPTS, Op
from localai_q.cluster.events import End, Progress
from localai_q.cluster.jobs import Job, is_pause
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState, ReplicaState
from localai_q.config import load_settings
from localai_q.services import backends, jobs, keys, models, nodes, replicas
from localai_q.services.wiring import Services
from localai_q.store import backends as wish_rows
from localai_q.store import jobs as job_rows
from localai_q.store import replicas as replica_rows
from workers.claims import Claims

FAILED = End(state=JobState.FAILED, error={"error": "Unavailable", "message": "no network"})


def fetch(services: Services, node: Node, name: str = "tiny") -> str:
    request = {"kind": "fetch_model", "source": "https://x.example/m", "name": name}
    return jobs.submit_node_job(services, kind="fetch_model", node_id=node.id, model_id=None, request=request)


def emit(services: Services, node: Node, job_id: str, *events: Any) -> None:
    """The node works on a job, and says this of it."""
    lease = claim(services, job_id, names.node_jobs_queue(node.id), node.id)
    services.leases.append([(lease, lease.last_index + 1, events)])


def end(services: Services, node: Node, job_id: str, event: End) -> None:
    lease = claim(services, job_id, names.node_jobs_queue(node.id), node.id)
    services.leases.finish(lease, lease.last_index + 1, event, node_id=node.id)
    jobs.apply_ends(services)


def operations(http: httpx.Client, path: str = "") -> list[dict]:
    return http.get(f"/api/operations{path}").raise_for_status().json()["operations"]


def test_open_work_is_shown_with_its_progress_in_localais_form(
    services: Services, node: Node, http: httpx.Client
) -> None:
    install = backends.change(services, node, Op.INSTALL, "echo")
    fetching = fetch(services, node)
    emit(services, node, fetching, Progress(stage="downloading", done=50, total=200, unit="bytes", note="half"))
    first, second = operations(http)
    assert first == {
        "id": "echo", "name": "echo", "fullName": "echo", "jobID": install, "progress": 0, "taskType": "installation",
        "isDeletion": False, "isBackend": True, "isQueued": True, "cancellable": True, "message": "", "phase": "queued",
        "nodeID": node.id, "nodeName": "n1",
    }  # fmt: skip
    assert (second["name"], second["taskType"], second["progress"], second["isQueued"]) == (
        "tiny",
        "staging",
        25,
        False,
    )
    assert (second["currentBytes"], second["totalBytes"], second["phase"]) == (50, 200, "downloading")
    assert http.post(f"/api/operations/{install}/cancel").json()["success"] is True
    jobs.apply_ends(services)
    assert [one["jobID"] for one in operations(http)] == [fetching]
    assert http.post("/api/operations/nothing/cancel").status_code == 404


def test_what_is_about_no_one_thing_is_called_by_what_it_does(
    services: Services, node: Node, http: httpx.Client
) -> None:
    request = {"kind": "clean_models", "files": []}
    jobs.submit_node_job(services, kind="clean_models", node_id=node.id, model_id=None, request=request)
    assert [(one["name"], one["taskType"]) for one in operations(http)] == [("clean_models", "deletion")]


def test_what_a_node_that_is_away_should_do_and_what_was_given_up_is_shown(
    services: Services, node: Node, http: httpx.Client
) -> None:
    nodes.deregister(services, node)
    told = backends.change_everywhere(services, Op.INSTALL, "echo")
    (shown,) = operations(http)
    assert (shown["jobID"], shown["isQueued"], shown["phase"]) == (told["uuid"], True, "waiting")
    with services.db.transaction() as db:
        (wish,) = wish_rows.every(db)
        wish_rows.note(db, wish, state="dead", attempts=MOST_ATTEMPTS, last_error="no network")
    (shown,) = operations(http)
    assert (shown["isQueued"], shown["phase"], shown["error"]) == (False, "dead", "no network")
    assert shown["message"] == "given up after 10 attempts"


def test_an_open_request_for_many_nodes_is_cancelled_by_its_id(
    services: Services, node: Node, http: httpx.Client
) -> None:
    nodes.deregister(services, node)
    told = backends.change_everywhere(services, Op.INSTALL, "echo")
    assert http.post(f"/api/operations/{told['uuid']}/cancel").status_code == 200
    assert operations(http) == []


def test_what_has_ended_is_history_the_newest_first(services: Services, node: Node, http: httpx.Client) -> None:
    install, fetching = backends.change(services, node, Op.INSTALL, "echo"), fetch(services, node)
    end(services, node, install, End(state=JobState.DONE, result={}))
    end(services, node, fetching, FAILED)
    second, first = operations(http, "/history")
    assert (first["jobID"], first["name"], first["outcome"], first["error"]) == (install, "echo", "completed", None)
    assert (second["name"], second["outcome"], second["error"]) == ("tiny", "failed", "no network")
    assert first["started"] <= first["ended"]
    assert len(operations(http, "/history?limit=1")) == 1
    assert http.get("/api/operations/history?limit=0").status_code == 400


def events(http: httpx.Client, job_id: str, **headers: str) -> list[dict]:
    text = http.get(f"/api/jobs/{job_id}/events", headers=headers, timeout=LIMIT).raise_for_status().text
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def test_the_progress_and_the_end_of_a_job_are_events(services: Services, node: Node, http: httpx.Client) -> None:
    job_id = fetch(services, node)
    seen: list[dict] = []
    reading = threading.Thread(target=lambda: seen.extend(events(http, job_id)))
    reading.start()
    assert wait_for(lambda: services.leases.live([job_id])[job_id].watchers)
    lease = claim(services, job_id, names.node_jobs_queue(node.id), node.id)
    steps = [Progress(stage="downloading", done=done, total=2, unit="bytes") for done in (1, 2)]
    services.leases.append([(lease, lease.last_index + 1, steps)])
    services.leases.finish(lease, lease.last_index + 3, End(state=JobState.DONE, result={"size": 2}), node_id=node.id)
    reading.join(LIMIT)
    assert [(one["type"], one.get("done")) for one in seen] == [("progress", 1), ("progress", 2), ("end", None)]
    assert seen[-1] == {"type": "end", "state": "done", "error": None, "result": {"size": 2}}
    jobs.apply_ends(services)
    assert events(http, job_id) == seen
    place = f"{job_id}:{lease.attempt}-{lease.last_index + 1}"
    assert events(http, job_id, **{"Last-Event-ID": place}) == seen[1:]
    services.redis.delete(names.journal_key(job_id))
    assert events(http, job_id) == seen[-1:]


def test_who_looks_on_and_leaves_ends_no_job(
    services: Services, node: Node, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_events, "KEEPALIVE", 0.1)  # this server notices only when it writes that a client has left
    job_id = fetch(services, node)
    with http.stream("GET", f"/api/jobs/{job_id}/events") as response:
        next(response.iter_raw())
    assert wait_for(lambda: not services.leases.live([job_id])[job_id].watchers)
    assert jobs.listed(services, states=["open"], kinds=["fetch_model"], limit=1)[0]["id"] == job_id
    assert services.leases.waiting(names.node_jobs_queue(node.id)) == [job_id]


@pytest.mark.parametrize("header", ["nonsense", "other:1-1"])
def test_events_behind_what_is_none_of_the_jobs_are_refused(
    services: Services, node: Node, http: httpx.Client, header: str
) -> None:
    job_id = fetch(services, node)
    answer = http.get(f"/api/jobs/{job_id}/events", headers={"Last-Event-ID": header})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Last-Event-ID")


def test_what_has_failed_is_tried_again(services: Services, node: Node, http: httpx.Client) -> None:
    job_id = fetch(services, node)
    retry = f"/api/jobs/{job_id}/retry"
    assert http.post(retry).status_code == 409
    end(services, node, job_id, FAILED)
    again = http.post(retry)
    assert again.status_code == 202
    new = again.json()["jobID"]
    assert new != job_id
    assert claim(services, new, names.node_jobs_queue(node.id), node.id).request["name"] == "tiny"
    assert http.post(retry).json()["jobID"] == new
    nodes.deregister(services, node)
    assert "its node is not there" in http.post(retry).json()["error"]["message"]


def test_what_is_no_job_of_a_node_or_of_nobody_is_not_tried_again(
    services: Services, node: Node, http: httpx.Client
) -> None:
    job_id = fetch(services, node)
    end(services, node, job_id, FAILED)
    user = {"Authorization": f"Bearer {keys.create(services, name='u', role='user')[1]}"}
    for method, path in (("POST", "retry"), ("GET", "events")):
        assert http.request(method, f"/api/jobs/{job_id}/{path}", headers=user).status_code == 404
        assert http.request(method, f"/api/jobs/nothing/{path}").status_code == 404


def staged(services: Services) -> tuple[str, str]:
    """A replica that waits for its file: its id, and the id of the job that fetches it."""
    add_model(services, "m", min_replicas=1, source="https://x.example/m", sha256="0" * 64, size=1)
    replicas.reconcile(services)
    with services.db.transaction() as db:
        (replica,) = replica_rows.every(db)
        install = replica.job_id
        job_rows.end(db, install, End(state=JobState.DONE, result={}), attempt=1)
    replicas.reconcile(services)
    return replica.id, stage_of(services)[1]


def stage_of(services: Services) -> tuple[ReplicaState, str]:
    with services.db.transaction() as db:
        (replica,) = replica_rows.every(db)
    return replica.state, replica.job_id


def test_a_paused_download_is_waited_for_until_it_is_tried_again(
    services: Services, node: Node, http: httpx.Client
) -> None:
    _, fetching = staged(services)
    assert http.post(f"/api/operations/{fetching}/pause").json()["success"] is True
    jobs.apply_ends(services)
    replicas.reconcile(services)
    assert stage_of(services) == (ReplicaState.STAGING, fetching)
    (shown,) = operations(http)
    assert (shown["jobID"], shown["phase"], shown["name"]) == (fetching, "paused", "m")
    assert "staging" not in {one["taskType"] for one in operations(http, "/history")}
    for path in (f"/api/jobs/{fetching}/pause", f"/api/operations/{fetching}/dismiss"):
        assert http.post(path).status_code == 409
    again = http.post(f"/api/jobs/{fetching}/retry").json()["jobID"]
    assert again != fetching
    assert stage_of(services) == (ReplicaState.STAGING, again)
    assert [one["jobID"] for one in operations(http, "/history") if one["taskType"] == "staging"] == [fetching]
    assert [one["phase"] for one in operations(http)] == ["queued"]


def test_a_paused_download_that_is_cancelled_is_waited_for_no_more(
    services: Services, node: Node, http: httpx.Client
) -> None:
    _, fetching = staged(services)
    http.post(f"/api/jobs/{fetching}/pause").raise_for_status()
    jobs.apply_ends(services)
    assert http.delete(f"/api/jobs/{fetching}").json()["state"] == "cancelled"
    replicas.advance(services)
    assert stage_of(services)[0] is ReplicaState.FAILED


def test_a_paused_download_that_nothing_waits_for_is_shown_and_can_be_dismissed(
    services: Services, node: Node, http: httpx.Client
) -> None:
    job_id = fetch(services, node)
    http.post(f"/api/operations/{job_id}/pause").raise_for_status()
    jobs.apply_ends(services)
    assert [(one["jobID"], one["phase"]) for one in operations(http)] == [(job_id, "paused")]
    assert http.post(f"/api/operations/{job_id}/dismiss").status_code == 200
    assert operations(http) == []


def test_what_is_paused_is_no_history_and_is_not_pruned(services: Services, node: Node, http: httpx.Client) -> None:
    job_id = fetch(services, node)
    http.post(f"/api/operations/{job_id}/pause").raise_for_status()
    jobs.apply_ends(services)
    assert http.delete("/api/operations/history").json()["removed"] == 0
    assert http.post("/api/jobs/prune", json={"older_than": 0}).json()["removed"] == 0
    assert http.post(f"/api/jobs/{job_id}/retry").status_code == 202
    assert http.delete("/api/operations/history").json()["removed"] == 1


def test_what_was_paused_a_moment_ago_can_be_cancelled(services: Services, node: Node, http: httpx.Client) -> None:
    job_id = fetch(services, node)
    http.post(f"/api/jobs/{job_id}/pause").raise_for_status()
    assert http.delete(f"/api/jobs/{job_id}").json()["state"] == "cancelled"
    jobs.apply_ends(services)
    assert operations(http) == []
    assert [one["outcome"] for one in operations(http, "/history")] == ["cancelled"]


def test_what_was_to_be_paused_when_its_owner_died_is_paused(
    services: Services, node: Node, http: httpx.Client
) -> None:
    job_id, line = fetch(services, node), names.node_jobs_queue(node.id)
    lease = claim(services, job_id, line, node.id)
    assert http.post(f"/api/jobs/{job_id}/pause").status_code == 200
    jobs.bereave(services, lease.owner, line, "it was killed")
    Claims(services.redis, services.leases, owner="other", node_id=node.id, lease=30.0).claim(job_id, line)
    jobs.apply_ends(services)
    assert [(one["jobID"], one["phase"]) for one in operations(http)] == [(job_id, "paused")]


def test_of_what_redis_has_lost_no_end_is_told(services: Services, node: Node, http: httpx.Client) -> None:
    job_id = fetch(services, node)
    services.redis.flushdb()
    assert events(http, job_id) == []


def test_a_log_that_the_api_loses_sight_of_is_gone_on_with(
    services: Services, node: Node, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = fetch(services, node)
    lease = claim(services, job_id, names.node_jobs_queue(node.id), node.id)
    services.leases.append([(lease, lease.last_index + 1, [Progress(stage="downloading")])])
    monkeypatch.setattr(api_events, "LONGEST", -LIMIT)
    key = http.headers["authorization"].split()[1]
    lines = _lines(Api(load_settings(api_url=str(http.base_url), api_key=key)), job_id)
    assert next(lines) == "downloading"
    reading = threading.Timer(3.0, services.leases.finish, (lease, lease.last_index + 2, FAILED), {"node_id": node.id})
    reading.start()
    assert list(lines) == ["failed: no network"]


@pytest.mark.parametrize(
    "written",
    [{"e": '{"k":"p","s":"x","d":NaN,"t":1e999,"u":"bytes","n":""}'}, {"e": '{"k":"p"}'}, {"e": "{"}, {"x": "y"}],
)
def test_a_node_that_writes_nonsense_of_its_job_spoils_nothing_for_others(
    services: Services, node: Node, http: httpx.Client, written: dict
) -> None:
    job_id, other = fetch(services, node), fetch(services, node, "other")
    lease = claim(services, job_id, names.node_jobs_queue(node.id), node.id)
    services.redis.xadd(names.journal_key(job_id), written, id=f"{lease.attempt}-{lease.last_index + 1}")
    shown = {one["jobID"]: one for one in operations(http)}
    assert (set(shown), shown[job_id]["progress"]) == ({job_id, other}, 0)
    assert {job["id"] for job in http.get("/api/jobs").raise_for_status().json()["jobs"]} == {job_id, other}
    services.leases.finish(lease, lease.last_index + 2, FAILED, node_id=node.id)
    end(services, node, other, FAILED)
    assert {one["jobID"]: one["outcome"] for one in operations(http, "/history")} == dict.fromkeys(shown, "failed")
    assert http.get(f"/api/jobs/{job_id}/log").text.endswith("failed: no network\n")


def test_what_was_cancelled_is_not_paused_afterwards(services: Services, node: Node, http: httpx.Client) -> None:
    job_id = fetch(services, node)
    lease = claim(services, job_id, names.node_jobs_queue(node.id), node.id)
    assert http.post(f"/api/jobs/{job_id}/pause").status_code == 200
    assert is_pause(services.leases.asked(job_id).error)
    assert http.delete(f"/api/jobs/{job_id}").json()["state"] == "cancelling"
    http.post(f"/api/jobs/{job_id}/pause")
    assert not is_pause(services.leases.asked(job_id).error)
    services.leases.finish(lease, lease.last_index + 1, FAILED, node_id=node.id)


def test_a_download_for_a_model_that_was_removed_is_not_tried_again(
    services: Services, node: Node, http: httpx.Client
) -> None:
    _, fetching = staged(services)
    end(services, node, fetching, FAILED)
    models.remove(services, "m")
    refused = http.post(f"/api/jobs/{fetching}/retry")
    assert (refused.status_code, "its model was removed" in refused.text) == (409, True)


def test_only_a_download_is_paused(services: Services, node: Node, http: httpx.Client) -> None:
    install = backends.change(services, node, Op.INSTALL, "echo")
    refused = http.post(f"/api/operations/{install}/pause")
    assert (refused.status_code, "only a download" in refused.text) == (409, True)
    assert http.post("/api/jobs/nothing/pause").status_code == 404


def test_what_has_ended_is_dismissed_and_what_is_open_is_not(
    services: Services, node: Node, http: httpx.Client
) -> None:
    first, second = fetch(services, node), fetch(services, node, "other")
    assert http.post(f"/api/operations/{first}/dismiss").status_code == 409
    end(services, node, first, FAILED)
    assert http.post(f"/api/operations/{first}/dismiss").json()["success"] is True
    assert operations(http, "/history") == []
    end(services, node, second, FAILED)
    assert http.delete("/api/operations/history").json() == {"success": True, "removed": 1}
    assert http.get("/api/jobs").json()["jobs"] == []
    assert http.post("/api/operations/nothing/dismiss").status_code == 404


def test_a_request_for_many_nodes_that_was_given_up_is_dismissed(
    services: Services, node: Node, http: httpx.Client
) -> None:
    nodes.deregister(services, node)
    dismiss = f"/api/operations/{backends.change_everywhere(services, Op.INSTALL, 'echo')['uuid']}/dismiss"
    assert http.post(dismiss).status_code == 409
    with services.db.transaction() as db:
        (wish,) = wish_rows.every(db)
        wish_rows.note(db, wish, state="dead", attempts=MOST_ATTEMPTS, last_error="no network")
    assert http.post(dismiss).status_code == 200
    assert operations(http) == []


def test_jobs_are_pruned_by_age_state_and_kind(services: Services, node: Node, http: httpx.Client) -> None:
    ended = {}
    for name, event in (("a", FAILED), ("b", End(state=JobState.DONE, result={}))):
        ended[name] = fetch(services, node, name)
        end(services, node, ended[name], event)
    opened = fetch(services, node, "c")

    def left() -> set[str]:
        return {job["id"] for job in http.get("/api/jobs").json()["jobs"]}

    def prune(**body: Any) -> int:
        return http.post("/api/jobs/prune", json=body).raise_for_status().json()["removed"]

    assert prune(older_than=3600) == prune(older_than=0, kinds=["chat"]) == 0
    assert prune(older_than=0, states=["failed"]) == 1
    assert left() == {ended["b"], opened}
    assert prune(older_than=0) == 1
    assert left() == {opened}
    for wrong in ({}, {"older_than": -1}, {"older_than": 0, "states": ["open"]}, {"older_than": 0, "kinds": ["x"]}):
        assert http.post("/api/jobs/prune", json=wrong).status_code == 400


def test_what_a_replica_is_to_learn_of_is_not_pruned(services: Services, node: Node, http: httpx.Client) -> None:
    _, fetching = staged(services)
    end(services, node, fetching, FAILED)
    assert http.post(f"/api/operations/{fetching}/dismiss").status_code == 409


def test_jobs_are_listed_by_node(services: Services, node: Node, http: httpx.Client) -> None:
    other = ready_node(services, "n2", "other")
    there = fetch(services, other)
    fetch(services, node)
    for asked in ("n2", other.id):
        assert [job["id"] for job in http.get("/api/jobs", params={"node": asked}).json()["jobs"]] == [there]
    assert http.get("/api/jobs?node=nobody").status_code == 404


def test_the_log_of_a_job_is_there_while_it_runs_and_when_its_journal_has_gone(
    services: Services, node: Node, http: httpx.Client
) -> None:
    job_id = fetch(services, node)
    path = f"/api/jobs/{job_id}/log"
    assert http.get(path).text == ""
    lease = claim(services, job_id, names.node_jobs_queue(node.id), node.id)
    services.leases.append([(lease, lease.last_index + 1, [Progress(stage="downloading", note="from n2")])])
    assert http.get(path).text == "downloading: from n2\n"
    services.leases.finish(lease, lease.last_index + 2, FAILED, node_id=node.id)
    jobs.apply_ends(services)
    services.redis.flushdb()
    assert http.get(path).text == "downloading: from n2\nfailed: no network\n"
    http.delete("/api/operations/history").raise_for_status()
    assert http.get(path).status_code == 404


def test_the_log_of_a_job_whose_node_has_died_is_kept(services: Services, node: Node, http: httpx.Client) -> None:
    job_id = fetch(services, node)
    emit(services, node, job_id, Progress(stage="downloading", note="from n2"))
    nodes.remove(services, node.name, force=True)
    jobs.apply_ends(services)
    services.redis.delete(names.journal_key(job_id))
    first, last = http.get(f"/api/jobs/{job_id}/log").text.splitlines()
    assert (first, last.partition(":")[0]) == ("downloading: from n2", "failed")


def test_a_log_is_for_who_may_see_the_job_and_has_none_of_what_a_model_said(
    services: Services, node: Node, http: httpx.Client
) -> None:
    job_id = fetch(services, node)
    user = {"Authorization": f"Bearer {keys.create(services, name='u', role='user')[1]}"}
    assert http.get(f"/api/jobs/{job_id}/log", headers=user).status_code == 404
    chatted = Job(
        id="chatted", kind="chat", state=JobState.OPEN, line="model.m", model_id=add_model(services), request={}
    )
    with services.db.transaction() as db:
        job_rows.add(db, chatted)
    assert "has no log" in http.get("/api/jobs/chatted/log").json()["error"]["message"]
