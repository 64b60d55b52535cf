"""Queries on API keys. Keys themselves are never stored, only their SHA-256."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from localai_q.names import new_id
from localai_q.store.tables import api_keys

LOCK = 0x10CA1A2  # advisory lock of those who make the admin key
PREFIX = "lai-"  # as LocalAI's keys begin


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """Who may call the API, and as what."""

    id: str
    name: str
    role: str  # admin | user
    hint: str
    created: float
    revoked: float | None = None


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def create(db: Connection, *, name: str, role: str) -> tuple[ApiKey, str]:
    """Make a key; it is shown this once."""
    key = PREFIX + secrets.token_urlsafe(32)
    values = {"id": new_id(), "name": name, "role": role, "hash": digest(key), "hint": key[:8]}
    row = db.execute(insert(api_keys).values(values).returning(api_keys)).one()
    return _key(row), key


def find(db: Connection, key: str) -> ApiKey | None:
    """The valid key with this text."""
    query = select(api_keys).where(api_keys.c.hash == digest(key), api_keys.c.revoked_at.is_(None))
    row = db.execute(query).one_or_none()
    return _key(row) if row else None


def every(db: Connection) -> list[ApiKey]:
    return [_key(row) for row in db.execute(select(api_keys).order_by(api_keys.c.created_at))]


def revoke(db: Connection, key_id: str) -> bool:
    """Make a key invalid. False if there is no valid key of that id."""
    statement = (
        update(api_keys).where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None)).values(revoked_at=func.now())
    )
    return db.execute(statement).rowcount == 1


def revoke_admins_named(db: Connection, name: str) -> None:
    """Make every valid admin key of that name invalid."""
    named = (api_keys.c.name == name, api_keys.c.role == "admin", api_keys.c.revoked_at.is_(None))
    db.execute(update(api_keys).where(*named).values(revoked_at=func.now()))


def lock(db: Connection) -> None:
    """Let no other transaction that asks for this decide about admin keys before this one has ended."""
    db.execute(select(func.pg_advisory_xact_lock(LOCK)))


def admins(db: Connection) -> int:
    """How many valid admin keys there are."""
    query = select(func.count()).where(api_keys.c.role == "admin", api_keys.c.revoked_at.is_(None))
    return int(db.execute(query).scalar_one())


def _key(row: Row[Any]) -> ApiKey:
    return ApiKey(
        id=row.id,
        name=row.name,
        role=row.role,
        hint=row.hint,
        created=row.created_at.timestamp(),
        revoked=row.revoked_at.timestamp() if row.revoked_at else None,
    )
