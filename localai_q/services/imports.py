"""Models from the files that lie on a node: it is asked which there are, and to take some of them into its store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from localai_q.cluster.backends import REACHABLE
from localai_q.cluster.nodes import Node
from localai_q.errors import Conflict
from localai_q.services.jobs import submit_node_job
from localai_q.services.wiring import Services


def scan(services: Services, node: Node, folder: str) -> str:
    """Have a node list its GGUF files; the id of the job, whose result `workers.node.imports.listed` describes.

    Raises:
        Conflict: the node is not there.
    """
    return _submit(services, node, "scan_files", {"folder": folder, "name": folder})


def bring(services: Services, node: Node, files: Sequence[str]) -> str:
    """Have a node take files into its store, so that it has them as if it had fetched them; the id of the job.

    Raises:
        Conflict: the node is not there.
    """
    return _submit(services, node, "import_files", {"files": list(files), "name": files[0]})


def _submit(services: Services, node: Node, kind: str, request: dict[str, Any]) -> str:
    if node.state not in REACHABLE:
        raise Conflict(f"Node '{node.name}' is {node.state}: its files can be looked at when it is back.")
    return submit_node_job(services, kind=kind, node_id=node.id, model_id=None, request={"kind": kind, **request})
