"""Queries on wheels that nodes have compiled for others."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, delete, func, select
from sqlalchemy.dialects.postgresql import insert as upsert

from localai_q.cluster.wheels import Built, WheelKey
from localai_q.store.tables import wheels


def put(db: Connection, built: Built) -> None:
    """Enter a wheel, in the place of one of the same key."""
    values = {"digest": built.key.digest, "key": built.key.model_dump(), "sha256": built.sha256, "size": built.size,
              "node": built.node, "created_at": func.now()}  # fmt: skip
    db.execute(upsert(wheels).values(values).on_conflict_do_update(index_elements=[wheels.c.digest], set_=values))


def by_digest(db: Connection, digest: str) -> Built | None:
    """The wheel of a key."""
    row = db.execute(select(wheels).where(wheels.c.digest == digest)).one_or_none()
    return _built(row) if row else None


def contents(db: Connection) -> set[str]:
    """The SHA-256 of every wheel."""
    return set(db.execute(select(wheels.c.sha256)).scalars())


def every(db: Connection) -> list[Built]:
    """All of them, by package and age."""
    return [
        _built(row) for row in db.execute(select(wheels).order_by(wheels.c.key["package"].astext, wheels.c.created_at))
    ]


def remove(db: Connection, digest: str) -> None:
    db.execute(delete(wheels).where(wheels.c.digest == digest))


def _built(row: Row[Any]) -> Built:
    return Built(key=WheelKey.model_validate(row.key), sha256=row.sha256, size=row.size, node=row.node,
                 created=row.created_at.timestamp())  # fmt: skip
