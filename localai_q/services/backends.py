"""Backends on nodes: what is installed where, and changing that, on one node now or on many when they are there."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from localai_q import __version__, names
from localai_q.cluster.backends import (
    MOST_ATTEMPTS,
    REACHABLE,
    Installed,
    Op,
    Step,
    Wish,
    WishState,
    drifts,
    has,
    installed_on,
    next_step,
    outdated,
    pause,
    targets,
)
from localai_q.cluster.builds import Build
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState
from localai_q.errors import Cancelled, Conflict, NotFound
from localai_q.gallery.catalog import BackendEntry, External
from localai_q.services import galleries
from localai_q.services import jobs as job_services
from localai_q.services.wiring import Services
from localai_q.store import backends, jobs, models, nodes
from localai_q.store.engine import clock

log = logging.getLogger(__name__)

MOST_EXTERNAL = 32  # backends that admins give the archive of
ENDED = (WishState.DONE, WishState.DEAD, WishState.CANCELLED)


def request_for(op: Op, name: str, entry: dict[str, Any] | None = None) -> dict[str, Any]:
    """The request of a job on a backend; `entry` as `galleries.record` has it."""
    return {"kind": op.kind, "backend": name, **({"entry": entry} if entry else {})}


def of_node(node: Node) -> list[dict[str, Any]]:
    """What is installed on a node, as it has reported it."""
    return [asdict(found) for found in installed_on(node)]


def listed(services: Services) -> list[dict[str, Any]]:
    """Every backend that some node has, with its nodes, and whether their versions differ."""
    with services.db.transaction() as db:
        known = nodes.every(db)
    where: dict[str, list[tuple[Node, Installed]]] = {}
    for node in known:
        for found in installed_on(node):
            where.setdefault(found.name, []).append((node, found))
    return [_listed(name, where[name]) for name in sorted(where)]


def _listed(name: str, where: list[tuple[Node, Installed]]) -> dict[str, Any]:
    return {
        "name": name,
        "drift": drifts([found for _, found in where]),
        "nodes": [
            {"node_id": node.id, "node_name": node.name, "node_status": node.state,
             "version": found.version, "digest": found.digest, "build": found.build, "installed_at": found.installed_at}
            for node, found in where
        ],
    }  # fmt: skip


def available(services: Services) -> list[dict[str, Any]]:
    """Every backend that can be installed, and on which nodes it is."""
    with services.db.transaction() as db:
        known = nodes.every(db)
    return [
        {"name": entry.name, "gallery": {"name": gallery}, "id": f"{gallery}@{entry.name}", "version": entry.version,
         "description": entry.description, "alias": entry.alias, "capabilities": list(entry.capabilities), "builds": list(entry.builds),
         "most_slots": entry.most_slots,
         "installed": any(has(node, entry.name) for node in known),
         "nodes": [node.name for node in known if has(node, entry.name)]}
        for gallery, entry in galleries.listed(services)
    ]  # fmt: skip


def upgrades(services: Services) -> dict[str, dict[str, Any]]:
    """The backends of which some node has another version than the one that is to be had, in LocalAI's form, by name.

    What comes with this version is upgraded on a node that runs this version: `upgradable`.
    """
    with services.db.transaction() as db:
        known = nodes.every(db)
    found = {entry.name: (entry.version, outdated(entry.name, entry.version, known))
             for entry in galleries.backends(services)}  # fmt: skip
    return {name: _upgrade(name, *told) for name, told in sorted(found.items()) if told[1]}


def _upgrade(name: str, version: str, where: list[tuple[Node, Installed]]) -> dict[str, Any]:
    of_gallery = not galleries.comes_with_us(name)
    return {
        "backend_name": name,
        "installed_version": ", ".join(sorted({found.version for _, found in where})),
        "available_version": version,
        "node_drift": [
            {"node_id": node.id, "node_name": node.name, "version": found.version, "digest": found.digest,
             "upgradable": node.approved and (of_gallery or node.version == __version__)}
            for node, found in where
        ],
    }  # fmt: skip


def check_upgrades(services: Services) -> dict[str, dict[str, Any]]:
    """Read the galleries anew, say which upgrades there are, and make them where a setting says so."""
    galleries.read_anew(services)
    found = upgrades(services)
    for name, told in found.items():
        there = [f"{node['node_name']} ({node['version']})" for node in told["node_drift"]]
        log.info("backend %s %s is to be had: %s", name, told["available_version"], ", ".join(there))
        if services.settings.auto_upgrade:
            _upgrade_where_nothing_is_wanted(services, told)
    return found


def _upgrade_where_nothing_is_wanted(services: Services, told: dict[str, Any]) -> None:
    name = told["backend_name"]
    with services.db.transaction() as db:
        wanted = {wish.node_id for wish in backends.every(db, states=(WishState.OPEN,)) if wish.backend == name}
    due = [node["node_id"] for node in told["node_drift"] if node["upgradable"] and node["node_id"] not in wanted]
    if due:
        change_everywhere(services, Op.UPGRADE, name, only=due)


def change(services: Services, node: Node, op: Op, wanted: str) -> str:
    """Have one node install, upgrade or delete a backend now; the id of the job.

    Args:
        wanted: its name, its alias, or `gallery@name`.

    Raises:
        NotFound: there is no such backend, or the node does not have it.
        Conflict: the node is not there, or nothing of the backend runs on it.
    """
    name, builds, entry = _meant(services, op, wanted)
    _need_able(node, op, name, builds)
    return _submit(services, node.id, op, name, entry)


def _need_able(node: Node, op: Op, name: str, builds: Collection[Build]) -> None:
    if node.state not in REACHABLE:
        raise Conflict(
            f"Node '{node.name}' is {node.state}. POST /backends/apply (localai-q backends {op} {name} --all) waits for it."
        )
    chosen = targets(op, name, builds, [node])
    if not chosen.nodes:
        kind = Conflict if op is Op.INSTALL else NotFound
        raise kind(f"Node '{node.name}' cannot {op} backend '{name}': {chosen.others[node.name]}.")


def _submit(services: Services, node_id: str, op: Op, name: str, entry: dict[str, Any] | None) -> str:
    request = request_for(op, name, entry)
    return job_services.submit_node_job(services, kind=op.kind, node_id=node_id, model_id=None, request=request)


def change_everywhere(
    services: Services, op: Op, wanted: str, *, only: Collection[str] = (), selector: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Have every node that it is for install, upgrade or delete a backend, those that are away when they are back.

    Args:
        wanted: as for `change`.

    Returns:
        The operation, as `operation` shows it.

    Raises:
        NotFound: there is no such backend or node.
        Conflict: it is for no node; the message says why.
    """
    name, builds, entry = _meant(services, op, wanted)
    with services.db.transaction() as db:
        forgotten = op is Op.DELETE and not only and not selector and _forget_external(db, name)
        operation_id = _want(db, op, name, builds, entry, only, selector, may_be_none=forgotten)
    return _begun(services, op, name, operation_id)


