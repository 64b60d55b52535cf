"""What is done once in the life of a database."""

from __future__ import annotations

from sqlalchemy import Connection
from sqlalchemy.dialects.postgresql import insert as upsert

from localai_q.store.tables import marks


def first_time(db: Connection, name: str) -> bool:
    """Mark this as done. False if it was before; who asks meanwhile waits for the end of this transaction."""
    return db.execute(upsert(marks).values(name=name).on_conflict_do_nothing()).rowcount == 1
