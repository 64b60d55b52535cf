"""Nodes that compile for others: who is one, and whom to wait for. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from localai_q.cluster.jobs import Job
from localai_q.cluster.nodes import Node

LABEL = "builder"
MAKE = ("install_backend", "upgrade_backend")  # kinds of jobs that compile
NO = ("false", "no", "0")


def is_builder(node: Node) -> bool:
    """Whether an admin has labelled the node so; what a node says of itself does not count."""
    return node.given_labels.get(LABEL, NO[0]).lower() not in NO


def awaited(asker: Node, backend: str, known: Sequence[Node], open_jobs: Sequence[Job]) -> tuple[Node, Job] | None:
    """The builder that makes a backend at this moment, on a machine like the asker's, and its job.

    Whether what it compiles is just what the asker needs shows when it is done; then nobody is waited for any more. A
    builder waits for nobody, so that no two wait for each other.

    Args:
        open_jobs: jobs that have not ended, without their requests.
    """
    if is_builder(asker):
        return None
    by_id = {node.id: node for node in known if is_builder(node) and node.at_work and _is_like(node, asker)}
    for job in open_jobs:
        if job.kind in MAKE and job.subject == backend and job.node_id in by_id:
            return by_id[job.node_id], job
    return None


def _is_like(node: Node, other: Node) -> bool:
    return all(node.hardware.get(what) == other.hardware.get(what) for what in ("os", "arch"))
