"""What a job has changed on a node is told at once, not with the next of its regular reports."""

from collections.abc import Callable

from e2e_cluster import Cluster, until
from waiting import LIMIT


def test_a_backend_is_shown_on_its_node_as_soon_as_it_is_installed_and_no_more_when_it_is_deleted(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster("--no-model", LOCALAI_HEARTBEAT_INTERVAL="600")
    cluster.cli("backends", "install", "echo", "--node", "alpha")
    until(lambda: "echo" in cluster.cli("backends", "list"), LIMIT, "the report of the backend")
    cluster.cli("backends", "delete", "echo", "--node", "alpha")
    until(lambda: "echo" not in cluster.cli("backends", "list"), LIMIT, "the report of its end")
    cluster.stop()
