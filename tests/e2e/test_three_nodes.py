"""Three nodes under steady load: one dies and comes back, one is drained; and a hundred who ask at once for one load."""

import itertools
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from callers import Caller, counted, numbers
from e2e_cluster import Cluster, until
from waiting import LIMIT

NODES = ("alpha", "alpha-2", "alpha-3")
CALLERS = 6
HUNDRED = 100


@pytest.fixture(scope="module")
def three(homes: Path) -> Iterator[Cluster]:
    """`alpha`, `alpha-2` and `alpha-3`, with `echo` of four slots on each; a node counts as dead after some seconds."""
    made = Cluster(homes / "three", "--nodes", "3", "--no-model", LOCALAI_Q_LEASE="2",
                   LOCALAI_HEARTBEAT_INTERVAL="1", LOCALAI_Q_WEB_WORKERS="2")  # fmt: skip
    made.start()
    try:
        made.cli("models", "add", "echo", "--backend", "echo", "--slots", "4", "--spread")
        until(lambda: [each["state"] for each in made.replicas("echo")] == ["ready"] * 3, 60, "a replica on each node")
        yield made
    except BaseException:
        made.kill()
        raise
    made.stop()


def ask(cluster: Cluster, model: str, text: str, *, stream: bool) -> Caller:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": stream}
    return Caller(cluster.address, cluster.api_key, "/v1/chat/completions", body)


