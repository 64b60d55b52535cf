"""What one node has fetched, the next one has from it: its source may be gone by then."""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from e2e_cluster import Cluster, until

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from file_server import Remote, serve

CONTENT = os.urandom(20 << 20)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def test_the_second_node_has_a_file_from_the_first_while_its_source_is_gone(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(
        "--no-model", "--nodes", "2", LOCALAI_HEARTBEAT_INTERVAL="1", LOCALAI_Q_ALLOW_PRIVATE_SOURCES="true"
    )

    def add(model: str, node: str) -> None:
        cluster.cli("models", "add", model, "--backend", "echo", "--source", url, "--sha256", DIGEST,
                    "--memory", "1000000", "--selector", f"node.name={node}")  # fmt: skip

    with serve() as source:
        url = source.put("/m.gguf", Remote(CONTENT))
        add("first", "alpha")
        assert cluster.say("hello", model="first").choices[0].message.content
    until(lambda: cluster.node("alpha")["hardware"].get("files") == [DIGEST], 10, "the report of the file")
    assert cluster.node("alpha")["hardware"]["files_address"].startswith("127.0.0.1:")

    add("second", "alpha-2")
    assert cluster.say("hello", model="second").choices[0].message.content
    copies = list(cluster.home.glob(f"**/blobs/{DIGEST}"))
    assert len(copies) == 2
    assert all(path.read_bytes() == CONTENT for path in copies)
    (fetched,) = [job for job in cluster.jobs(kind="fetch_model") if job["node"] == "alpha-2"]
    assert fetched["state"] == "done"
    cluster.stop()
