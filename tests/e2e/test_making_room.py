"""A node whose budget holds one of two models: who asks gets the other one, once the first has nothing to do."""

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
from e2e_cluster import Cluster, processes_of, until
from waiting import LIMIT

SPEECH = "[[echo tokens=15 delay_ms=100]]"
STILL = 2.5  # seconds: control looks every second


@pytest.fixture(scope="module")
def tight(homes: Path) -> Iterator[Cluster]:
    """A node with room for `first` or for `second`."""
    made = Cluster(homes / "tight", "--no-model", LOCALAI_VRAM_BUDGET="1GB", LOCALAI_HEARTBEAT_INTERVAL="1")
    made.start()
    try:
        for name in ("first", "second"):
            made.cli("models", "add", name, "--backend", "echo", "--memory", "600000000", "--slots", "1")
        yield made
    except BaseException:
        made.kill()
        raise
    made.stop()


def states(cluster: Cluster, model: str) -> list[str]:
    return [replica["state"] for replica in cluster.replicas(model)]


def backends(cluster: Cluster, model: str) -> list[psutil.Process]:
    """The engines of the model's replicas."""
    ids = [replica["id"] for replica in cluster.replicas(model)]
    return [
        process
        for process, line in processes_of(cluster.home).items()
        if "server.py" in line and any(each in " ".join(line) for each in ids)
    ]


def until_alone(cluster: Cluster, model: str, other: str) -> None:
    until(lambda: (states(cluster, other), states(cluster, model)) == ([], ["ready"]), LIMIT, f"{model} alone")


def age(cluster: Cluster, model: str) -> None:
    """Let the model's replica have been ready for longer than one is protected."""
    cluster.sql(
        "UPDATE replicas SET changed_at = changed_at - interval '1 minute' "
        "WHERE state = 'ready' AND model_id = (SELECT id FROM models WHERE name = %s) RETURNING id",
        model,
    )


def have(cluster: Cluster, model: str, other: str) -> None:
    """See to it that the model is loaded, and the other one is not."""
    age(cluster, other)
    cluster.say("hello", model=model)
    until_alone(cluster, model, other)


def test_an_idle_model_makes_room_for_one_that_somebody_waits_for(tight: Cluster) -> None:
    tight.cli("models", "add", "huge", "--backend", "echo", "--memory", "2000000000")
    assert tight.node("alpha")["hardware"]["budget"] == 10**9

    assert tight.say("one", model="first").choices[0].message.content
    until(lambda: states(tight, "first") == ["ready"], LIMIT, "its report, which an answer may outrun")

    # What can never fit is refused at once, with the numbers.
    with pytest.raises(openai.InternalServerError, match=r"alpha: needs 2.0 GB, 400.0 MB free"):
        tight.say("three", model="huge")
    assert states(tight, "first") == ["ready"]

    # The first is idle. It makes room as soon as it has been there for half a minute.
    assert tight.say("two", model="second").choices[0].message.content
    until_alone(tight, "second", "first")

    shown = {model["name"]: model for model in json.loads(tight.cli("models", "list", "--json"))}
    assert shown["second"]["replicas"][0]["memory"] == {"ram": 600_000_000, "vram": 0}


def test_two_models_take_turns_and_the_one_that_speaks_may_finish(tight: Cluster) -> None:
    have(tight, "second", "first")
    for wanted, other in (("first", "second"), ("second", "first"), ("first", "second")):
        age(tight, other)
        [before] = backends(tight, other)
        with ThreadPoolExecutor(2) as pool:
            speech = pool.submit(tight.say, SPEECH, other)
            until(lambda: tight.node("alpha")["in_flight"] == 1, LIMIT, "the speech")
            answer = pool.submit(tight.say, f"to {wanted}", wanted)
            looks = 0
            while not speech.done():
                seen = states(tight, wanted)
                if not speech.done():
                    assert (seen, before.is_running()) == ([], True), "who is busy stays"
                    looks += 1
            assert looks
            assert speech.result().choices[0].message.content == " ".join(map(str, range(15)))
            assert answer.result(60).choices[0].message.content == f"to {wanted}"
        until_alone(tight, wanted, other)
        assert not before.is_running()
        assert len(tight.pids("server.py")) == 1


def test_memory_is_free_only_when_the_process_is_gone(tight: Cluster) -> None:
    have(tight, "second", "first")
    age(tight, "second")
    [before] = backends(tight, "second")
    slow = before.parent()
    slow.send_signal(signal.SIGSTOP)  # so that it cannot end yet
    try:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(tight.say, "late", "first")
            until(lambda: states(tight, "second") == ["stopping"], LIMIT, "that it is told to make room")
            told = time.monotonic()
            while time.monotonic() - told < STILL:
                assert (states(tight, "first"), before.is_running()) == ([], True)
                time.sleep(0.1)
            slow.send_signal(signal.SIGCONT)
            assert answer.result(60).choices[0].message.content == "late"
    finally:
        if slow.is_running():
            slow.send_signal(signal.SIGCONT)
    assert not before.is_running()
    until_alone(tight, "first", "second")
