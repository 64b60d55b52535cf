"""Queries on quantizations."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from localai_q.cluster.quantizing import Failure, Quantization, Spec
from localai_q.cluster.states import QUANTIZATION_MOVES, JobState, sources
from localai_q.names import new_id
from localai_q.store.tables import quantizations as rows


def add(db: Connection, name: str, spec: Spec) -> str:
    """Enter an open one; its id."""
    made = new_id()
    db.execute(insert(rows).values(id=made, name=name, state=JobState.OPEN, spec=spec.model_dump(mode="json")))
    return made


def count(db: Connection) -> int:
    return int(db.execute(select(func.count()).select_from(rows)).scalar_one())


def by_id(db: Connection, quantization_id: str) -> Quantization | None:
    row = db.execute(select(rows).where(rows.c.id == quantization_id)).one_or_none()
    return _quantization(row) if row else None


def every(db: Connection, *, states: Collection[JobState] = ()) -> list[Quantization]:
    """The newest first."""
    query = select(rows).order_by(rows.c.created_at.desc(), rows.c.id)
    if states:
        query = query.where(rows.c.state.in_(list(states)))
    return [_quantization(row) for row in db.execute(query)]


def files(db: Connection) -> frozenset[str]:
    """The SHA-256 of all files that some quantization needs."""
    return frozenset().union(*(one.files for one in every(db)))


def note(db: Connection, one: Quantization, **values: Any) -> bool:
    """Change what is known of an open quantization. False if it has ended, or has another job by now."""
    if "failures" in values:
        values["failures"] = [asdict(failure) for failure in values["failures"]]
    same = (rows.c.id == one.id) & (rows.c.state == JobState.OPEN) & rows.c.job_id.is_not_distinct_from(one.job_id)
    return db.execute(update(rows).where(same).values(values)).rowcount == 1


def end(db: Connection, quantization_id: str, state: JobState, **values: Any) -> bool:
    """End a quantization; False if it has ended before."""
    values |= {"job_id": None, "reasons": {}, "ended_at": func.now()}
    return _move(db, quantization_id, state, values)


def reopen(db: Connection, quantization_id: str) -> bool:
    """Open one anew that has failed or was stopped; False of any other."""
    return _move(db, quantization_id, JobState.OPEN, {"node_id": None, "failures": [], "error": "", "ended_at": None})


def note_import(db: Connection, quantization_id: str, name: str) -> None:
    """Note the name of the model that was made of the result."""
    db.execute(update(rows).where(rows.c.id == quantization_id).values(imported=name))


def forget_output(db: Connection, quantization_id: str) -> None:
    """Note that what had come of it is not kept."""
    db.execute(update(rows).where(rows.c.id == quantization_id).values(output=None))


def remove(db: Connection, quantization_id: str) -> None:
    db.execute(delete(rows).where(rows.c.id == quantization_id))


def _move(db: Connection, quantization_id: str, state: JobState, values: dict[str, Any]) -> bool:
    movable = (rows.c.id == quantization_id) & rows.c.state.in_(sources(QUANTIZATION_MOVES, state))
    return db.execute(update(rows).where(movable).values(state=state, **values)).rowcount == 1


def _quantization(row: Row[Any]) -> Quantization:
    values = dict(row._mapping)
    created, ended = values.pop("created_at"), values.pop("ended_at")
    values |= {"state": JobState(values["state"]), "spec": Spec.model_validate(values["spec"]),
               "failures": tuple(Failure(**failure) for failure in values["failures"])}  # fmt: skip
    return Quantization(**values, created=created.timestamp(), ended=ended.timestamp() if ended else None)
