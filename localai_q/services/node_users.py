"""The users that nodes are on Redis, kept as Postgres says: who is in, and which models each has."""

from __future__ import annotations

import logging
from functools import cache

from localai_q.bus import users
from localai_q.cluster.nodes import Node, Replica, on_nodes
from localai_q.cluster.rights import rights
from localai_q.services.wiring import Services
from localai_q.store import nodes, replicas

log = logging.getLogger(__name__)


def admit(services: Services, node: Node) -> bool:
    """Make the user of a node that begins anew. False: this Redis lets us make none, so nodes share ours."""
    try:
        users.make(services.redis, node.id, node.secret_hashes, _rights(node, []))
    except users.NotAllowed:
        _complain()
        return False
    return True


def extend(services: Services, node_id: str) -> bool:
    """Let the node reach what its replicas need, before one of them starts. False: as of `admit`, or it is no more."""
    with services.db.transaction() as db:
        node = nodes.by_id(db, node_id)
        own = replicas.every(db, node_id=node_id)
    if node is None:
        return False
    try:
        users.extend(services.redis, node.id, node.secret_hashes, _rights(node, own))
    except users.NotAllowed:
        _complain()
        return False
    return True


def withdraw(services: Services, node_id: str) -> None:
    """A node uses its new secret: nobody is let in by the one before, or stays in."""
    if extend(services, node_id):
        users.cut(services.redis, node_id)


def dismiss(services: Services, node: Node) -> None:
    """A node is in no more: its user goes."""
    try:
        users.remove(services.redis, node.id)
    except users.NotAllowed:
        _complain()


def restore(services: Services) -> None:
    """Make the users that Redis has lost, and remove those of nodes that are in no more."""
    try:
        known = users.known(services.redis)  # before the rows are read: who comes in meanwhile is no stranger
        with services.db.transaction() as db:
            found = [node for node in nodes.every(db) if node.approved]
            there = on_nodes(replicas.every(db))
        for node in found:
            needed = _rights(node, there[node.id])
            rules, hashes = known.get(node.id, frozenset()), {f"#{each}" for each in node.secret_hashes}
            has = {rule for rule in rules if rule.startswith("#")}
            if not rules >= needed or has != hashes:
                log.info("node %s gets its rights on Redis", node.name)
                users.extend(services.redis, node.id, node.secret_hashes, needed)
            if has - hashes:
                users.cut(services.redis, node.id)
        for node_id in known.keys() - {node.id for node in found}:
            users.remove(services.redis, node_id)
    except users.NotAllowed:
        _complain()


def _rights(node: Node, own: list[Replica]) -> frozenset[str]:
    return rights(node.id, model_ids={r.model_id for r in own}, replica_ids=[r.id for r in own])


@cache
def _complain() -> None:
    """Say it once in the life of this process."""
    log.error(
        "EVERY NODE REACHES REDIS WITH THE CLUSTER'S OWN PASSWORD, because this Redis does not let us make a user for each: "
        "allow the command ACL to the user of LOCALAI_REDIS_URL, or admit only machines that you trust with every request"
    )
