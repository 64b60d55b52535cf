"""Three nodes under steady load: one dies and comes back, one is drained; and a hundred who ask at once for one load."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from callers import Caller, counted, numbers
from e2e_cluster import Cluster, until

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

    def since(self, moment: float) -> list[Caller]:
        """Those who asked after `moment`, of the monotonic clock."""
        return [caller for caller, _ in self.asked if caller.began > moment]

    def check(self) -> None:
        """Every answer came, once and whole."""
        for caller, expected in self.asked:
            assert caller.whole(60) == expected
            places = [int(seen.id.rpartition("-")[2]) for seen in caller.events if seen.id]
            assert places == sorted(set(places)), (caller.job, places)

    def _ask_on(self, stream: bool) -> None:
        while not self._enough.is_set():
            self.ask(15, 40, stream=stream).wait(90)


def rows(cluster: Cluster) -> dict[str, tuple[str, int, str]]:
    """State, attempt and node of every chat for `echo`, by job."""
    found = cluster.sql(
        "SELECT jobs.id, jobs.state, jobs.attempt, nodes.name FROM jobs LEFT JOIN nodes ON nodes.id = jobs.node_id "
        "WHERE kind = 'chat' AND model_id = (SELECT id FROM models WHERE name = 'echo')"
    )
    return {job: (state, attempt, node) for job, state, attempt, node in found}


def on(cluster: Cluster, node: str) -> set[str]:
    """The jobs that the node works on."""
    return {job["id"] for job in cluster.open_generations() if job["node"] == node and job["live"] == "leased"}


def state(cluster: Cluster, name: str) -> str:
    return cluster.node(name)["state"]


def replica_states(cluster: Cluster, name: str) -> list[str]:
    return [each["state"] for each in cluster.node(name)["replicas"] if each["model"] == "echo"]


def node_of(cluster: Cluster, name: str) -> psutil.Process:
    """The process of a node that `up` has started."""
    [replica] = cluster.pids(f"-n echo.1@{name} ")
    return psutil.Process(replica).parent()


def loads(cluster: Cluster) -> set[str]:
    """The replicas whose backends were ever started, but for those that were stopped in good order."""
    return {path.name.split(".")[0] for path in (cluster.home / "worker" / "nodes").glob("*/logs/backend-*.log")}


def test_a_hundred_first_requests_at_once_make_one_load(three: Cluster) -> None:
    body = {"name": "crowded", "backend": "echo", "slots": 4, "options": ["load_ms:3000"]}
    model_id = three.http.post("/api/models", json=body).raise_for_status().json()["id"]
    before = loads(three)
    callers = [ask(three, "crowded", f"I am {number}", stream=number % 2 == 0) for number in range(HUNDRED)]
    until(lambda: len(three.open_generations()) == HUNDRED, 30, "all of them in line")
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
    [(answers,)] = three.sql(
        "SELECT count(*) FROM jobs WHERE model_id = %s AND kind = 'chat' AND attempt = 1", model_id
    )
    assert answers == HUNDRED


def test_nothing_is_lost_while_one_node_dies_one_is_drained_and_one_comes_back(three: Cluster) -> None:
    crowd = Crowd(three)
    known = set(rows(three))
    with crowd.at_work():
        long = [crowd.ask(50, 100, stream=number % 2 == 0) for number in range(CALLERS)]

        # One is killed while it works, and stays away: what it had goes on elsewhere.
        until(lambda: all(on(three, name) for name in ("alpha", "alpha-2", "alpha-3")), 20, "work on each node")
        node = node_of(three, "alpha-2")
        three.process.send_signal(signal.SIGSTOP)  # else it would be started again at once
        try:
            orphans = on(three, "alpha-2")
            os.kill(node.pid, signal.SIGKILL)
            until(lambda: state(three, "alpha-2") == "offline", 30, "that it counts as dead")
            assert not replica_states(three, "alpha-2")

            # One is drained while it streams: it ends what it has, and takes nothing new.
            until(lambda: len(on(three, "alpha-3")) == 4 or all(each.ended for each in long), 20, "its work")
            long += [crowd.ask(60, 100, stream=True) for _ in range(CALLERS)]
            until(lambda: {each.job for each in long} & on(three, "alpha-3"), 20, "a long stream on alpha-3")
            [replica] = [each["id"] for each in three.node("alpha-3")["replicas"] if each["model"] == "echo"]
            three.cli("nodes", "drain", "alpha-3")
            log = three.home / "worker" / "nodes" / "alpha-3" / "logs" / f"replica-{replica}.log"
            until(lambda: "Warm shutdown" in log.read_text(errors="replace"), 20, "the end of its taking")
            held, draining = on(three, "alpha-3"), time.monotonic()
            assert held & {each.job for each in long}
            until(lambda: state(three, "alpha-3") == "drained", 60, "the end of what it held")
            assert not replica_states(three, "alpha-3")
        finally:
            three.process.send_signal(signal.SIGCONT)

        # And the dead one comes back, without anybody's help.
        until(lambda: replica_states(three, "alpha-2") == ["ready"], 60, "the return of alpha-2")
        returned = set(rows(three))
        until(lambda: on(three, "alpha-2") - returned, 20, "work for who has come back")
    crowd.check()

    for caller, _ in crowd.asked:
        assert three.ended_job(caller.job)["state"] == "done"
    ended = {job: row for job, row in rows(three).items() if job not in known}
    assert ended.keys() == {caller.job for caller, _ in crowd.asked}, "as many jobs as were asked for"
    assert {ended[job][1:] for job in held} == {(1, "alpha-3")}
    late = [ended[caller.job] for caller in crowd.since(draining)]
    assert len(late) >= 2 * CALLERS
    assert {name for _, _, name in late} == {"alpha", "alpha-2"}
    assert orphans
    moved = [ended[job] for job in orphans if ended[job][2] != "alpha-2"]
    assert moved
    assert {attempt for _, attempt, _ in moved} == {2}
    assert {attempt for job, (_, attempt, _) in ended.items() if job not in orphans} == {1}
