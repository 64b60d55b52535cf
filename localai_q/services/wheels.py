"""Wheels that nodes have compiled for others: taken from those that an admin has labelled, told to all, shown, forgotten.

The files lie in the API's store of uploads. A wheel is kept as long as some backend that can be installed needs it.
"""

from __future__ import annotations

import logging
from typing import IO, Any

from localai_q.cluster.builders import LABEL, MAKE, awaited, is_builder
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState
from localai_q.cluster.wheels import Built, WheelKey
from localai_q.errors import Conflict, Forbidden, InvalidValue, NotFound
from localai_q.gallery.catalog import BackendEntry
from localai_q.services import galleries, jobs, models, uploads
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from localai_q.store import nodes, wheels

log = logging.getLogger(__name__)

MOST = 1000
LOOKED_AT = 1000  # open jobs


def told(services: Services, asker: Node, digest: str, backend: str) -> dict[str, Any]:
    """What a node is told that needs the wheel of a key for a backend.

    Returns `{"wheel": {"sha256", "size", "node"} or None, "builder": whether it may give others what it compiles,
    "awaited": {"node", "percentage"} of the builder that may be compiling it now, or None}`.
    """
    with services.db.transaction() as db:
        built = wheels.by_digest(db, digest)
        known = nodes.every(db)
        making = job_rows.listed(db, states=[JobState.OPEN], kinds=MAKE, limit=LOOKED_AT)
    found = None if built else awaited(asker, backend, known, making)
    percentages = jobs.percentages(services, [found[1].id]) if found else {}
    return {
        "wheel": {"sha256": built.sha256, "size": built.size, "node": built.node} if built else None,
        "builder": is_builder(asker),
        "awaited": {"node": found[0].name, "percentage": percentages.get(found[1].id, 0.0)} if found else None,
    }


def take(
    services: Services, giver: Node, digest: str, key: WheelKey, sha256: str, stream: IO[bytes], chunk: uploads.Chunk
) -> uploads.Received:
    """Keep what a builder has compiled, once all of it has come; the first that was given of a key stays.

    Raises:
        Forbidden: the node has no such label from an admin.
        InvalidValue: the key is another one, or the content is not what its SHA-256 says.
        Conflict: no backend needs it, or there are too many.
        BodyTooLarge, WrongOffset, Unavailable: as `uploads.receive` has it.
    """
    if not is_builder(giver):
        raise Forbidden(
            f"Node '{giver.name}' may not give wheels to others. To let it: localai-q nodes label {giver.name} {LABEL}=true"
        )
    if key.digest != digest:
        raise InvalidValue("The wheel's key is not the one of the path.", param="key")
    entries = galleries.backends(services)
    if not _needed_by(key, entries):
        raise Conflict(f"No backend needs {key.package} {key.version} compiled like that.")
    with services.db.transaction() as db:
        before, count = wheels.by_digest(db, digest), len(wheels.contents(db))
    if before and uploads.path_of(services, before.sha256).exists():
        return uploads.Received(size=before.size, whole=True)
    if count >= MOST:
        raise Conflict(f"There are {count} wheels already: 'localai-q backends wheels' shows them.")
    received = uploads.receive(services, sha256, stream, chunk)
    if not received.whole:
        return received
    built = Built(key=key, sha256=sha256, size=received.size, node=giver.name)
    with services.db.transaction() as db:
        before = wheels.by_digest(db, digest)
        wheels.put(db, built)
    if before and before.sha256 != sha256:
        models.forget_stored(services, {before.sha256})
    log.info("node %s gave the wheel %s", giver.name, key.filename, extra={"action": "wheel"})
    return received


def listed(services: Services) -> list[dict[str, Any]]:
    """Every wheel, with the backends that need it."""
    entries = galleries.backends(services)
    with services.db.transaction() as db:
        found = wheels.every(db)
    return [_shown(built, entries) for built in found]


def remove(services: Services, digest: str) -> None:
    """Forget a wheel: who needs it compiles it, and a builder gives another.

    Raises:
        NotFound: there is none of this key.
    """
    with services.db.transaction() as db:
        built = wheels.by_digest(db, digest)
        wheels.remove(db, digest)
    if built is None:
        raise NotFound(f"There is no wheel '{digest}'. 'localai-q backends wheels' shows them.")
    models.forget_stored(services, {built.sha256})


def tidy(services: Services) -> None:
    """Forget wheels that no backend needs any more; none, while there is a gallery that cannot be read."""
    if any(gallery["error"] for gallery in galleries.shown(services)):
        return
    entries = galleries.backends(services)
    with services.db.transaction() as db:
        unneeded = [built for built in wheels.every(db) if not _needed_by(built.key, entries)]
        for built in unneeded:
            wheels.remove(db, built.key.digest)
    for built in unneeded:
        log.info("no backend needs the wheel %s any more", built.key.filename, extra={"action": "wheel"})
    models.forget_stored(services, {built.sha256 for built in unneeded})


def _needed_by(key: WheelKey, entries: list[BackendEntry]) -> list[str]:
    """The backends of which a build has such a package compiled."""
    return [
        entry.name
        for entry in entries
        for build, made in entry.builds.items()
        for package in made.compiled
        if (package.name, package.version, package.settings, build)
        == (key.package, key.version, key.settings, key.build)
    ]


def _shown(built: Built, entries: list[BackendEntry]) -> dict[str, Any]:
    return {"id": built.key.digest, **built.key.model_dump(), "sha256": built.sha256, "size": built.size,
            "node": built.node, "created": built.created, "backends": _needed_by(built.key, entries)}  # fmt: skip
