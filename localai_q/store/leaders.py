"""Which control process leads which loop, and when each loop was last seen at work."""

from __future__ import annotations

from sqlalchemy import Connection, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from localai_q.store.tables import leaders


def lead(db: Connection, loop: str, owner: str, *, seconds: float, beat: bool = True) -> bool:
    """Take or keep the lead of a loop for so long, and note that it works. False if another process has it."""
    until = func.now() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)
    values = {"loop": loop, "owner": owner, "until": until, "beat_at": func.now()}
    statement = upsert(leaders).values(values)
    statement = statement.on_conflict_do_update(
        index_elements=[leaders.c.loop],
        set_={"owner": owner, "until": until} | ({"beat_at": func.now()} if beat else {}),
        where=or_(leaders.c.owner == owner, leaders.c.until < func.now()),
    )
    return db.execute(statement).rowcount == 1


def retire(db: Connection, owner: str) -> None:
    """Give up every lead, so that another process need not wait."""
    db.execute(update(leaders).where(leaders.c.owner == owner).values(until=func.now()))


def ages(db: Connection) -> dict[str, float]:
    """Seconds since each loop was last seen at work."""
    age = func.extract("epoch", func.now() - leaders.c.beat_at)
    return {loop: float(seconds) for loop, seconds in db.execute(select(leaders.c.loop, age))}
