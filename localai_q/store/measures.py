"""Queries on what was measured of models on nodes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, Select, func, select
from sqlalchemy.dialects.postgresql import insert as upsert

from localai_q.cluster.speeds import Measure
from localai_q.store.tables import measures

NOTED_EVERY = 60.0  # seconds between two notes of a model on a node


def every(db: Connection, *, node_ids: Collection[str] | None = None) -> list[Measure]:
    """All measures, or those of these nodes."""
    query = select(measures)
    return _read(db, query if node_ids is None else query.where(measures.c.node_id.in_(list(node_ids))))


def fresh(db: Connection, node_id: str) -> list[Measure]:
    """What was noted of the node's models less than `NOTED_EVERY` ago."""
    limit = func.now() - func.make_interval(0, 0, 0, 0, 0, 0, NOTED_EVERY)
    return _read(db, select(measures).where(measures.c.node_id == node_id, measures.c.updated_at > limit))


def note(db: Connection, measure: Measure) -> None:
    """Keep what was measured; what was not stays as it was."""
    values = {"node_id": measure.node_id, "model_id": measure.model_id, "tokens_per_second": measure.tokens_per_second,
              "load_seconds": measure.load_seconds}  # fmt: skip
    made = upsert(measures).values(values)
    kept = {
        name: func.coalesce(func.nullif(made.excluded[name], 0.0), measures.c[name])
        for name in ("tokens_per_second", "load_seconds")
    }
    db.execute(
        made.on_conflict_do_update(index_elements=["node_id", "model_id"], set_={**kept, "updated_at": func.now()})
    )


def _read(db: Connection, query: Select[Any]) -> list[Measure]:
    return [
        Measure(node_id=row.node_id, model_id=row.model_id, tokens_per_second=row.tokens_per_second,
                load_seconds=row.load_seconds)
        for row in db.execute(query)
    ]  # fmt: skip
