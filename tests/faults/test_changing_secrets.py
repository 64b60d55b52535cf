"""Nodes change their secrets while streams run, whatever dies meanwhile: nothing is lost, and the old ones open nothing."""

import json
from collections.abc import Callable
from signal import SIGKILL

import pytest
import redis
from callers import Caller, counted, numbers
from e2e_cluster import Cluster, until
from victims import pids, send
from waiting import LIMIT

Ask = Callable[..., Caller]


def secrets(cluster: Cluster) -> dict[str, dict[str, object]]:
    """What each node's file says, by the node's name."""
    return {path.parent.name: json.loads(path.read_text()) for path in cluster.home.glob("**/identity.json")}


def settled(cluster: Cluster, before: dict[str, dict[str, object]]) -> bool:
    """Whether every node uses another secret, and its file, the registry and Valkey know no other."""
    nodes = cluster.sql("SELECT id, next_secret_hash, rotate FROM nodes")
    try:
        known = {each.split()[1]: each.count(" #") for each in cluster.redis().execute_command("ACL LIST")}
    except redis.ConnectionError:
        return False
    return (
        all(now.keys() == {"secret", "since"} for now in secrets(cluster).values())
        and all(now["secret"] != before[name]["secret"] for name, now in secrets(cluster).items())
        and not any(following or rotate for _, following, rotate in nodes)
        and all(known.get(f"node-{node_id}") == 1 for node_id, *_ in nodes)
    )


@pytest.mark.parametrize("victim", ["valkey", "node"])
def test_secrets_change_while_streams_run(cluster: Cluster, ask: Ask, victim: str) -> None:
    before, replicas = secrets(cluster), pids(cluster, "replica")
    streams = [ask(numbers(120, delay_ms=50)) for _ in range(6)]
    for stream in streams:
        stream.until_said(2)
    for name in before:
        cluster.cli("nodes", "rotate", name)
    send(pids(cluster, victim), SIGKILL)
    until(lambda: settled(cluster, before), LIMIT, "other secrets")
    nodes = dict(cluster.sql("SELECT name, id FROM nodes"))
    address = {name: cluster.redis().connection_pool.connection_kwargs[name] for name in ("host", "port")}
    for name, old in before.items():
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(**address, username=f"node-{nodes[name]}", password=old["secret"]).ping()
    for stream in streams:
        assert stream.whole() == counted(120)
    until(lambda: ask("again").wait().text == "again", LIMIT, "an answer")
    if victim != "node":
        assert pids(cluster, "replica") == replicas, "nothing was loaded again"
