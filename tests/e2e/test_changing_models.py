"""A model is changed while many use it: nobody is cut off, and nobody who comes later gets the model as it was."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil
from e2e_cluster import Cluster, processes_of, until
from waiting import LIMIT

ASK = "[[echo tokens=10 delay_ms=30]]"
CALLERS = 6


@dataclass(frozen=True)
class Asked:
    began: float
    said: str


def numbers(first: int) -> str:
    return " ".join(str(number) for number in range(first, first + 10))


def revisions(cluster: Cluster) -> list[tuple[int, str]]:
    return sorted((replica["revision"], replica["state"]) for replica in cluster.replicas("parrot"))


def backends(cluster: Cluster, replica_id: str) -> list[psutil.Process]:
    return [p for p, line in processes_of(cluster.home).items() if replica_id in " ".join(line)]


def test_under_load_no_request_fails_and_none_that_comes_after_is_answered_by_the_old_revision(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster("--no-model", LOCALAI_Q_WEB_WORKERS="2")
    cluster.cli("models", "add", "parrot", "--backend", "echo", "--slots", "4", "--min-replicas", "1")
    until(lambda: revisions(cluster) == [(1, "ready")], 60, "a replica that nobody has asked for")
    first = cluster.replicas("parrot")[0]["id"]
    own = backends(cluster, first)
    assert own
    enough = threading.Event()

    def call(_: int) -> list[Asked]:
        client, asked = cluster.client(), []
        while not enough.is_set():
            began = time.monotonic()
            answer = client.chat.completions.create(model="parrot", messages=[{"role": "user", "content": ASK}])
            asked.append(Asked(began, answer.choices[0].message.content))
        return asked

    with ThreadPoolExecutor(CALLERS) as pool:
        calls = [pool.submit(call, number) for number in range(CALLERS)]
        try:
            time.sleep(1.0)
            changed = (
                cluster.http.patch("/api/models/parrot", json={"options": ["seed:1000"]}).raise_for_status().json()
            )
            answered = time.monotonic()
            assert changed["revision"] == 2
            until(lambda: revisions(cluster) == [(2, "ready")], 60, "the new revision alone")
            time.sleep(1.0)
        finally:
            enough.set()
        asked = [each for call in calls for each in call.result(60)]
    before, after = ([each for each in asked if (each.began > answered) is late] for late in (False, True))
    assert {each.said for each in before} >= {numbers(0)}
    assert {each.said for each in before} <= {numbers(0), numbers(1000)}
    assert len(after) >= CALLERS
    assert {each.said for each in after} == {numbers(1000)}
    _, alive = psutil.wait_procs(own, timeout=LIMIT)
    assert not alive
    until(lambda: not cluster.open_generations(), LIMIT, "the ends in Postgres")
    cluster.stop()
