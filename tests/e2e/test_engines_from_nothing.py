"""Both engines come to machines that have none; what must be compiled is compiled on one of them only."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_cluster import BIN, Cluster, Joiner, printed_settings, until
from waiting import LIMIT

ENGINES = ("xllamacpp", "llama-cpp")

# `make wheels` compiles llama-cpp-python, once for a machine; whoever runs this file alone first waits for it.
pytestmark = pytest.mark.timeout(3600)


def install(cluster: Cluster, node: str) -> None:
    """Have a node install both engines."""
    for engine in ENGINES:
        told = cluster.http.post(f"/api/nodes/{node}/backends/install", json={"backend": engine}).raise_for_status()
        job = cluster.ended_job(told.json()["jobID"], 3000)
        assert job["state"] == "done", job["error"]


def test_the_second_machine_takes_what_the_first_has_compiled(
    start_cluster: Callable[..., Cluster], join: Callable[..., Joiner], weights: Path
) -> None:
    cluster = start_cluster("--no-model", LOCALAI_HEARTBEAT_INTERVAL="1", LOCALAI_AUTO_APPROVE_NODES="true")
    cluster.cli("nodes", "label", "alpha", "builder=true")
    install(cluster, "alpha")
    (wheel,) = cluster.http.get("/api/wheels").json()["wheels"]
    assert (wheel["package"], wheel["node"], wheel["backends"]) == ("llama-cpp-python", "alpha", ["llama-cpp"])
    assert "llama-cpp-python" in cluster.cli("backends", "wheels")

    assert shutil.which("c++", path=str(BIN)) is None
    own = cluster.home / "beta-wheels"
    beta = join("bare", **printed_settings(cluster), PATH=str(BIN), CXX="", LOCALAI_Q_WHEEL_CACHE=str(own))
    until(lambda: (cluster.node("bare") or {}).get("state") == "ready", 60, "the second machine")
    install(cluster, "bare")
    assert not list(own.glob("blobs/[0-9a-f]*")), "it has compiled nothing"
    assert [path.name for path in beta.home.glob("**/blobs/[0-9a-f]*")] == [wheel["sha256"]]
    until(lambda: len(cluster.node("bare")["hardware"].get("backends", ())) == 2, LIMIT, "the report of both engines")

    cluster.cli("models", "add", "small", "--file", str(weights), "--backend", "llama-cpp", "--context-size", "256",
                "--selector", "node.name=bare")  # fmt: skip
    assert cluster.say("Count to three.", model="small", max_tokens=4).usage.completion_tokens > 0
    assert [replica["node"] for replica in cluster.replicas("small")] == ["bare"]
    beta.term()

    assert "0 wheels have an id that begins with 'x'" in cluster.cli("backends", "wheels", "--delete", "x", code=1)
    cluster.cli("backends", "wheels", "--delete", wheel["id"][:12])
    assert cluster.http.get("/api/wheels").json() == {"wheels": []}
