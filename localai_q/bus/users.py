"""The users that nodes are on Redis. Owns the commands that make, extend and remove them.

Users live in Redis' memory only: a restart loses them, and control makes them anew (`localai_q.services.node_users`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import redis

from localai_q import names
from localai_q.cluster.rights import COMMANDS, SPEAKS_ON

log = logging.getLogger(__name__)


class NotAllowed(Exception):
    """This Redis does not let us make users."""


def make(client: redis.Redis, node_id: str, hashes: Collection[str], rights: Collection[str]) -> None:
    """A user with the node's own secrets, by their SHA-256, and just these rights, whatever it had before.

    Raises:
        NotAllowed: see there.
    """
    _call(client, "ACL", "SETUSER", names.node_user(node_id), "reset", *_rules(hashes, rights))


def extend(client: redis.Redis, node_id: str, hashes: Collection[str], rights: Collection[str]) -> None:
    """The same with just these secrets, and these rights besides those that it has: what it works on may need those.

    Raises:
        NotAllowed: see there.
    """
    _call(client, "ACL", "SETUSER", names.node_user(node_id), *_rules(hashes, rights))


def cut(client: redis.Redis, node_id: str) -> None:
    """End the user's connections: they outlive the secret that they were made with.

    Raises:
        NotAllowed: see there.
    """
    _call(client, "CLIENT", "KILL", "USER", names.node_user(node_id))


def remove(client: redis.Redis, node_id: str) -> None:
    """Forget the user, and cut its connections.

    Raises:
        NotAllowed: see there.
    """
    _call(client, "ACL", "DELUSER", names.node_user(node_id))


def known(client: redis.Redis) -> dict[str, frozenset[str]]:
    """The rules of every node's user, by the node's id.

    Raises:
        NotAllowed: see there.
    """
    words = [line.split() for line in _call(client, "ACL", "LIST")]
    prefix = names.node_user("")
    return {user.removeprefix(prefix): frozenset(rules) for _, user, *rules in words if user.startswith(prefix)}


def _rules(hashes: Collection[str], rights: Collection[str]) -> list[str]:
    speaks = " ".join(f"&{channel}" for channel in SPEAKS_ON)
    own = [f"#{each}" for each in hashes]
    return ["on", "resetpass", *own, "-@all", *COMMANDS, *sorted(rights), "clearselectors", f"(+publish {speaks})"]


def _call(client: redis.Redis, *words: str) -> Any:
    try:
        return client.execute_command(*words)  # type: ignore[no-untyped-call]
    except redis.exceptions.NoPermissionError as error:
        raise NotAllowed(str(error)) from error
    except redis.ResponseError as error:
        if "unknown command" in str(error).lower():
            raise NotAllowed(str(error)) from error
        raise