class Crowd:
    """Callers who ask `echo` for one answer after the other, every second one as a stream."""

    def __init__(self, cluster: Cluster) -> None:
        self.asked: list[tuple[Caller, str]] = []  # and what is to be said
        self._cluster = cluster
        self._seeds = itertools.count(1000, 1000)
        self._enough = threading.Event()

    def ask(self, tokens: int, delay_ms: int, *, stream: bool) -> Caller:
        """A request whose answer no other one has."""
        seed = next(self._seeds)
        caller = ask(self._cluster, "echo", numbers(tokens, delay_ms=delay_ms, seed=seed), stream=stream)
        self.asked.append((caller, counted(tokens, seed)))
        return caller

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Meanwhile they ask; at the end each has had its last answer."""
        threads = [threading.Thread(target=self._ask_on, args=(number % 2 == 0,)) for number in range(CALLERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._enough.set()
            for thread in threads:
                thread.join()

    def check(self) -> None:
        """Every answer came, once and whole."""
        for caller, expected in self.asked:
            assert caller.whole(60) == expected
            places = [int(seen.id.rpartition("-")[2]) for seen in caller.events if seen.id]
            assert places == sorted(set(places)), (caller.job, places)

    def _ask_on(self, stream: bool) -> None:
        while not self._enough.is_set():
            self.ask(15, 40, stream=stream).wait(90)


def done(cluster: Cluster, model: str) -> dict[str, tuple[int, str]]:
    """Attempt and node of every chat for the model, by job, once none is open any more; all are done."""
    until(lambda: not cluster.open_generations(), LIMIT, "the end of all that was asked for")
    found = cluster.sql(
        "SELECT jobs.id, jobs.state, jobs.attempt, nodes.name FROM jobs LEFT JOIN nodes ON nodes.id = jobs.node_id "
        "WHERE kind = 'chat' AND model_id = (SELECT id FROM models WHERE name = %s)",
        model,
    )
    assert {state for _, state, _, _ in found} <= {"done"}
    return {job: (attempt, node) for job, _, attempt, node in found}


def worked_on(cluster: Cluster, node: str) -> set[str]:
    """The jobs that the node works on."""
    return {job["id"] for job in cluster.open_generations() if job["node"] == node and job["live"] == "leased"}


def node_of(cluster: Cluster, caller: Caller) -> str:
    """The name of the node that works on what the caller of a stream asked for."""
    until(lambda: caller.job, LIMIT, "the job's id")
    return until(
        lambda: next((name for name in NODES if caller.job in worked_on(cluster, name)), ""), LIMIT, "its node"
    )


def state(cluster: Cluster, name: str) -> str:
    return cluster.node(name)["state"]


def echoes(cluster: Cluster, name: str) -> list[dict[str, Any]]:
    """The replicas of `echo` on the node."""
    return [each for each in cluster.node(name)["replicas"] if each["model"] == "echo"]


def kill(cluster: Cluster, name: str) -> None:
    """End the process of a node at once, which ends all that it has started."""
    [replica] = cluster.pids(f"-n echo.1@{name} ")
    psutil.Process(replica).parent().kill()


def loads(cluster: Cluster) -> set[str]:
    """The replicas whose backends were ever started, but for those that were stopped in good order."""
    return {path.name.split(".")[0] for path in (cluster.home / "worker" / "nodes").glob("*/logs/backend-*.log")}


def test_a_hundred_first_requests_at_once_make_one_load(three: Cluster) -> None:
    body = {"name": "crowded", "backend": "echo", "slots": 4, "options": ["load_ms:3000"]}
    model_id = three.http.post("/api/models", json=body).raise_for_status().json()["id"]
    before = loads(three)
    callers = [ask(three, "crowded", f"I am {number}", stream=number % 2 == 0) for number in range(HUNDRED)]
    until(lambda: len(three.open_generations()) == HUNDRED, LIMIT, "all of them in line")
    assert [each["state"] for each in three.replicas("crowded")] != ["ready"], "they came before the model was there"
    assert [caller.whole(60) for caller in callers] == [f"I am {number}" for number in range(HUNDRED)]

    assert len(loads(three) - before) == 1
    placed = [line for line in (three.home / "logs" / "control.log").read_text().splitlines()
              if f"Place(model_id='{model_id}'" in line]  # fmt: skip
    assert len(placed) == 1, placed
    [replica] = three.replicas("crowded")
    assert three.pids(f"-n crowded.{replica['number']}@{replica['node']} ") == three.pids("-n crowded.")
    [(installs,)] = three.sql("SELECT count(*) FROM jobs WHERE model_id = %s AND kind = 'install_backend'", model_id)
    assert installs <= 1
    assert list(done(three, "crowded").values()) == [(1, replica["node"])] * HUNDRED


def test_nothing_is_lost_while_one_node_dies_one_is_drained_and_one_comes_back(three: Cluster) -> None:
    crowd = Crowd(three)
    known = set(done(three, "echo"))
    with crowd.at_work():
        try:
            # One is killed while it streams, and stays away: what it had goes on elsewhere.
            orphan = crowd.ask(60, 100, stream=True)
            dead = node_of(three, orphan)
            orphan.until_said(5)
            three.process.send_signal(signal.SIGSTOP)  # else it would be started again at once
            kill(three, dead)
            until(lambda: state(three, dead) == "offline", LIMIT, "that it counts as dead")
            assert not echoes(three, dead)

            # One is drained while it streams: it ends what it has, and takes nothing new.
            speaker = crowd.ask(60, 100, stream=True)
            drained = node_of(three, speaker)
            [replica] = echoes(three, drained)
            log = three.home / "worker" / "nodes" / drained / "logs" / f"replica-{replica['id']}.log"
            three.http.post(f"/api/nodes/{drained}/drain").raise_for_status()
            until(lambda: "Warm shutdown" in log.read_text(errors="replace"), LIMIT, "the end of its taking")
            held, draining = worked_on(three, drained) | {speaker.job}, time.monotonic()
            until(lambda: state(three, drained) == "drained", 60, "the end of what it held")
            assert not echoes(three, drained)
        finally:
            three.process.send_signal(signal.SIGCONT)

        # And the dead one comes back, without anybody's help.
        until(lambda: [each["state"] for each in echoes(three, dead)] == ["ready"], 60, "its return")
        until(lambda: worked_on(three, dead), LIMIT, "work for it")
    crowd.check()

    ended = {job: row for job, row in done(three, "echo").items() if job not in known}
    assert ended.keys() == {caller.job for caller, _ in crowd.asked}, "a job for each request, and no other"
    assert ended[orphan.job][0] == 2
    assert ended[orphan.job][1] != dead
    assert ended[speaker.job] == (1, drained)
    assert {ended[job][1] for job in held} == {drained}
    late = [ended[caller.job] for caller, _ in crowd.asked if caller.began > draining]
    assert len(late) >= 2 * CALLERS
    assert {node for _, node in late} == {*NODES} - {drained}
