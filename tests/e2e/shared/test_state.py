"""What the cluster keeps of a request, what it forgets, and what it shows of itself."""

import base64
import json
import re
import time
from typing import Any

import httpx
import pytest
from e2e_cluster import CHAT_MODEL, Cluster, processes_of, until
from waiting import LIMIT

from localai_q.gallery import catalog

SECRET = "zebra-quartz-violin"


def flower(cluster: Cluster, path: str, password: str = "") -> httpx.Response:
    state = cluster.state()
    auth = ("admin", password or state["flower_password"])
    return httpx.get(cluster.ready["flower_url"] + path, auth=auth, timeout=LIMIT, follow_redirects=True)


def test_an_ended_job_has_its_usage_timings_and_node_and_no_request(calm: Cluster) -> None:
    before = time.time()
    answer = calm.say("[[echo tokens=5 delay_ms=20]]")
    job_id = answer.id.removeprefix("chatcmpl-")
    job = calm.ended_job(job_id)
    assert (job["id"], job["kind"], job["state"], job["model"]) == (job_id, "chat", "done", "echo")
    assert (job["node"], job["attempt"], job["live"], job["error"]) == ("alpha", 1, None, None)
    assert job["usage"] == {"prompt_tokens": answer.usage.prompt_tokens, "completion_tokens": 5, "cached_tokens": 0}
    assert 0.08 <= job["timings"]["generation"] <= job["timings"]["total"] < 5
    assert before - 1 <= job["created"] <= job["ended"] <= time.time() + 1
    assert job["deadline"] - job["created"] == pytest.approx(600, abs=2)
    assert calm.sql("SELECT request, state FROM jobs WHERE id = %s", job_id) == [(None, "done")]
    listed = {each["id"]: each for each in calm.jobs(limit=10)}
    assert listed[job_id] == job


def test_a_job_row_with_its_request_is_there_while_it_runs(calm: Cluster) -> None:
    text = f"[[echo tokens=3 delay_ms=400]] {SECRET}-open"
    stream = calm.say(text, stream=True)
    job_id = next(stream).id.removeprefix("chatcmpl-")
    [(state, request)] = calm.sql("SELECT state, request FROM jobs WHERE id = %s", job_id)
    shown = calm.job(job_id)
    for _ in stream:
        pass
    assert state == "open"
    assert request["body"]["messages"][0]["content"] == text
    assert (shown["state"], shown["live"], shown["node"], shown["attempt"]) == ("open", "leased", "alpha", 1)
    assert SECRET not in json.dumps(shown)
    assert calm.ended_job(job_id)["state"] == "done"


def test_the_real_models_job_counts_what_the_client_was_told(cluster: Cluster) -> None:
    answer = cluster.say("Name a river.", model=CHAT_MODEL, max_tokens=5, temperature=0)
    job = cluster.ended_job(answer.id.removeprefix("chatcmpl-"))
    assert job["usage"]["prompt_tokens"] == answer.usage.prompt_tokens
    assert job["usage"]["completion_tokens"] == answer.usage.completion_tokens == 5
    assert job["timings"]["prompt"] > 0
    assert job["timings"]["generation"] > 0


def test_nothing_of_a_prompt_is_left_in_the_queue_the_logs_or_flower(calm: Cluster) -> None:
    # The answer is made of numbers, so whatever holds the word holds the prompt.
    answer = calm.say(f"[[echo tokens=2]] {SECRET}")
    failed = calm.http.post("/v1/chat/completions", json={
        "model": "echo", "messages": [{"role": "user", "content": f"[[echo tokens=2 fail_after=1]] {SECRET}"}],
    })  # fmt: skip
    assert failed.status_code == 500
    calm.ended_job(answer.id.removeprefix("chatcmpl-"))
    until(lambda: not calm.open_generations(), LIMIT, "the end of both")
    held = []
    valkey = calm.redis()
    for key in valkey.scan_iter(count=1000):
        if SECRET.encode() in key + valkey.dump(key):
            held.append(key)  # a dump is compressed from some length on: the values are looked at, too
        kind = valkey.type(key)
        values = {b"hash": valkey.hgetall, b"list": lambda k: valkey.lrange(k, 0, -1),
                  b"zset": lambda k: valkey.zrange(k, 0, -1), b"set": valkey.smembers,
                  b"stream": valkey.xrange, b"string": valkey.get}[kind](key)  # fmt: skip
        if SECRET in repr(values):
            held.append(key)
    assert held == []
    [(rows,)] = calm.sql("SELECT count(*) FROM jobs j WHERE to_jsonb(j)::text LIKE %s", f"%{SECRET}%")
    assert rows == 0
    tasks = flower(calm, "/api/tasks?limit=200")
    assert "localai_q.run_generation" in tasks.text
    assert SECRET not in tasks.text
    for log in calm.home.rglob("*.log"):
        assert SECRET not in log.read_text(errors="replace"), log


def test_flower_asks_for_its_password(cluster: Cluster) -> None:
    assert httpx.get(cluster.ready["flower_url"] + "/workers").status_code == 401
    assert flower(cluster, "/workers", password="wrong").status_code == 401
    assert flower(cluster, "/api/tasks", password="wrong").status_code == 401
    assert flower(cluster, "/workers").status_code == 200


