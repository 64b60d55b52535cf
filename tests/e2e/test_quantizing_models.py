"""A model is quantized by a whole cluster, whatever becomes of the node that does it; what comes of it chats."""

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from e2e_cluster import Cluster, until
from gguf_files import embedder

LONG = 170.0  # seconds that work at the lowest priority may take on a crowded machine
COMPILING = 1800.0  # seconds that the engine may take on a machine that has never compiled it
MAKING = ("quantizing", "reading with the source", "reading with the result")


def shown(cluster: Cluster, made: str) -> dict[str, Any]:
    """The quantization, once the stores have time to tell it."""
    answer = until(lambda: found if (found := cluster.http.get(f"/api/quantization/jobs/{made}")).is_success else None,
                   LONG, "an answer")  # fmt: skip
    return answer.json()


def node_process(cluster: Cluster, name: str) -> psutil.Process:
    """The process of the node of that name, whose children do the work."""
    (quantizer,) = cluster.pids("quantize.py")
    parents = psutil.Process(quantizer).parents()
    workers = [process for process in parents if "celery" in " ".join(process.cmdline())]
    node = workers[-1]
    assert name in node.environ().get("LOCALAI_NODE_NAME", name)
    return node


@pytest.mark.timeout(3600)
def test_its_node_dies_another_makes_the_file_which_chats(start_cluster: Callable[..., Cluster], weights: Path) -> None:
    cluster = start_cluster("--no-model", "--nodes", "2", LOCALAI_HEARTBEAT_INTERVAL="1", LOCALAI_Q_DISK_SPARE="0")
    cluster.cli("models", "add", "smol", "--source", f"file:{weights}", "--sha256", weights.name)
    made = cluster.cli("quantize", "smol", "--type", "q8_0", "--allow-requantize", "--no-wait").strip()
    until(lambda: shown(cluster, made)["stage"] in MAKING, COMPILING, "the work on the file")
    first = shown(cluster, made)["node"]
    os.kill(node_process(cluster, first).pid, signal.SIGKILL)
    until(lambda: shown(cluster, made)["failures"], 60, "that the node's death is known")
    until(lambda: shown(cluster, made)["state"] != "open", 2 * LONG, "the end of the quantization")
    one = shown(cluster, made)
    assert (one["status"], [failure["node"] for failure in one["failures"]]) == ("completed", [first]), one
    assert one["node"] != first
    assert list(cluster.home.glob("**/.*.quantized.part")) == []
    assert cluster.cli("quantize", "import", made, "--name", "eight").strip() == "eight"
    assert "q8_0" in cluster.cli("quantize", "types")
    assert json.loads(cluster.cli("quantize", "show", made))["result"] == one["result"]
    assert one["result"]["sha256"] in cluster.cli("quantize", "watch", made, "--json")
    copy = cluster.home / "copy.gguf"
    cluster.cli("quantize", "download", made, str(copy))
    assert hashlib.sha256(copy.read_bytes()).hexdigest() == one["result"]["sha256"]
    assert "is there already" in cluster.cli("quantize", "download", made, str(copy), code=1)

    told = json.loads(cluster.cli("quantize", "eight", "--type", "q4_k_m", "--allow-requantize", "--name", "four",
                                  "--import", "--json", timeout=2 * LONG))  # fmt: skip
    assert (told["status"], told["import_model_name"]) == ("completed", "four")
    assert told["result"]["source_size"] == one["result"]["size"]
    cluster.until_serving("four", LONG)
    assert cluster.say("Say hello.", model="four", max_tokens=8).choices[0].message.content
    listed = cluster.cli("quantize", "list")
    assert "105.5 MB of 144.8" in listed
    cluster.cli("quantize", "delete", made)
    assert made not in cluster.cli("quantize", "list")
    assert json.loads(cluster.cli("models", "show", "eight", "--json"))["origin"] == "q8_0 of smol"
    refused = cluster.cli("quantize", "smol", "--type", "q8_0", code=1, timeout=LONG)
    assert "quantized already" in refused
    embeds = cluster.home / "e.gguf"
    embeds.write_bytes(embedder())
    digest = hashlib.sha256(embeds.read_bytes()).hexdigest()
    told = cluster.cli("quantize", f"file:{embeds}", "--sha256", digest, "--type", "q8_0", timeout=LONG)
    assert "; cosine similarity 0.9999" in told
    assert "perplexity" not in told
    digests = ("--sha256", "0" * 64, "--sha256", "1" * 64)
    refused = cluster.cli("quantize", "https://x.example/m-00001-of-00003.gguf", *digests, code=1)
    assert "needs the 2 files behind the first" in refused
    cluster.stop()
