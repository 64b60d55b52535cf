"""Two copies of one model on one node: two processes, each with requests of its own."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from e2e_cluster import Cluster, until
from waiting import LIMIT


def test_two_copies_on_one_node_serve_at_the_same_time(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster("--no-model", LOCALAI_MAX_REPLICAS_PER_MODEL="2", LOCALAI_HEARTBEAT_INTERVAL="1")
    cluster.cli("models", "add", "pair", "--backend", "echo", "--slots", "1", "--min-replicas", "2",
                "--max-replicas", "3", "--option", "delay_ms:300")  # fmt: skip

    def ready() -> list[int]:
        return sorted(each["number"] for each in cluster.replicas("pair") if each["state"] == "ready")

    until(lambda: ready() == [1, 2], 60, "both copies")
    assert "2  (as the node says)" in cluster.cli("nodes", "limit", "alpha")

    def at_work() -> int:
        return sum(each["in_flight"] > 0 for each in cluster.node("alpha")["replicas"])

    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(cluster.say, "one two three four five six seven eight", "pair") for _ in range(2)]
        until(lambda: at_work() == 2, LIMIT, "a request on each copy, which has one slot")
        assert all(answer.result().choices[0].message.content for answer in answers)

    said = cluster.cli("nodes", "limit", "alpha", "max-replicas-per-model=1", "vram-budget=50%")
    assert "max-replicas-per-model=1\n" in said
    assert "vram-budget=50% = " in said
    assert "8GB, 7.5GiB or 50%" in cluster.cli("nodes", "limit", "alpha", "vram-budget=much", code=1)
    assert "limits nothing" in cluster.cli("nodes", "limit", "alpha", "colour=red", code=1)
    assert "vram-budget=" in cluster.cli("nodes", "limit", "alpha", "vram-budget-")
    cluster.stop()