def install_external(
    services: Services, given: External, *, only: Collection[str] = (), selector: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Let there be a backend of this archive, in the place of what was given under its name, and have nodes install it.

    Returns:
        The operation, as `operation` shows it.

    Raises:
        NotFound: there is no such node.
        Conflict: its name or alias is another backend's, there are too many, or it is for no node.
    """
    entry = given.entry
    others = galleries.backends(services)
    with services.db.transaction() as db:
        _keep(db, entry, others)
        operation_id = _want(db, Op.INSTALL, entry.name, entry.builds, entry.record, only, selector)
    return _begun(services, Op.INSTALL, entry.name, operation_id)


def install_external_on(services: Services, node: Node, given: External) -> str:
    """Let there be a backend of this archive, as `install_external` does, and have one node install it now; the id of the job.

    Raises:
        NotFound: the node has been removed.
        Conflict: it is not there, or it cannot be such a backend.
    """
    entry, others = given.entry, galleries.backends(services)
    with services.db.transaction() as db:
        there = nodes.lock(db, node.id)  # it may have gone since it was found
        if there is None:
            raise _no_node(node.name)
        _need_able(there, Op.INSTALL, entry.name, entry.builds)
        _keep(db, entry, others)
    return _submit(services, node.id, Op.INSTALL, entry.name, entry.record)


def _keep(db: Any, entry: BackendEntry, others: Sequence[BackendEntry]) -> None:
    """Keep the entry of an archive, unless its name or alias is that of one of the others, or there are too many."""
    own = {name for name in (entry.name, entry.alias) if name}
    there = {record["name"] for record in backends.external(db)}
    for other in others:
        if own & {other.name, other.alias} and not (other.name == entry.name and other.name in there):
            raise Conflict(f"There is a backend '{other.name}' already, by a name of this one: give it another name.")
    if len(there | {entry.name}) > MOST_EXTERNAL:
        raise Conflict(f"There are {MOST_EXTERNAL} such backends: delete one first, or list them in a gallery.")
    backends.keep_external(db, entry.name, entry.model_dump(mode="json"))


def _want(
    db: Any, op: Op, name: str, builds: Collection[Build], entry: dict[str, Any] | None, only: Collection[str],
    selector: Mapping[str, str] | None, *, may_be_none: bool = False,
) -> str:  # fmt: skip
    """Enter what is wanted of a backend for every node that it is for; the id of the operation."""
    known = nodes.every(db)
    if unknown := set(only) - {node.id for node in known} - {node.name for node in known}:
        raise _no_node(min(unknown))
    wished = {wish.node_id for wish in backends.every(db, states=(WishState.OPEN,)) if wish.backend == name}
    chosen = targets(op, name, builds, known, only=only, selector=selector, wished=wished)
    if not chosen.nodes and not may_be_none:
        reasons = "; ".join(f"{node}: {reason}" for node, reason in chosen.others.items())
        raise Conflict(f"No node is to {op} backend '{name}': {reasons or 'there is no node'}.")
    operation_id = names.new_id()
    for node in chosen.nodes:
        backends.want(db, Wish(node_id=node.id, backend=name, op=op, operation=operation_id, entry=entry))
    return operation_id


def _no_node(name: str) -> NotFound:
    return NotFound(f"There is no node '{name}'. 'localai-q nodes list' shows them.")


def _begun(services: Services, op: Op, name: str, operation_id: str) -> dict[str, Any]:
    with services.db.transaction() as db:
        found = backends.every(db, operation=operation_id)
    log.info("%s of backend %s on %d nodes", op, name, len(found), extra={"action": "backends"})
    return _operations(services, found)[0] if found else _operation(operation_id, op, name, [], {}, {})


def _forget_external(db: Any, name: str) -> bool:
    """Forget what was given under this name, unless models need it; False if it is none of these backends."""
    if not backends.forget_external(db, name):
        return False
    if users := [model.name for model in models.every(db) if model.config.backend == name]:
        raise Conflict(f"The backend '{name}' is that of {len(users)} models, as of '{users[0]}': remove them first, or give "
                       "them another backend.")  # fmt: skip
    return True


def operation(services: Services, operation_id: str) -> dict[str, Any]:
    """How far a request for many nodes is.

    Raises:
        NotFound: there is none of that id, or later ones have taken its place on all of its nodes.
    """
    with services.db.transaction() as db:
        found = backends.every(db, operation=operation_id)
    if not found:
        raise NotFound(f"There is no operation '{operation_id}'.")
    return _operations(services, found)[0]


def operations(services: Services) -> list[dict[str, Any]]:
    """Every request for many nodes that is remembered, the oldest first."""
    with services.db.transaction() as db:
        found = backends.every(db)
    return _operations(services, found)


def give_up(services: Services, operation_id: str) -> dict[str, Any]:
    """Take back what of a request for many nodes is not done yet.

    Raises:
        NotFound: there is none of that id.
    """
    operation(services, operation_id)
    with services.db.transaction() as db:
        found = backends.every(db, states=(WishState.OPEN,), operation=operation_id)
        for wish in found:
            backends.note(db, wish, state=WishState.CANCELLED)
        begun = [job for wish in found if wish.job_id and (job := jobs.by_id(db, wish.job_id))]
    for job in begun:
        job_services.abort(services, job, Cancelled(), state=JobState.CANCELLED)
    return operation(services, operation_id)


def dismiss(services: Services, operation_id: str) -> None:
    """Forget what has ended of a request for many nodes.

    Raises:
        NotFound: there is none of that id.
        Conflict: nothing of it has ended.
    """
    operation(services, operation_id)
    with services.db.transaction() as db:
        if not backends.dismiss(db, operation_id):
            raise Conflict(f"Nothing of operation '{operation_id}' has ended: cancel it first.")


def fulfil(services: Services) -> None:
    """Take every wish one step further."""
    with services.db.transaction() as db:
        found = backends.every(db, states=(WishState.OPEN,))
        reachable = {node.id for node in nodes.every(db) if node.state in REACHABLE}
        begun = {wish.job_id: jobs.by_id(db, wish.job_id) for wish in found if wish.job_id}
        now = clock(db)
    for wish in found:
        job = begun.get(wish.job_id or "")
        step = next_step(wish, job, reachable=wish.node_id in reachable, now=now)
        _take(services, wish, step, str((job.error or {}).get("message", "")) if job else "")


def prune(services: Services, *, days: int) -> None:
    """Forget wishes that ended long ago."""
    with services.db.transaction() as db:
        backends.forget_ended(db, days=days)


def _take(services: Services, wish: Wish, step: Step, error: str) -> None:
    values: dict[str, Any]
    match step:
        case Step.WAIT:
            return
        case Step.BEGIN:
            values = {"job_id": _submit(services, wish.node_id, wish.op, wish.backend, wish.entry)}
        case Step.DONE:
            values = {"state": WishState.DONE, "last_error": "", "job_id": None}
        case Step.CANCELLED:
            values = {"state": WishState.CANCELLED, "last_error": error, "job_id": None}
        case Step.AGAIN:
            values = {"job_id": None, "last_error": error}
        case Step.FAILED:
            attempts = wish.attempts + 1
            dead = attempts >= MOST_ATTEMPTS
            values = {"job_id": None, "last_error": error, "attempts": attempts, "pause": pause(attempts),
                      "state": WishState.DEAD if dead else WishState.OPEN}  # fmt: skip
            log.warning("%s of backend %s on node %s failed (%d of %d): %s",
                        wish.op, wish.backend, wish.node_id, attempts, MOST_ATTEMPTS, error)  # fmt: skip
    with services.db.transaction() as db:
        backends.note(db, wish, **values)


def _meant(services: Services, op: Op, wanted: str) -> tuple[str, Collection[Build], dict[str, Any] | None]:
    """The name of the backend that is called so, with its builds and its entry as `galleries.record` has it.

    What is to be deleted needs neither, and may be in no gallery any more.
    """
    try:
        found = galleries.backend(services, wanted)
    except NotFound:
        name = wanted.rpartition("@")[2]
        if op is not Op.DELETE or name in galleries.named(services):
            raise
        return name, (), None
    if op is Op.DELETE:
        return found.name, (), None
    return found.name, found.builds, None if galleries.comes_with_us(found.name) else found.record


def _operations(services: Services, found: list[Wish]) -> list[dict[str, Any]]:
    with services.db.transaction() as db:
        known = {node.id: node for node in nodes.every(db)}
    found = [wish for wish in found if wish.node_id in known]  # others have gone with their node since
    progress = job_services.percentages(services, [wish.job_id for wish in found if wish.job_id])
    by_id: dict[str, list[Wish]] = {}
    for wish in found:
        by_id.setdefault(wish.operation, []).append(wish)
    return [_operation(key, wishes[0].op, wishes[0].backend, wishes, known, progress) for key, wishes in by_id.items()]


def _operation(
    operation_id: str, op: Op, name: str, wishes: list[Wish], known: dict[str, Node], progress: dict[str, float]
) -> dict[str, Any]:
    """A request for many nodes: LocalAI's names of what is known of a job, and what is on each node."""
    parts = [100.0 if wish.state in ENDED else progress.get(wish.job_id or "", 0.0) for wish in wishes]
    errors = [f"{known[wish.node_id].name}: {wish.last_error}" for wish in wishes if wish.last_error]
    ended = sum(wish.state in ENDED for wish in wishes)
    path = f"/backends/jobs/{operation_id}"
    return {
        "uuid": operation_id,
        "id": operation_id,
        "status": path,
        "status_url": path,
        "gallery_element_name": name,
        "op": op,
        "deletion": op is Op.DELETE,
        "processed": ended == len(wishes),
        "cancelled": any(wish.state is WishState.CANCELLED for wish in wishes),
        "progress": round(sum(parts) / len(parts), 1) if parts else 100.0,
        "message": f"{op} of {name}: {ended} of {len(wishes)} nodes",
        "error": "; ".join(errors) or None,
        "nodes": [
            {"node_id": wish.node_id, "node_name": known[wish.node_id].name, "status": wish.state,
             "percentage": part, "error": wish.last_error or None, "attempts": wish.attempts,
             "next_try": wish.next_try if wish.attempts and wish.state is WishState.OPEN else None, "job": wish.job_id,
             "away": known[wish.node_id].state not in REACHABLE}
            for wish, part in zip(wishes, parts, strict=True)
        ],
    }  # fmt: skip
