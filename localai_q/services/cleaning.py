"""Files on nodes: those that no model names, and that are no wheels, are removed, on nodes that were away as soon as they
report."""

from __future__ import annotations

import logging
from collections.abc import Set
from typing import Any

from localai_q import names
from localai_q.cluster.disk import is_due, unnamed
from localai_q.cluster.jobs import Job
from localai_q.cluster.models import Model
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import NodeState
from localai_q.errors import Conflict
from localai_q.services import wheels as wheel_services
from localai_q.services.jobs import submit_node_job
from localai_q.services.wiring import Services
from localai_q.store import jobs, models, nodes, quantizations, wheels
from localai_q.store.engine import clock

log = logging.getLogger(__name__)

KIND = "clean_models"
REACHABLE = (NodeState.READY, NodeState.DRAINING, NodeState.DRAINED)
LOOKED_AT = 20  # cleanings of a node, to find one that was no dry run


def tidy(services: Services) -> None:
    """Have every node that reports remove what no model names. Wheels that no backend needs count as such from now on."""
    wheel_services.tidy(services)
    grace = services.settings.clean_grace
    with services.db.transaction() as db:
        known, others, now = models.every(db), _others(db), clock(db)
        found = [(node, _unnamed(node, known, others)) for node in nodes.every(db) if node.state in REACHABLE]
        due = [(node, files) for node, files in found if is_due(files, _last(db, node), grace=grace, now=now)]
    for node, files in due:
        job_id = _submit(services, node, dry_run=False)
        log.info("node %s is to remove %d files that no model names: job %s", node.name, len(files), job_id,
                 extra={"action": "clean"})  # fmt: skip


def clean(services: Services, node: Node, *, dry_run: bool) -> dict[str, Any]:
    """Have a node remove what no model names, now. Returns `{"job", "files", "dry_run"}`; the job's result lists them.

    Raises:
        Conflict: the node is not there.
    """
    if node.state not in REACHABLE:
        raise Conflict(f"Node '{node.name}' is {node.state}: it is cleaned when it is back.")
    files = unnamed_on(services, node)
    return {"job": _submit(services, node, dry_run=dry_run), "files": len(files), "dry_run": dry_run}


def unnamed_on(services: Services, node: Node) -> list[str]:
    """The files, by SHA-256, that the node has told of and no model names."""
    with services.db.transaction() as db:
        return _unnamed(node, models.every(db), _others(db))


def _others(db: Any) -> Set[str]:
    """Files that are needed besides those of models."""
    return quantizations.files(db) | wheels.contents(db)


def _unnamed(node: Node, known: list[Model], others: Set[str]) -> list[str]:
    return unnamed(node.hardware.get("files") or (), known, others)


def _last(db: Any, node: Node) -> Job | None:
    found = jobs.newest(db, kind=KIND, line=names.node_jobs_queue(node.id), limit=LOOKED_AT)
    return next((job for job in found if not (job.result or {}).get("dry_run")), None)


def _submit(services: Services, node: Node, *, dry_run: bool) -> str:
    """Have the node clean. Which files that concerns it asks when it begins, for by then other models may be there."""
    settings = services.settings
    request = {"kind": KIND, "grace": settings.clean_grace, "floor": settings.disk_spare, "dry_run": dry_run}
    return submit_node_job(services, kind=KIND, node_id=node.id, model_id=None, request=request)
