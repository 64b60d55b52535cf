"""Queries on nodes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, Row, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from localai_q.cluster.labels import found_labels
from localai_q.cluster.nodes import Node, replica_slots
from localai_q.cluster.states import NODE_MOVES, NodeState, sources
from localai_q.names import new_id
from localai_q.store.tables import nodes


def add(db: Connection, name: str, secret_hash: str) -> Node | None:
    """Enter a node that asks to join, as pending; None if the name is taken."""
    values = {"id": new_id(), "name": name, "secret_hash": secret_hash, "state": NodeState.PENDING}
    row = db.execute(upsert(nodes).values(values).on_conflict_do_nothing().returning(nodes)).one_or_none()
    return _node(row) if row else None


def by_name(db: Connection, name: str) -> Node | None:
    row = db.execute(select(nodes).where(nodes.c.name == name)).one_or_none()
    return _node(row) if row else None


def by_id(db: Connection, node_id: str) -> Node | None:
    row = db.execute(select(nodes).where(nodes.c.id == node_id)).one_or_none()
    return _node(row) if row else None


def lock(db: Connection, node_id: str) -> Node | None:
    """The node, which nobody else changes or books on until the transaction ends."""
    row = db.execute(select(nodes).where(nodes.c.id == node_id).with_for_update()).one_or_none()
    return _node(row) if row else None


def every(db: Connection) -> list[Node]:
    return [_node(row) for row in db.execute(select(nodes).order_by(nodes.c.name))]


def states(db: Connection) -> dict[str, tuple[str, NodeState]]:
    """Name and state of every node, by id: a small part of what `every` reads."""
    rows = db.execute(select(nodes.c.id, nodes.c.name, nodes.c.state))
    return {node_id: (name, NodeState(state)) for node_id, name, state in rows}


def heard_of(db: Connection, node_id: str, *, hardware: dict[str, Any] | None, version: str | None = None) -> None:
    """Note that the node has reported."""
    values: dict[str, Any] = {"last_heartbeat": func.now()}
    if hardware:
        values["hardware"] = hardware
    if version:
        values["version"] = version
    db.execute(update(nodes).where(nodes.c.id == node_id).values(values))


def keep_report(db: Connection, node_id: str, told: dict[str, Any], missed: Collection[str]) -> None:
    """Note what the node has just said of its replicas, and of which it said nothing."""
    report = {"replicas": told, "missed": sorted(missed)}
    db.execute(update(nodes).where(nodes.c.id == node_id).values(report=report, reported_at=func.now()))


def approve(db: Connection, node_id: str) -> None:
    db.execute(update(nodes).where(nodes.c.id == node_id).values(approved=True))


def want_rotation(db: Connection, node_id: str) -> None:
    db.execute(update(nodes).where(nodes.c.id == node_id).values(rotate=True))


def announce_secret(db: Connection, node_id: str, secret_hash: str) -> None:
    db.execute(update(nodes).where(nodes.c.id == node_id).values(next_secret_hash=secret_hash))


def settle_secret(db: Connection, node_id: str, secret_hash: str) -> bool:
    """The announced secret takes the place of the one before. False if it was not the announced one."""
    announced = (nodes.c.id == node_id) & (nodes.c.next_secret_hash == secret_hash)
    values = {"secret_hash": secret_hash, "next_secret_hash": "", "rotate": False}
    return db.execute(update(nodes).where(announced).values(values)).rowcount == 1


def set_labels(db: Connection, node_id: str, labels: dict[str, str]) -> None:
    db.execute(update(nodes).where(nodes.c.id == node_id).values(labels=labels))


def set_limit(db: Connection, node_id: str, name: str, value: str | int | None) -> None:
    """Note what an admin says of `vram_budget` or `max_replicas_per_model`."""
    db.execute(update(nodes).where(nodes.c.id == node_id).values({name: value}))


def set_drain(db: Connection, node_id: str, wanted: bool) -> None:
    db.execute(update(nodes).where(nodes.c.id == node_id).values(drain=wanted))


def remove(db: Connection, node_id: str) -> None:
    """Forget the node and its replicas."""
    db.execute(delete(nodes).where(nodes.c.id == node_id))


def move(db: Connection, node_id: str, target: NodeState) -> bool:
    """Change the node's state if the move is allowed. False if it is not."""
    allowed = sources(NODE_MOVES, target)
    statement = update(nodes).where(nodes.c.id == node_id, nodes.c.state.in_(allowed)).values(state=target)
    return db.execute(statement).rowcount == 1


def silent(db: Connection, seconds: float) -> list[Node]:
    """Nodes in service that have not reported for so long."""
    in_service = (NodeState.READY, NodeState.UNHEALTHY, NodeState.DRAINING, NodeState.DRAINED)
    limit = func.now() - func.make_interval(0, 0, 0, 0, 0, 0, seconds)
    rows = db.execute(select(nodes).where(nodes.c.state.in_(in_service), nodes.c.last_heartbeat < limit))
    return [_node(row) for row in rows]


def _node(row: Row[Any]) -> Node:
    slots = replica_slots(row.hardware, row.max_replicas_per_model)
    return Node(
        id=row.id,
        name=row.name,
        state=NodeState(row.state),
        approved=row.approved,
        secret_hash=row.secret_hash,
        next_secret_hash=row.next_secret_hash,
        rotate=row.rotate,
        version=row.version,
        hardware=row.hardware,
        last_heartbeat=row.last_heartbeat.timestamp() if row.last_heartbeat else None,
        reported=row.reported_at.timestamp() if row.reported_at else None,
        report=row.report.get("replicas", {}),
        missed=tuple(row.report.get("missed", ())),
        drain=row.drain,
        labels={**found_labels(row.name, row.hardware, slots), **row.labels},
        given_labels=row.labels,
        given_budget=row.vram_budget,
        given_slots=row.max_replicas_per_model,
    )
