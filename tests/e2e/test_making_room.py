"""A node whose budget holds one of two models: who asks gets the other one, once the first has nothing to do."""

import json
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from e2e_cluster import CHAT_MODEL, Cluster, processes_of, until


def states(cluster: Cluster, model: str) -> list[str]:
    return [replica["state"] for replica in cluster.replicas(model)]


def test_an_idle_model_makes_room_for_one_that_somebody_waits_for(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster("--no-model", LOCALAI_VRAM_BUDGET="1GB", LOCALAI_HEARTBEAT_INTERVAL="1")
    for name in ("first", "second"):
        cluster.cli("models", "add", name, "--backend", "echo", "--memory", "600000000", "--slots", "1")
    cluster.cli("models", "add", "huge", "--backend", "echo", "--memory", "2000000000")
    assert cluster.node("alpha")["hardware"]["budget"] == 10**9

    assert cluster.say("one", model="first").choices[0].message.content
    until(lambda: states(cluster, "first") == ["ready"], 5, "its report, which an answer may outrun")

    # What can never fit is refused at once, with the numbers.
    with pytest.raises(openai.InternalServerError, match=r"alpha: needs 2.0 GB, 400.0 MB free"):
        cluster.say("three", model="huge")
    assert states(cluster, "first") == ["ready"]

    # The first is idle. It makes room as soon as it has been there for half a minute.
    assert cluster.say("two", model="second").choices[0].message.content
    until(lambda: (states(cluster, "first"), states(cluster, "second")) == ([], ["ready"]), 5, "the change")

    shown = {model["name"]: model for model in json.loads(cluster.cli("models", "list", "--json"))}
    assert shown["second"]["replicas"][0]["memory"] == {"ram": 600_000_000, "vram": 0}
    cluster.stop()


def test_what_a_node_has_read_of_a_fetched_file_is_what_is_booked(cluster: Cluster, weights: Path) -> None:
    until(lambda: "ready" in states(cluster, CHAT_MODEL), 60, "the default model")
    (replica,) = [each for each in cluster.replicas(CHAT_MODEL) if each["node"] == "alpha"]
    booked = replica["memory"]["ram"]
    assert booked > 3 * weights.stat().st_size, "the guess of a header that nobody has read is 1.2 times the file"
    (backend,) = [
        process
        for process, line in processes_of(cluster.home).items()
        if "server.py" in line and replica["id"] in " ".join(line)
    ]
    assert any(str(weights) == file.path for file in backend.memory_maps())
    assert backend.memory_info().rss < booked
    assert weights.name in cluster.node("alpha")["hardware"]["files"]
