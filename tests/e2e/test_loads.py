"""A load goes on whoever leaves, ends with its true reason when it hangs, and lets itself be stopped."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from e2e_cluster import Cluster, until
from waiting import LIMIT

HANGS, WORKS, LONG = "load_ms:600000", "load_work_ms:6000", "load_work_ms:600000"
STALLED = "could not be loaded: loading stalled: nothing moved for "


@pytest.fixture(scope="module")
def own(homes: Path) -> Iterator[Cluster]:
    """A cluster that ends loads in which nothing moves for two seconds."""
    found = Cluster(
        homes / "loads", "--no-model", LOCALAI_Q_LOAD_STALL="2", LOCALAI_MODEL_LOAD_WAIT="0",
        LOCALAI_HEARTBEAT_INTERVAL="1", LOCALAI_Q_DRAIN_TIMEOUT="1",
    )  # fmt: skip
    found.start()
    yield found
    found.kill()


def add(cluster: Cluster, name: str, option: str) -> None:
    cluster.http.post("/api/models", json={"name": name, "backend": "echo", "options": [option]}).raise_for_status()


def ask(model: str, **more: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "hello"}], **more}


def loading(cluster: Cluster, model: str) -> bool:
    """Whether the backend of a model is at it."""
    return [replica["state"] for replica in cluster.replicas(model)] == ["loading"] and bool(cluster.pids("server.py"))


def test_whoever_waits_for_a_load_that_hangs_is_told_what_became_of_it(own: Cluster) -> None:
    add(own, "hangs", HANGS)

    def stream(_: int) -> list[str]:
        with own.http.stream("POST", "/v1/chat/completions", json=ask("hangs", stream=True)) as response:
            return [line for line in response.iter_lines() if line]

    with ThreadPoolExecutor(2) as pool:
        lines = pool.submit(stream, 0)
        whole = pool.submit(own.http.post, "/v1/chat/completions", json=ask("hangs")).result()
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "model_load_failed"), whole.text
    assert STALLED in whole.json()["error"]["message"]
    assert ": waiting: hangs is loading on alpha" in lines.result()
    assert STALLED in lines.result()[-1]
    assert own.http.get("/api/models/hangs/load-status").json()["failure"]["reason"].startswith("loading stalled")
    assert own.pids("server.py") == []


def test_a_load_goes_on_when_nobody_waits_for_it_any_more(own: Cluster) -> None:
    add(own, "works", WORKS)
    with own.http.stream("POST", "/v1/chat/completions", json=ask("works", stream=True)) as response:
        next(response.iter_lines())
        until(lambda: loading(own, "works"), LIMIT, "the load")
        (backend,) = own.pids("server.py")
    until(lambda: not own.open_generations(), LIMIT, "that nobody waits")
    assert loading(own, "works")
    until(lambda: [replica["state"] for replica in own.replicas("works")] == ["ready"], LIMIT, "the end of the load")
    assert own.pids("server.py") == [backend]
    assert own.say("hello", model="works").choices[0].message.content


def test_a_load_that_is_cancelled_leaves_nothing_and_who_waits_gets_the_next_one(own: Cluster) -> None:
    before = own.pids("server.py")
    add(own, "cancelled", WORKS)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(own.http.post, "/v1/chat/completions", json=ask("cancelled"))
        until(lambda: loading(own, "cancelled") and set(own.pids("server.py")) - set(before), LIMIT, "the load")
        backends = set(own.pids("server.py")) - set(before)
        (job,) = own.jobs(kind="load_model", state="open")
        until(lambda: (own.job(job["id"])["progress"] or {}).get("stage") == "loading", LIMIT, "its progress")
        own.cli("jobs", "cancel", job["id"])
        assert own.ended_job(job["id"])["state"] == "cancelled"
        until(lambda: not backends & set(own.pids("server.py")), LIMIT, "the end of the backend")
        assert waiting.result().status_code == 200, waiting.result().text
    words = "starting: the backend echo\nloading\ncancelled: The job was cancelled.\n"
    assert own.cli("jobs", "log", job["id"]) == words
    (again,) = [
        load for load in own.jobs(kind="load_model") if load["model"] == "cancelled" and load != own.job(job["id"])
    ]
    assert own.ended_job(again["id"])["state"] == "done"
    own.cli("models", "remove", "cancelled")
    until(lambda: own.pids("server.py") == before, LIMIT, "the end of the model's backend")


def test_a_model_that_is_removed_while_it_loads_leaves_nothing(own: Cluster) -> None:
    before = own.pids("server.py")
    add(own, "goes", LONG)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(own.http.post, "/v1/chat/completions", json=ask("goes"))
        until(lambda: loading(own, "goes") and own.pids("server.py") != before, LIMIT, "the load")
        own.cli("models", "remove", "goes")
        assert waiting.result(LIMIT).json()["error"]["message"] == "The model 'goes' was removed."
    until(lambda: own.pids("server.py") == before, LIMIT, "the end of the backend")


def test_a_node_that_is_drained_while_it_loads_does_not_wait_for_that(own: Cluster) -> None:
    add(own, "drained", LONG)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(own.http.post, "/v1/chat/completions", json=ask("drained"))
        until(lambda: loading(own, "drained"), LIMIT, "the load")
        own.cli("nodes", "drain", "alpha")
        until(lambda: own.node("alpha")["state"] == "drained", LIMIT, "a node that is empty")
        assert own.pids("server.py") == []
        assert not waiting.done(), "another node may come"
        own.cli("models", "remove", "drained")
        assert waiting.result(LIMIT).status_code == 404
    own.cli("nodes", "resume", "alpha")


def test_a_cluster_that_is_stopped_while_it_loads_leaves_no_process(own: Cluster) -> None:
    until(lambda: own.node("alpha")["state"] == "ready", LIMIT, "the node")
    add(own, "last", LONG)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(own.http.post, "/v1/chat/completions", json=ask("last"))
        until(lambda: loading(own, "last"), LIMIT, "the load")
        own.stop()
