"""A conversation stays with the replica that has read it, whichever web process is asked; a replica that hangs or dies
costs a moment, not an answer."""

import os
import secrets
import signal
from collections.abc import Callable

import httpx
import pytest
from e2e_cluster import Cluster, until
from waiting import LIMIT

STORY = "The keeper of the lighthouse counts the ships that pass. " * 40


@pytest.fixture
def pair(start_cluster: Callable[..., Cluster]) -> Cluster:
    """Two nodes with a replica each, and two web processes, which say who has answered."""
    made = start_cluster("--no-model", "--nodes", "2", LOCALAI_EXPOSE_NODE_HEADER="true", LOCALAI_Q_WEB_WORKERS="2")
    made.cli("models", "add", "echo", "--backend", "echo", "--slots", "4", "--spread")
    until(lambda: [each["state"] for each in made.replicas("echo")] == ["ready"] * 2, 90, "two replicas")
    return made


def read_by_one(cluster: Cluster) -> tuple[str, str]:
    """A story that nobody has read before, and the node that alone answers it, once every web process knows of that.

    One that both have read, because the second request was faster than the news of the first, stays on both.
    """

    def settled() -> tuple[str, str] | None:
        story = f"{secrets.token_hex(8)}: {STORY}"
        found = {asked(cluster, story, "first") for _ in range(6)}
        return (story, found.pop()) if len(found) == 1 else None

    found: tuple[str, str] = until(settled, LIMIT, "a story that one node has read")
    return found


def asked(cluster: Cluster, *turns: str) -> str:
    """The node that answers these messages; each request has a connection of its own, to either web process."""
    body = {"model": "echo", "messages": [{"role": "user", "content": turn} for turn in turns]}
    headers = {"Authorization": f"Bearer {cluster.api_key}", "Connection": "close"}
    answer = httpx.post(f"{cluster.base_url}/v1/chat/completions", json=body, headers=headers, timeout=LIMIT)
    assert answer.status_code == 200, answer.text
    return answer.headers["X-LocalAI-Node"]


def shared(cluster: Cluster) -> bool:
    """Whether both nodes answer, when eight requests come that begin as none before them."""
    found = {asked(cluster, f"{secrets.token_hex(8)} green bottles on the wall. " * 60) for _ in range(8)}
    return found == {"alpha", "alpha-2"}


def replica_at(cluster: Cluster, node: str) -> tuple[str, int]:
    """The replica of this node and its process."""
    found = next(each for each in cluster.replicas("echo") if each["node"] == node)
    [pid] = cluster.pids("celery", f"replica.{found['id']}")
    return found["id"], pid


def test_a_conversation_stays_where_it_was_read_and_outlives_that(pair: Cluster) -> None:
    until(lambda: shared(pair), LIMIT, "requests on both replicas")
    story, hot = read_by_one(pair)
    assert {asked(pair, story, f"turn {number}") for number in range(12)} == {hot}
    until(lambda: shared(pair), LIMIT, "what nobody has read to be shared out")

    _, pid = replica_at(pair, hot)
    os.kill(pid, signal.SIGSTOP)
    assert asked(pair, story, "while it hangs") != hot
    os.kill(pid, signal.SIGKILL)
    for number in range(4):
        assert asked(pair, story, f"when it is dead {number}")
    until(lambda: [each["state"] for each in pair.replicas("echo")] == ["ready"] * 2, 60, "its return")
    until(lambda: shared(pair), LIMIT, "requests on the new replica, too")
