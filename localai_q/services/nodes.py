"""Nodes: how a machine joins, reports, is approved and leaves."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from localai_q import names
from localai_q.bus import presence
from localai_q.cluster.hardware import refreshed
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.reports import Report
from localai_q.cluster.states import NodeState, ReplicaState
from localai_q.errors import Conflict, Forbidden, NodeGone, NotFound
from localai_q.services import jobs, node_users, reports
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from localai_q.store import models, nodes, replicas
from localai_q.store.keys import digest

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1", "0.0.0.0")  # noqa: S104
UNHEALTHY_AFTER = 3.0  # heartbeats missed
OFFLINE_AFTER = 6.0


def register(
    services: Services, *, token: str, name: str, secret_hash: str, version: str, hardware: dict[str, Any], host: str
) -> dict[str, Any]:
    """A machine asks to join, or comes back. `host` is how it called us.

    Returns its id and state and, once it is approved, what it needs to work.

    Raises:
        Forbidden: the registration token is wrong.
        Conflict: another machine has that name.
    """
    expected = services.settings.registration_token
    if not expected or not hmac.compare_digest(token.encode(), expected.encode()):
        log.warning("node %r asked to join with a wrong token", name)
        raise Forbidden("The registration token is wrong. 'localai-q up' prints the right one when it starts.")
    with services.db.transaction() as db:
        node = nodes.by_name(db, name) or nodes.add(db, name, secret_hash)
        if node is None or not _is_known(node, secret_hash):
            log.warning("a machine asked to join under the name of node %r without its secret", name)
            raise Conflict(
                f"The name '{name}' belongs to a node with another secret. Give this one a name of its own with "
                f"LOCALAI_NODE_NAME; or, if it is that node and has lost its secret: localai-q nodes delete {name}"
            )
        if services.settings.auto_approve and not node.approved:
            nodes.approve(db, node.id)
        nodes.heard_of(db, node.id, hardware=refreshed(node.hardware, hardware), version=version)
        node = _existing(db, node.id)
        if node.approved:
            # A node registers when its process starts: nothing of an earlier process is left.
            gone = _clear(services, db, node, "was started anew")
            nodes.move(db, node.id, node.serving_state)
            node = _existing(db, node.id)
    answer: dict[str, Any] = {"id": node.id, "name": node.name, "state": node.state}
    if node.approved:
        _bereave(services, gone, f"its node '{node.name}' was started anew")
        services.redis.publish(names.WAKE_CHANNEL, node.id)
        url = redis_url_for(services, host)
        if node_users.admit(services, node):
            url = as_user(url, names.node_user(node.id))
        answer |= {"redis_url": url, **_shared_settings(services)}
    return answer


def redis_url_for(services: Services, host: str) -> str:
    """The Redis URL as a machine can use it that reached this one by `host`."""
    settings = services.settings
    if settings.public_redis_url:
        return settings.public_redis_url
    parts = urlsplit(settings.redis_url)
    if parts.hostname not in LOOPBACK:
        return settings.redis_url
    userinfo, at, _ = parts.netloc.rpartition("@")
    address = f"[{host}]" if ":" in host else host
    return urlunsplit(parts._replace(netloc=f"{userinfo}{at}{address}:{parts.port or 6379}"))


def as_user(url: str, user: str) -> str:
    """The URL for this user instead, whose password is left to him to fill in."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{user}@{parts.netloc.rpartition('@')[2]}"))


def authenticate(services: Services, node_id: str, secret: str) -> Node:
    """The node that calls, by the secret that it made itself.

    Raises:
        Forbidden: that is not this node's secret, or the node is not known or not approved.
    """
    with services.db.transaction() as db:
        node = nodes.by_id(db, node_id)
    shown = digest(secret)
    if node is None or not _is_known(node, shown):
        raise Forbidden("This is not the secret of that node. Start the node again to have it register anew.")
    if not node.approved:
        raise Forbidden(f"Node '{node.name}' waits for approval: localai-q nodes approve {node.name}")
    return _settled(services, node) if shown == node.next_secret_hash else node


def announce_secret(services: Services, node: Node, secret_hash: str) -> None:
    """A node has made itself a new secret. Both count until it uses that.

    Raises:
        Forbidden: the secret by which `node` was let in has been withdrawn since.
    """
    with services.db.transaction() as db:
        known = nodes.lock(db, node.id)
        if known is not None and secret_hash == known.secret_hash:
            return  # it has used it since
        if known is None or known.secret_hash != node.secret_hash:
            raise Forbidden("This secret was withdrawn.")
        nodes.announce_secret(db, node.id, secret_hash)
    if known.next_secret_hash not in ("", secret_hash):
        log.warning("node %s announces another new secret than before, which it has not used", node.name)
    node_users.extend(services, node.id)


def ask_to_rotate(services: Services, id_or_name: str) -> dict[str, Any]:
    """Have a node make itself a new secret when it reports next.

    Raises:
        NotFound: there is none of that id or name.
        Conflict: it is not in yet.
    """
    node = named(services, id_or_name)
    _need_approval(node)
    with services.db.transaction() as db:
        nodes.want_rotation(db, node.id)
    return {"id": node.id, "name": node.name, "rotate": True}