def test_flower_shows_node_and_replicas_by_their_names(calm: Cluster) -> None:
    def names() -> set[str]:
        page = flower(calm, "/workers").text
        return set(re.findall(r"[\w.-]+@[\w.-]+", page))

    wanted = {"node@alpha", f"{CHAT_MODEL}.1@alpha", "echo.1@alpha", "echo-one.1@alpha"}
    until(lambda: wanted <= names(), LIMIT, f"{wanted} on Flower's page")


def test_nodes_show_their_replicas_and_no_secret(cluster: Cluster) -> None:
    response = cluster.http.get("/api/nodes")
    [node] = [node for node in response.json()["nodes"] if node["name"] == "alpha"]
    assert (node["state"], node["approved"]) == ("ready", True)
    assert node["id"] == cluster.ready["node_ids"][0]
    assert node["hardware"]
    assert time.time() - node["last_heartbeat"] < 30
    replicas = {replica["model"]: replica for replica in node["replicas"]}
    assert replicas[CHAT_MODEL]["state"] == "ready"
    assert replicas["echo"]["slots"] == 4
    assert "secret" not in response.text


def test_health_and_readiness_need_no_key(cluster: Cluster) -> None:
    alive = httpx.get(cluster.base_url + "/healthz")
    assert (alive.status_code, alive.json()["status"]) == (200, "ok")
    ready = httpx.get(cluster.base_url + "/readyz")
    assert ready.status_code == 200
    assert ready.json() == {"status": "ok", "database": "ok", "control": "ok", "broker": "ok"}


def samples(text: str) -> dict[str, float]:
    """Prometheus' lines: name with labels to value."""
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[:1] != "#"}


def test_metrics_count_requests_tokens_and_what_there_is(calm: Cluster) -> None:
    before = samples(calm.http.get("/metrics").text)
    calm.say("one two three")
    calm.http.get("/v1/nothing")
    until(lambda: not calm.open_generations(), LIMIT, "the end")
    response = calm.http.get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    after = samples(response.text)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('localai_requests_total{endpoint="/v1/chat/completions",status="200"}') == 1
    assert grown('localai_requests_total{endpoint="unknown",status="404"}') == 1
    assert grown('localai_tokens_total{model="echo",type="completion"}') == 3
    assert grown('localai_time_to_first_token_seconds_count{model="echo"}') == 1
    assert grown('localai_generation_seconds_count{model="echo"}') == 1
    assert grown('localai_jobs{kind="chat",state="done"}') == 1
    assert after['localai_nodes{state="ready"}'] >= 1
    ready = [replica for replica in calm.replicas("echo") if replica["state"] == "ready"]
    assert after['localai_replicas{model="echo",state="ready"}'] == len(ready) >= 1
    assert after['localai_jobs_waiting{model="echo"}'] == 0
    assert after['localai_jobs_running{model="echo"}'] == 0


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1.2_3", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False)]
)
def test_a_request_id_is_given_back_if_it_is_one_and_else_made(cluster: Cluster, given: str, kept: bool) -> None:
    for path in ("/healthz", "/v1/nothing", "/v1/models"):
        found = cluster.http.get(path, headers={"X-Request-Id": given}).headers["X-Request-Id"]
        assert (found == given) is kept
        assert re.fullmatch("[A-Za-z0-9._-]{1,128}", found)


def test_answers_name_their_job_and_not_the_node(calm: Cluster) -> None:
    response = calm.http.post(
        "/v1/chat/completions", json={"model": "echo", "messages": [{"role": "user", "content": "a"}]}
    )
    assert response.json()["id"] == "chatcmpl-" + response.headers["X-LocalAI-Job"]
    assert "X-LocalAI-Node" not in response.headers


def test_a_job_list_is_narrowed_and_bounded(calm: Cluster) -> None:
    calm.say("one")
    until(lambda: not calm.open_generations(), LIMIT, "the end")
    assert len(calm.jobs(limit=2)) == 2
    assert {job["state"] for job in calm.jobs(state="done", limit=50)} == {"done"}
    assert {job["kind"] for job in calm.jobs(kind="install_backend,fetch_model")} == {"install_backend", "fetch_model"}
    for limit in ("0", "1001", "x", "-1"):
        error = calm.http.get("/api/jobs", params={"limit": limit}).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "limit")


def test_basic_auth_is_what_flower_wants(cluster: Cluster) -> None:
    token = base64.b64encode(f"admin:{cluster.state()['flower_password']}".encode()).decode()
    response = httpx.get(cluster.ready["flower_url"] + "/workers", headers={"Authorization": f"Basic {token}"})
    assert response.status_code == 200


def test_what_a_node_has_read_of_a_fetched_file_is_what_is_booked(cluster: Cluster) -> None:
    def ready() -> list[Any]:
        return [each for each in cluster.replicas(CHAT_MODEL) if (each["node"], each["state"]) == ("alpha", "ready")]

    (replica,) = until(ready, LIMIT, "the default model")
    blob = cluster.home / "worker/nodes/alpha/models/blobs" / catalog.default_model().sha256
    assert replica["memory"]["ram"] > 3 * blob.stat().st_size, (
        "the guess of a header that nobody has read is 1.2 times the file"
    )
    (backend,) = [
        process
        for process, line in processes_of(cluster.home).items()
        if "server.py" in line and replica["id"] in " ".join(line)
    ]
    assert any(str(blob) == file.path for file in backend.memory_maps())
    assert backend.memory_info().rss < replica["memory"]["ram"]
    assert blob.name in cluster.node("alpha")["hardware"]["files"]
