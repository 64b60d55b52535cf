"""Queries on what is wanted of backends on nodes, and on those that admins have given the archive of."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, Row, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from localai_q.cluster.backends import Op, Wish, WishState
from localai_q.store.tables import backend_wishes as wishes
from localai_q.store.tables import external_backends as externals


def want(db: Connection, wish: Wish) -> None:
    """Enter a wish in the place of one for the same backend on the same node."""
    values = {"node_id": wish.node_id, "backend": wish.backend, "op": wish.op, "operation": wish.operation,
              "entry": wish.entry, "state": WishState.OPEN, "attempts": 0, "last_error": "", "job_id": None,
              "next_try": func.now(), "created_at": func.now()}  # fmt: skip
    keys = [wishes.c.node_id, wishes.c.backend]
    db.execute(upsert(wishes).values(values).on_conflict_do_update(index_elements=keys, set_=values))


def every(db: Connection, *, states: Collection[WishState] = (), operation: str | None = None) -> list[Wish]:
    """Wishes, the oldest first."""
    query = select(wishes).order_by(wishes.c.created_at, wishes.c.node_id, wishes.c.backend)
    if states:
        query = query.where(wishes.c.state.in_(list(states)))
    if operation is not None:
        query = query.where(wishes.c.operation == operation)
    return [_wish(row) for row in db.execute(query)]


def note(db: Connection, wish: Wish, *, pause: float | None = None, **values: Any) -> bool:
    """Change what is known of an open wish; it is tried again after `pause` seconds. False if it is another by now."""
    if pause is not None:
        values["next_try"] = func.now() + func.make_interval(0, 0, 0, 0, 0, 0, pause)
    same = (wishes.c.node_id == wish.node_id) & (wishes.c.backend == wish.backend)
    same &= (wishes.c.operation == wish.operation) & (wishes.c.state == WishState.OPEN)
    return db.execute(update(wishes).where(same).values(values)).rowcount == 1


def forget_ended(db: Connection, *, days: int) -> int:
    """Delete wishes that were fulfilled or taken back, and are so old. One that was given up stays to be seen."""
    limit = func.now() - func.make_interval(0, 0, 0, days)
    ended = wishes.c.state.in_([WishState.DONE, WishState.CANCELLED])
    return db.execute(delete(wishes).where(ended, wishes.c.created_at < limit)).rowcount


def dismiss(db: Connection, operation: str) -> int:
    """Delete what has ended of a request for many nodes; how many wishes."""
    ended = wishes.c.state != WishState.OPEN
    return db.execute(delete(wishes).where(wishes.c.operation == operation, ended)).rowcount


def external(db: Connection) -> list[dict[str, Any]]:
    """The entries that admins have given, the oldest first."""
    return list(db.execute(select(externals.c.entry).order_by(externals.c.created_at, externals.c.name)).scalars())


def keep_external(db: Connection, name: str, entry: dict[str, Any]) -> None:
    """Keep an entry, in the place of one of that name."""
    statement = upsert(externals).values(name=name, entry=entry)
    db.execute(statement.on_conflict_do_update(index_elements=[externals.c.name], set_={"entry": entry}))


def forget_external(db: Connection, name: str) -> bool:
    """Delete an entry; False if there is none of that name."""
    return db.execute(delete(externals).where(externals.c.name == name)).rowcount == 1


def _wish(row: Row[Any]) -> Wish:
    values = dict(row._mapping)
    created, next_try = values.pop("created_at").timestamp(), values.pop("next_try").timestamp()
    values |= {"op": Op(values["op"]), "state": WishState(values["state"])}
    return Wish(**values, created=created, next_try=next_try)