def _settled(services: Services, node: Node) -> Node:
    """The node, which uses its announced secret: the one before is worth nothing any more."""
    with services.db.transaction() as db:
        settled = nodes.settle_secret(db, node.id, node.next_secret_hash)
        node = _existing(db, node.id)
    if settled:
        log.warning("node %s uses a new secret; the one before is withdrawn", node.name)
        node_users.withdraw(services, node.id)
    return node


def _is_known(node: Node, secret_hash: str) -> bool:
    return any(hmac.compare_digest(known, secret_hash) for known in node.secret_hashes)


def _need_approval(node: Node) -> None:
    if not node.approved or node.state is NodeState.PENDING:
        raise Conflict(f"Node '{node.name}' waits for approval: localai-q nodes approve {node.name}")


def heartbeat(
    services: Services, node: Node, *, hardware: dict[str, Any], reported: Sequence[Report] = ()
) -> dict[str, Any]:
    """A node reports. It is told which of its replicas should not be there."""
    with services.db.transaction() as db:
        node = _locked(db, node.id)
        nodes.heard_of(db, node.id, hardware=refreshed(node.hardware, hardware))
        if node.state in (NodeState.UNHEALTHY, NodeState.OFFLINE):
            nodes.move(db, node.id, node.serving_state)
        node = _existing(db, node.id)
        found = reports.settle(db, node, reported)
    _bereave(services, found.lost, reports.LOST)
    if found.adopt or found.ready or found.lost:
        services.redis.publish(names.WAKE_CHANNEL, node.id)
    wanted = {"rotate": True} if node.rotate else {}
    return {"state": node.state, "stop": sorted(found.stop), **wanted}


def report_replica(
    services: Services,
    node: Node,
    replica_id: str,
    state: ReplicaState,
    reason: str,
    hardware: dict[str, Any] | None = None,
) -> None:
    """A node says what became of one of its replicas, and what it has free after that.

    Raises:
        NotFound: it has no such replica.
    """
    with services.db.transaction() as db:
        if hardware:
            nodes.heard_of(db, node.id, hardware=refreshed(_locked(db, node.id).hardware, hardware))
        replica = replicas.by_id(db, replica_id)
        if replica is None or replica.node_id != node.id:
            replica = None  # its model was removed; what its end has freed is worth knowing all the same
        elif state is ReplicaState.GONE:
            replicas.forget(db, replica_id)
        elif not replicas.move(db, replica_id, state, reason=reason):
            log.info("replica %s reported %s while %s; ignored", replica_id, state, replica.state)
    if replica is None:
        raise NotFound(f"Node '{node.name}' has no replica '{replica_id}'.")
    if state in (ReplicaState.GONE, ReplicaState.FAILED):
        _bereave(services, [replica], reason or "it has ended")
    services.redis.publish(names.WAKE_CHANNEL, node.id)


def replica_spec(services: Services, node: Node, replica_id: str) -> dict[str, Any]:
    """What a node needs to start one of its replicas.

    Raises:
        NotFound: it has no such replica that is to be loaded, or that was placed before its model was changed, and is
            about to be ended.
    """
    with services.db.transaction() as db:
        replica = replicas.by_id(db, replica_id)
        model = models.by_id(db, replica.model_id) if replica else None
    if replica is None or model is None or replica.node_id != node.id:
        raise NotFound(f"Node '{node.name}' has no replica '{replica_id}'.")
    if replica.is_outdated(model):
        raise NotFound(f"The model '{model.name}' was changed after replica '{replica_id}' was placed.")
    if replica.state is not ReplicaState.LOADING or replica.job_id is None:  # one that was adopted has a process
        raise NotFound(f"Replica '{replica_id}' is {replica.state} and not to be started.")
    cut = {"context_size": replica.context_size} if replica.context_size else {}
    return {"id": replica.id, "number": replica.number, "job": replica.job_id, "gpu": replica.reserved.vram > 0,
            "model": {**model.spec(), **cut}}  # fmt: skip


def deregister(services: Services, node: Node) -> None:
    """A node leaves: its replicas have ended."""
    with services.db.transaction() as db:
        nodes.move(db, node.id, NodeState.OFFLINE)
        gone = _clear(services, db, node, "has left")
    _bereave(services, gone, f"its node '{node.name}' has left")
    services.redis.publish(names.WAKE_CHANNEL, node.id)


def named(services: Services, id_or_name: str) -> Node:
    """The node of this id or name.

    Raises:
        NotFound: there is none.
    """
    with services.db.transaction() as db:
        node = nodes.by_id(db, id_or_name) or nodes.by_name(db, id_or_name)
    if node is None:
        raise NotFound(f"There is no node '{id_or_name}'. 'localai-q nodes list' shows them.")
    return node


