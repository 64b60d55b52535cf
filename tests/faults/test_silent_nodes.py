"""Nodes fall silent, or nobody is there to hear them: what they have loaded serves on, and is not loaded again."""

from collections.abc import Callable

from callers import Caller, counted, numbers
from e2e_cluster import Cluster, until
from ledger import Ledger
from victims import pids, stopped

OFFLINE_AFTER = 6.0  # seconds, at a heartbeat of one second
Ask = Callable[..., Caller]


def states(cluster: Cluster) -> set[str]:
    return {state for (state,) in cluster.sql("SELECT state FROM nodes")}


def loaded(cluster: Cluster) -> list[tuple[str, str]]:
    """The replicas that the registry has, and their state."""
    return cluster.sql("SELECT id, state FROM replicas ORDER BY id")


def test_replicas_of_nodes_that_were_offline_are_taken_back_as_they_are(
    cluster: Cluster, ledger: Ledger, ask: Ask
) -> None:
    until(lambda: {state for _, state in loaded(cluster)} == {"ready"}, 30, "replicas that are ready")
    rows, processes, engines = loaded(cluster), pids(cluster, "replica"), pids(cluster, "backend")
    stream = ask(numbers(200, delay_ms=60)).until_said(2)
    with stopped(pids(cluster, "node")):
        until(lambda: states(cluster) == {"offline"} and not loaded(cluster), 20, "nodes that are offline")
        assert ask("still there").whole() == "still there"
    until(lambda: states(cluster) == {"ready"} and loaded(cluster) == rows, 10, "the same replicas")
    assert ask("again").whole() == "again"
    assert stream.whole() == counted(200)
    assert ledger.row(stream.job) == {"state": "done", "attempt": 1, "error": None}
    assert (pids(cluster, "replica"), pids(cluster, "backend")) == (processes, engines), "nothing was loaded again"


def test_while_no_web_process_is_there_no_node_is_given_up(cluster: Cluster, ask: Ask) -> None:
    until(lambda: {state for _, state in loaded(cluster)} == {"ready"}, 30, "replicas that are ready")
    rows, processes = loaded(cluster), pids(cluster, "replica")

    def silence() -> float:
        [(seconds,)] = cluster.sql("SELECT extract(epoch FROM now() - max(last_heartbeat)) FROM nodes")
        return float(seconds)

    with stopped(pids(cluster, "web")):
        until(lambda: silence() > OFFLINE_AFTER + 2, 20, "a long silence")
        assert states(cluster) == {"ready"}
    until(lambda: silence() < 1.5, 10, "a heartbeat")
    assert ask("again").whole() == "again"
    assert states(cluster) == {"ready"}
    assert (loaded(cluster), pids(cluster, "replica")) == (rows, processes)
