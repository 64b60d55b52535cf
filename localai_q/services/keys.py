"""API keys: who may call, and the admin key that the first start makes."""

from __future__ import annotations

import time
from pathlib import Path

from localai_q.config import write_private
from localai_q.errors import BadKey, Conflict, InvalidValue, NotFound, Unauthenticated, Unavailable
from localai_q.services.wiring import Services
from localai_q.store import keys
from localai_q.store.keys import ApiKey

REMEMBERED = 5.0  # seconds for which a process believes in a key without asking; so long may a revoked key still serve
MOST_REMEMBERED = 10_000
ADMIN_NAME = "admin"  # of the generated key, and of no other


class Authenticator:
    """Checks keys, and remembers the answer for a moment."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._known: dict[str, tuple[float, ApiKey]] = {}

    def authenticate(self, header: str | None) -> ApiKey:
        """Who sent this `Authorization` header.

        Raises:
            Unauthenticated: there is none.
            BadKey: it names no valid key.
        """
        scheme, _, key = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated
        wanted = keys.digest(key.strip())
        known = self._known.get(wanted)
        if known and known[0] > time.monotonic():
            return known[1]
        try:
            with self._services.db.transaction() as db:
                found = keys.find(db, key.strip())
        except Unavailable:
            if known is None:
                raise
            found = known[1]  # nobody can have revoked it since Postgres went away
        if found is None:
            self._known.pop(wanted, None)
            raise BadKey(f"Incorrect API key provided: {key.strip()[:4]}…")
        if len(self._known) >= MOST_REMEMBERED:
            self._known.clear()
        self._known[wanted] = (time.monotonic() + REMEMBERED, found)
        return found


def admin_key_file(home: Path) -> Path:
    """Where the generated admin key lies."""
    return home / "admin.key"


def ensure_admin(services: Services) -> None:
    """Make the admin key at the first start, and leave it in its file.

    The file is written before the commit: after a crash between the two there is no admin, and the next start makes one.
    """
    with services.db.transaction() as db:
        keys.lock(db)
        if keys.admins(db) == 0:
            _, key = keys.create(db, name=ADMIN_NAME, role="admin")
            write_private(admin_key_file(services.settings.home), key + "\n")


def reset_admin(services: Services) -> Path:
    """Make a new generated admin key in place of the old one, and return the file in which it lies."""
    path = admin_key_file(services.settings.home)
    with services.db.transaction() as db:
        keys.lock(db)
        keys.revoke_admins_named(db, ADMIN_NAME)
        _, key = keys.create(db, name=ADMIN_NAME, role="admin")
        write_private(path, key + "\n")
    return path


def create(services: Services, *, name: str, role: str) -> tuple[ApiKey, str]:
    """A new key, with the text that is shown this once.

    Raises:
        InvalidValue: the name is that of the generated admin key, which 'keys reset-admin' replaces.
    """
    if name == ADMIN_NAME:
        raise InvalidValue(f"The name '{ADMIN_NAME}' belongs to the generated admin key. Choose another.", param="name")
    with services.db.transaction() as db:
        return keys.create(db, name=name, role=role)


def listed(services: Services) -> list[ApiKey]:
    with services.db.transaction() as db:
        return keys.every(db)


def revoke(services: Services, key_id: str) -> None:
    """Make a key invalid.

    Raises:
        NotFound: there is no valid key of that id.
        Conflict: it is the last admin key.
    """
    with services.db.transaction() as db:
        found = next((key for key in keys.every(db) if key.id == key_id and not key.revoked), None)
        if found is None:
            raise NotFound(f"There is no valid key '{key_id}'. 'localai-q keys list' shows them.")
        if found.role == "admin" and keys.admins(db) == 1:
            raise Conflict("This is the last admin key. Create another one first, or run 'localai-q keys reset-admin'.")
        keys.revoke(db, key_id)
