"""Files of a model come to a node before anybody asks for it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from e2e_cluster import Cluster, until


def test_a_model_that_says_so_is_fetched_before_anybody_asks(
    start_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    files = {name: tmp_path / name for name in ("own", "list")}
    files["own"].write_bytes(b"weights" * 1000)
    files["own"].chmod(0o644)
    digest = hashlib.sha256(files["own"].read_bytes()).hexdigest()
    files["list"].write_text(
        f"- {{name: parrot, backend: echo, source: 'file:{files['own']}', sha256: {digest}, memory: 1000000}}"
    )
    cluster = start_cluster("--no-model", LOCALAI_HEARTBEAT_INTERVAL="1", LOCALAI_GALLERIES=str(files["list"]))
    until(lambda: cluster.node("alpha")["state"] == "ready", 60, "the node")
    assert "parrot is there." in cluster.cli("models", "install", "parrot")
    assert cluster.node("alpha")["hardware"]["files"] == [digest]
    assert cluster.node("alpha")["replicas"] == []
    assert cluster.say("hello", model="parrot").choices[0].message.content
    cluster.stop()
