"""Who may call what. Every blueprint names its guard here; a route without one answers nobody."""

from __future__ import annotations

from collections.abc import Callable

from flask import g, request

from api.web import web
from localai_q.errors import Forbidden, NotFound, Unauthenticated
from localai_q.services import nodes


def anyone() -> None:
    """Public."""


def any_key() -> None:
    """A valid key of either role."""
    g.key = web().authenticator.authenticate(request.headers.get("Authorization"))


def admin_key() -> None:
    """A valid admin key."""
    any_key()
    if g.key.role != "admin":
        raise Forbidden("This needs an admin key. 'localai-q keys create --admin NAME' makes one.")


def node_secret() -> None:
    """The secret of the node that the path names."""
    scheme, _, secret = (request.headers.get("Authorization") or "").partition(" ")
    if scheme.lower() != "bearer" or not secret:
        raise Unauthenticated("A node calls this with its own secret.")
    node_id = str((request.view_args or {}).get("node_id", ""))
    g.node = nodes.authenticate(web().services, node_id, secret)


GUARDS: dict[str, Callable[[], None]] = {
    "public": anyone,
    "openai_v1": any_key,
    "openai": any_key,
    "jobs": any_key,
    "loads": any_key,
    "admin": admin_key,
    "backends": admin_key,
    "quantization": admin_key,
    "models": admin_key,
    "node": node_secret,
}


def guard() -> None:
    """Let a request pass, or raise. Runs before every view."""
    if request.routing_exception is not None:
        return  # no such path or method: that is the answer, and it needs no key
    found = GUARDS.get(request.blueprint or "")
    if found is None:
        raise NotFound
    found()
