"""Who goes away, or is told to, frees what was held for them: at once, and in every place."""

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
from e2e_cluster import CHAT_MODEL, Cluster, until
from waiting import LIMIT

LONG = "[[echo tokens=400 delay_ms=50]]"  # twenty seconds, unless somebody ends it


@contextmanager
def raw_request(cluster: Cluster, model: str, text: str, *, stream: bool) -> Iterator[socket.socket]:
    """A chat on a socket of our own, which is closed at the end without a word."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": text}], "stream": stream}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {cluster.api_key}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    host, port = cluster.address.split(":")
    with socket.create_connection((host, int(port)), timeout=LIMIT) as connection:
        connection.sendall(head.encode() + body)
        yield connection


def read_until(connection: socket.socket, text: bytes) -> None:
    seen = b""
    while text not in seen:
        piece = connection.recv(65536)
        assert piece, seen
        seen += piece


def only_job(cluster: Cluster, live: str = "leased", **wanted: str) -> str:
    """The id of the one open job that is in this live state."""

    def found() -> list[str]:
        jobs = cluster.open_generations()
        return [job["id"] for job in jobs if job["live"] == live and all(job[k] == v for k, v in wanted.items())]

    until(lambda: len(found()) == 1, LIMIT, f"one {live} job")
    return found()[0]


def has_a_free_slot(cluster: Cluster, model: str = "echo-one") -> None:
    """Another request is served."""
    assert cluster.say("my turn", model=model).choices[0].message.content == "my turn"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_closes_its_connection_frees_the_slot(calm: Cluster, stream: bool) -> None:
    with raw_request(calm, "echo-one", LONG, stream=stream) as connection:
        if stream:
            read_until(connection, b'"content":" 3"')
        job = only_job(calm)
    has_a_free_slot(calm)
    ended = calm.ended_job(job)
    assert ended["state"] == "cancelled"
    assert ended["node"] == "alpha"


def test_a_client_that_leaves_the_real_model_frees_its_slot(calm: Cluster) -> None:
    with raw_request(calm, CHAT_MODEL, "Write a long story about the sea.", stream=True) as connection:
        read_until(connection, b'"content":')
        job = only_job(calm, model=CHAT_MODEL)
    assert calm.ended_job(job)["state"] == "cancelled"


def test_a_client_that_leaves_while_it_waits_in_line_is_never_served(calm: Cluster) -> None:
    with raw_request(calm, "echo-one", LONG, stream=True) as first:
        read_until(first, b'"content":')
        with raw_request(calm, "echo-one", "[[echo tokens=3]]", stream=True):
            waiting = only_job(calm, "waiting")
        ended = calm.ended_job(waiting)
        assert (ended["state"], ended["attempt"], ended["node"]) == ("cancelled", 1, None)
        assert only_job(calm)  # the one that runs does not notice
    until(lambda: not calm.open_generations(), LIMIT, "the end of the first")


@pytest.mark.parametrize("stream", [True, False])
def test_delete_ends_a_running_job_and_its_caller_is_told(calm: Cluster, stream: bool) -> None:
    def run() -> str:
        answer = calm.say(LONG, model="echo-one", stream=stream)
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer) if stream else answer.id

    with ThreadPoolExecutor(1) as pool:
        caller = pool.submit(run)
        job = only_job(calm)
        answer = calm.http.delete(f"/api/jobs/{job}")
        assert answer.json() == {"id": job, "state": "cancelling"}
        with pytest.raises(openai.APIError, match="cancelled"):
            caller.result(LIMIT)
    has_a_free_slot(calm)
    assert calm.ended_job(job)["state"] == "cancelled"
    assert calm.http.delete(f"/api/jobs/{job}").json() == {"id": job, "state": "cancelled"}


def test_delete_ends_a_waiting_job_at_once(calm: Cluster) -> None:
    with ThreadPoolExecutor(1) as pool, raw_request(calm, "echo-one", LONG, stream=True) as first:
        read_until(first, b'"content":')
        caller = pool.submit(calm.say, "[[echo tokens=3]]", "echo-one")
        waiting = only_job(calm, "waiting")
        assert calm.http.delete(f"/api/jobs/{waiting}").json() == {"id": waiting, "state": "cancelled"}
        with pytest.raises(openai.APIStatusError) as caught:
            caller.result(LIMIT)
        assert (caught.value.status_code, caught.value.code) == (499, "cancelled")
    until(lambda: not calm.open_generations(), LIMIT, "the end of the first")


def test_a_request_that_takes_longer_than_the_limit_ends_with_504(start_cluster: Callable[..., Cluster]) -> None:
    own = start_cluster("--no-model", LOCALAI_REQUEST_TIMEOUT="3")
    own.cli("models", "add", "echo-one", "--backend", "echo", "--slots", "1", "--spread")
    until(lambda: [r["state"] for r in own.replicas("echo-one")] == ["ready"], 60, "the replica")
    with pytest.raises(openai.InternalServerError) as caught:
        own.say(LONG, model="echo-one")
    assert (caught.value.status_code, caught.value.code, caught.value.type) == (504, "deadline_exceeded", "timeout")
    has_a_free_slot(own, "echo-one")
    with pytest.raises(openai.APIError, match="LOCALAI_REQUEST_TIMEOUT"):
        for _ in own.say(LONG, model="echo-one", stream=True):
            pass
    until(lambda: not own.open_generations(), LIMIT, "the end of both")
    assert {job["state"] for job in own.jobs(kind="chat", limit=3)} == {"failed", "done"}
    own.stop()