def approve(services: Services, id_or_name: str) -> dict[str, Any]:
    """Let a pending node in.

    Raises:
        NotFound: there is none of that id or name.
    """
    node = named(services, id_or_name)
    with services.db.transaction() as db:
        nodes.approve(db, node.id)
    return {"id": node.id, "name": node.name, "approved": True}


def drain(services: Services, node: Node) -> dict[str, Any]:
    """Have a node finish what it holds and take nothing new, until `resume`. Returns its id, name and state.

    Raises:
        Conflict: it is not in yet.
    """
    return _set_drain(services, node, wanted=True)


def resume(services: Services, node: Node) -> dict[str, Any]:
    """Let a node that was drained take work again. Returns its id, name and state.

    Raises:
        Conflict: it is not in yet; only `approve` lets it in.
    """
    return _set_drain(services, node, wanted=False)


def _set_drain(services: Services, node: Node, *, wanted: bool) -> dict[str, Any]:
    _need_approval(node)
    with services.db.transaction() as db:
        nodes.set_drain(db, node.id, wanted)
        node = _existing(db, node.id)
        if node.state is not NodeState.OFFLINE:
            nodes.move(db, node.id, node.serving_state)
        node = _existing(db, node.id)
    log.info("node %s is to %s", node.name, "drain" if wanted else "work", extra={"action": "drain"})
    services.redis.publish(names.WAKE_CHANNEL, node.id)
    return {"id": node.id, "name": node.name, "state": node.state}


def remove(services: Services, id_or_name: str, *, force: bool) -> dict[str, Any]:
    """Forget a node: its secret is worth nothing any more, its name is free. `force`: even if it is at work.

    Raises:
        NotFound: there is none of that id or name.
        Conflict: it is at work.
    """
    node = named(services, id_or_name)
    if node.at_work and not force:
        raise Conflict(
            f"Node '{node.name}' is {node.state}: drain it (localai-q nodes drain {node.name}) and wait until it is "
            "drained, or force it, which ends what it does."
        )
    jobs.apply_ends(services)  # nobody looks for those of a node that is not there
    with services.db.transaction() as db:
        gone = _clear(services, db, node, "was deleted")
        nodes.remove(db, node.id)
    log.warning("node %s was deleted", node.name)
    node_users.dismiss(services, node)
    _bereave(services, gone, f"its node '{node.name}' was deleted")
    services.redis.delete(names.node_queue(node.id), names.node_jobs_queue(node.id))
    services.redis.publish(names.WAKE_CHANNEL, node.id)
    return {"id": node.id, "name": node.name, "removed": True}


def watch_health(services: Services) -> None:
    """Mark nodes that have fallen silent, and forget the replicas of those that stay so.

    Silence says something only of a time in which the web could be told: a node is judged when both Postgres and a web
    process have been there without a break for as long as it may be silent.
    """
    interval = services.settings.heartbeat
    silent: list[Replica] = []
    with services.db.transaction() as db:
        unhealthy = nodes.silent(db, UNHEALTHY_AFTER * interval)
        offline = nodes.silent(db, OFFLINE_AFTER * interval)
        served = presence.served_for(services.redis)  # after the queries: without Postgres it is not continued
        for node in unhealthy if served > UNHEALTHY_AFTER * interval else ():
            if nodes.move(db, node.id, NodeState.UNHEALTHY):
                log.warning("node %s has not reported for %s s", node.name, UNHEALTHY_AFTER * interval)
        for node in offline if served > OFFLINE_AFTER * interval else ():
            if nodes.move(db, node.id, NodeState.OFFLINE):
                log.warning("node %s is offline", node.name)
                silent += _clear(services, db, node, "is offline")
    for replica in silent:  # what it holds it may still do; it loses that with its leases
        jobs.take_over_doorbells(services, replica.id, names.model_queue(replica.model_id))


def _clear(services: Services, db: Any, node: Node, why: str) -> list[Replica]:
    """Forget what the node's process was doing: its replicas, which are returned, and its jobs."""
    found = replicas.every(db, node_id=node.id)
    for replica in found:
        replicas.forget(db, replica.id)
    own = job_rows.open_on(db, node.id)
    jobs.end_at_once(services, db, own, NodeGone(f"The node '{node.name}' {why} before this was done."))
    return found


def _bereave(services: Services, gone: list[Replica], why: str) -> None:
    """The processes of these replicas have ended: what they held may be done by others at once."""
    for replica in gone:
        jobs.bereave(services, replica.id, names.model_queue(replica.model_id), why)


def _shared_settings(services: Services) -> dict[str, Any]:
    """Numbers that the whole cluster must agree on."""
    settings = services.settings
    return {
        name: getattr(settings, name) for name in ("lease", "journal_ttl", "journal_max", "heartbeat", "load_stall")
    }


def _existing(db: Any, node_id: str) -> Node:
    return _not_deleted(nodes.by_id(db, node_id))


def _locked(db: Any, node_id: str) -> Node:
    """The node, which nobody else changes until the transaction ends."""
    return _not_deleted(nodes.lock(db, node_id))


def _not_deleted(node: Node | None) -> Node:
    if node is None:
        raise NotFound("This node was deleted a moment ago.")
    return node
