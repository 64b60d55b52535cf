"""What nodes report, and what becomes of what they have loaded when they cannot: it serves on, and is not loaded again."""

from collections.abc import Callable

from callers import Caller, counted, numbers
from e2e_cluster import Cluster, until
from ledger import Ledger
from victims import pids, stopped
from waiting import LIMIT

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
    until(lambda: {state for _, state in loaded(cluster)} == {"ready"}, LIMIT, "replicas that are ready")
    rows, processes, engines = loaded(cluster), pids(cluster, "replica"), pids(cluster, "backend")
    stream = ask(numbers(200, delay_ms=60)).until_said(2)
    with stopped(pids(cluster, "node")):
        until(lambda: states(cluster) == {"offline"} and not loaded(cluster), LIMIT, "nodes that are offline")
        assert ask("still there").whole() == "still there"
    until(lambda: states(cluster) == {"ready"} and loaded(cluster) == rows, LIMIT, "the same replicas")
    assert ask("again").whole() == "again"
    assert stream.whole() == counted(200)
    assert ledger.row(stream.job) == {"state": "done", "attempt": 1, "error": None}
    assert (pids(cluster, "replica"), pids(cluster, "backend")) == (processes, engines), "nothing was loaded again"


def test_what_is_loaded_outlives_a_time_without_any_web_process(cluster: Cluster, ask: Ask) -> None:
    until(lambda: {state for _, state in loaded(cluster)} == {"ready"}, LIMIT, "replicas that are ready")
    rows, processes = loaded(cluster), pids(cluster, "replica")

    def silence() -> float:
        [(seconds,)] = cluster.sql("SELECT extract(epoch FROM now() - max(last_heartbeat)) FROM nodes")
        return float(seconds)

    with stopped(pids(cluster, "web")):
        until(lambda: silence() > OFFLINE_AFTER + 2, LIMIT, "a long silence")
    until(lambda: states(cluster) == {"ready"} and loaded(cluster) == rows, LIMIT, "the same replicas")
    assert ask("again").whole() == "again"
    assert pids(cluster, "replica") == processes


def test_what_a_replica_generates_is_measured_and_shown(cluster: Cluster, ask: Ask) -> None:
    assert ask(numbers(60, delay_ms=20), "echo-one").whole() == counted(60)

    def shown() -> list[dict]:
        models = cluster.http.get("/api/nodes/models").raise_for_status().json()["models"]
        return [each for each in models if each["model"] == "echo-one" and each["tokens_per_second"]]

    [found] = until(shown, LIMIT, "a measured speed")
    assert 0 < found["tokens_per_second"] < 60, "50 at most, and some for its way"
    assert found["load_seconds"] > 0.1
    assert found["reported"] > 0
    assert f"{found['tokens_per_second']:.3g}" in cluster.cli("nodes", "show", found["node"])
