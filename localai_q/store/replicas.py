"""Queries on replicas."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, Row, Select, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from localai_q.cluster.capacity import Booking
from localai_q.cluster.memory import Memory
from localai_q.cluster.nodes import Replica
from localai_q.cluster.states import REPLICA_MOVES, ReplicaState, sources
from localai_q.names import new_id
from localai_q.store.tables import measures, replicas

USED_STEP = 10.0  # seconds between two notes that a replica was of use


def place(
    db: Connection, *, model_id: str, node_id: str, number: int, revision: int, slots: int, booking: Booking
) -> Replica | None:
    """Enter a replica as placed; None if there is one of that number already, so that two deciders cannot double it."""
    return enter(db, new_id(), ReplicaState.PLACED, booking=booking, model_id=model_id, node_id=node_id, number=number,
                 revision=revision, slots=slots)  # fmt: skip


def enter(
    db: Connection, replica_id: str, state: ReplicaState, *, booking: Booking, **values: str | int
) -> Replica | None:
    """Enter a replica in any state; None if there is one of that id, or of that number."""
    row = {"id": replica_id, "state": state, **values, **_booked(booking)}
    done = db.execute(upsert(replicas).values(row).on_conflict_do_nothing().returning(replicas.c.id))
    return by_id(db, replica_id) if done.one_or_none() else None


def by_id(db: Connection, replica_id: str) -> Replica | None:
    row = db.execute(_with_speed().where(replicas.c.id == replica_id)).one_or_none()
    return _replica(row) if row else None


def known(db: Connection, replica_ids: Collection[str]) -> set[str]:
    """Those of these ids that are of replicas."""
    return set(db.execute(select(replicas.c.id).where(replicas.c.id.in_(list(replica_ids)))).scalars())


def every(
    db: Connection, *, node_id: str | None = None, model_id: str | None = None, states: Collection[str] | None = None
) -> list[Replica]:
    """Replicas, the oldest first, narrowed as asked."""
    query = _with_speed().order_by(replicas.c.created_at, replicas.c.id)
    if node_id is not None:
        query = query.where(replicas.c.node_id == node_id)
    if model_id is not None:
        query = query.where(replicas.c.model_id == model_id)
    if states is not None:
        query = query.where(replicas.c.state.in_(list(states)))
    return [_replica(row) for row in db.execute(query)]


def of_jobs(db: Connection, job_ids: Collection[str]) -> dict[str, Replica]:
    """The replicas whose stages these jobs are, by the jobs' ids; one of those that share a stage."""
    rows = db.execute(_with_speed().where(replicas.c.job_id.in_(list(job_ids))))
    return {row.job_id: _replica(row) for row in rows}


def move(
    db: Connection, replica_id: str, target: ReplicaState, *, booking: Booking | None = None, **values: Any
) -> bool:
    """Change the replica's state if the move is allowed. False if it is not."""
    allowed = sources(REPLICA_MOVES, target)
    if booking is not None:
        values |= _booked(booking)
    if target is ReplicaState.FAILED:
        values["failures"] = replicas.c.failures + 1
    elif target is ReplicaState.READY:
        values |= {"failures": 0, "reason": ""}
    statement = (
        update(replicas)
        .where(replicas.c.id == replica_id, replicas.c.state.in_(allowed))
        .values(state=target, changed_at=func.now(), **values)
    )
    return db.execute(statement).rowcount == 1


def touch(db: Connection, replica_id: str) -> None:
    """Note that its node was told again what to do with the replica."""
    db.execute(update(replicas).where(replicas.c.id == replica_id).values(told_at=func.now()))


def follow(db: Connection, job_id: str, next_job_id: str) -> None:
    """Have replicas that wait for a job wait for another one instead."""
    db.execute(update(replicas).where(replicas.c.job_id == job_id).values(job_id=next_job_id))


def use(db: Connection, replica_ids: Collection[str]) -> None:
    """Note that these replicas were of use, unless that was noted a moment ago."""
    noted = func.coalesce(replicas.c.used_at, "-infinity") > func.now() - func.make_interval(
        0, 0, 0, 0, 0, 0, USED_STEP
    )
    db.execute(update(replicas).where(replicas.c.id.in_(list(replica_ids)), ~noted).values(used_at=func.now()))


def forget(db: Connection, replica_id: str) -> None:
    db.execute(delete(replicas).where(replicas.c.id == replica_id))


def _with_speed() -> Select[Any]:
    """Rows with what was measured of the replica's model on its node."""
    same = (measures.c.node_id == replicas.c.node_id) & (measures.c.model_id == replicas.c.model_id)
    speed = func.coalesce(measures.c.tokens_per_second, 0.0).label("speed")
    return select(replicas, speed).select_from(replicas.outerjoin(measures, same))


def _replica(row: Row[Any]) -> Replica:
    return Replica(
        id=row.id,
        model_id=row.model_id,
        node_id=row.node_id,
        number=row.number,
        revision=row.revision,
        state=ReplicaState(row.state),
        slots=row.slots,
        speed=row.speed,
        reason=row.reason,
        job_id=row.job_id,
        failures=row.failures,
        changed=row.changed_at.timestamp(),
        told=row.told_at.timestamp() if row.told_at else 0.0,
        used=row.used_at.timestamp() if row.used_at else 0.0,
        reserved=Memory(ram=row.reserved, vram=row.reserved_vram),
        unseen=row.unseen,
        context_size=row.context_size,
    )


def _booked(booking: Booking) -> dict[str, int]:
    return {"reserved": booking.memory.ram, "reserved_vram": booking.memory.vram, "unseen": booking.unseen,
            "context_size": booking.context_size}  # fmt: skip
