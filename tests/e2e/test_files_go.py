"""A model that is removed leaves no file on its node; nothing that a model names goes."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from e2e_cluster import Cluster, until
from waiting import LIMIT


def test_the_file_of_a_removed_model_goes_and_that_of_another_stays(
    start_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    cluster = start_cluster("--no-model", LOCALAI_HEARTBEAT_INTERVAL="1", LOCALAI_Q_CLEAN_GRACE="0")
    named = {}
    for name in ("stays", "goes"):
        file = tmp_path / name
        file.write_bytes(name.encode() * 1000)
        file.chmod(0o644)
        named[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        cluster.cli("models", "add", name, "--backend", "echo", "--source", f"file:{file}", "--sha256", named[name],
                    "--memory", "1000000")  # fmt: skip
        assert cluster.say("hello", model=name).choices[0].message.content
    until(lambda: set(cluster.node("alpha")["hardware"]["files"]) == set(named.values()), LIMIT, "the report of both")
    assert "nothing to remove" in cluster.cli("nodes", "clean", "alpha", "--dry-run")

    cluster.cli("models", "remove", "goes")
    until(lambda: cluster.node("alpha")["hardware"]["files"] == [named["stays"]], 60, "the end of the file")
    (folder,) = cluster.home.glob("**/blobs")
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == [named["stays"]]
    told = json.loads(cluster.cli("nodes", "clean", "alpha", "--json"))
    assert (told[0]["removed"], told[0]["freed"]) == ([], 0)
    assert cluster.say("hello", model="stays").choices[0].message.content
    cluster.stop()
