"""The secret that a node has made for itself: one private file, which each of its processes reads whenever it connects.

So a new secret needs no restart. It goes from one to the next in steps, after each of which the node may die:

1. `prepare`: the next one is on the disk. 2. It is announced to the API, and both count. 3. `adopt`: the node uses the
next one, and keeps the one before. 4. The API sees the next one used and withdraws the one before. 5. `settle`: the node
forgets that.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from pathlib import Path
from typing import Any

from localai_q.config import write_private
from localai_q.errors import StartupError


class Identity:
    """A node's file of secrets; made if it is not there.

    Raises:
        StartupError: it can be neither read nor made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.secret()
        except FileNotFoundError:
            self._make()
        except (OSError, ValueError) as error:
            raise StartupError(
                f"cannot read this node's identity in {path}: {error}. Delete it to register anew."
            ) from error

    def secret(self) -> str:
        """What the node is known by now."""
        return str(self._read()["secret"])

    @property
    def hash(self) -> str:
        """The SHA-256 of that."""
        return digest(self.secret())

    @property
    def hashes(self) -> tuple[str, ...]:
        """The SHA-256 of every secret by which the API may know it at this moment."""
        found = self._read()
        return tuple(digest(found[name]) for name in ("secret", "next", "before") if found.get(name))

    @property
    def begun(self) -> bool:
        """Whether there is a next secret that is not used yet."""
        return "next" in self._read()

    def older_than(self, days: float) -> bool:
        found = self._read()
        since = found.get("since", self.path.stat().st_mtime)
        return time.time() - float(since) > days * 24 * 3600

    def prepare(self) -> str:
        """Have a next secret; its SHA-256, to be announced."""
        found = self._read()
        if "next" not in found:
            found["next"] = secrets.token_urlsafe(32)
            self._write(found)
        return digest(found["next"])

    def adopt(self) -> None:
        """Use the next secret: the API has it."""
        found = self._read()
        self._write({"secret": found["next"], "before": found["secret"], "since": time.time()})

    def settle(self) -> None:
        """Forget the secret before: the API has answered to this one."""
        found = self._read()
        if found.pop("before", None):
            self._write(found)

    def fall_back(self) -> bool:
        """Use the other secret of the two: the API does not know this one. False if there is none."""
        found = self._read()
        other = found.get("before") or found.get("next")
        if other:
            self._write({"secret": other, "next": found["secret"], "since": time.time()})
        return bool(other)

    def _make(self) -> None:
        try:
            self._write({"secret": secrets.token_urlsafe(32), "since": time.time()})
        except OSError as error:
            raise StartupError(
                f"cannot write {self.path}: {error.strerror}. Set LOCALAI_Q_HOME to a folder of yours."
            ) from error

    def _read(self) -> dict[str, Any]:
        found: Any = json.loads(self.path.read_text())
        if not isinstance(found, dict) or not isinstance(found.get("secret"), str) or not found["secret"]:
            raise ValueError("it has no secret")
        return found

    def _write(self, record: dict[str, Any]) -> None:
        write_private(self.path, json.dumps(record))


def digest(secret: str) -> str:
    """By what the API knows a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()
