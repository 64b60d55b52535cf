"""Who waits is told: his place in the line, and how far the load is that he waits for."""

import time
from collections.abc import Callable

import httpx
from e2e_cluster import Cluster, until
from waiting import LIMIT

LONG = "[[echo tokens=400 delay_ms=50]]"


def ask(model: str, text: str = "hello", **more: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


def test_a_stream_that_waits_in_line_is_told_its_place(calm: Cluster) -> None:
    calm.say("[[echo tokens=10 delay_ms=100]]", model="echo-one")  # so that it is known how long one takes
    with (
        calm.http.stream("POST", "/v1/chat/completions", json=ask("echo-one", LONG, stream=True)) as busy,
        calm.http.stream("POST", "/v1/chat/completions", json=ask("echo-one", stream=True)) as first,
        calm.http.stream("POST", "/v1/chat/completions", json=ask("echo-one", stream=True)) as second,
    ):
        assert "X-LocalAI-Queue-Position" not in busy.headers
        assert (first.headers["X-LocalAI-Queue-Position"], second.headers["X-LocalAI-Queue-Position"]) == ("1", "2")
        assert int(second.headers["X-LocalAI-Expected-Wait"]) >= 1
        assert next(second.iter_lines()).startswith(": waiting: place 2, about ")


def test_who_waits_for_a_load_is_told_how_far_it_is(start_cluster: Callable[..., Cluster]) -> None:
    own = start_cluster("--no-model", LOCALAI_MODEL_LOAD_WAIT="3")
    body = {"name": "slow", "backend": "echo", "options": ["load_ms:9000"]}
    own.http.post("/api/models", json=body).raise_for_status()
    assert own.http.get("/api/models/slow/load-status").json() == {"model": "slow", "loading": None, "failure": None}
    refused = own.http.post("/v1/chat/completions", json=ask("slow"))
    error = refused.json()["error"]
    assert (refused.status_code, error["type"], error["code"]) == (503, "model_loading", "model_loading")
    assert error["loading"].keys() == {
        "model", "state", "node", "progress", "bytes_sent", "total_bytes", "eta_seconds", "ready_in_seconds", "since",
        "attempt",
    }  # fmt: skip
    assert (error["loading"]["model"], error["loading"]["node"]) == ("slow", "alpha")
    assert 5 <= int(refused.headers["Retry-After"]) <= 300
    key = own.cli("keys", "create", "somebody").strip()

    def state() -> str | None:
        answer = httpx.get(
            own.base_url + "/api/models/slow/load-status", headers={"Authorization": f"Bearer {key}"}
        ).json()
        return answer["loading"] and answer["loading"]["state"]

    until(lambda: state() == "loading", 60, "the load's last stage")
    began = time.monotonic()
    with own.http.stream("POST", "/v1/chat/completions", json=ask("slow", stream=True)) as response:
        lines = [line for line in response.iter_lines() if line]
    assert time.monotonic() - began > 2
    assert lines[0] == ": waiting: slow is loading on alpha"
    assert lines[-1] == "data: [DONE]", "and the request that waited was served when the model was there"
    until(lambda: state() is None, LIMIT, "the load to be over")
