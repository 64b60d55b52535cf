"""All nodes, as an admin sees them: what each runs, and what a draining one still has to finish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from localai_q import names
from localai_q.cluster.models import Model
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.states import NodeState
from localai_q.errors import Unavailable
from localai_q.services import nodes as node_services
from localai_q.services.wiring import Services
from localai_q.store import models, nodes, replicas


def listed(services: Services) -> list[dict[str, Any]]:
    """Every node with its replicas. What they hold is None while Redis cannot tell."""
    with services.db.transaction() as db:
        found = nodes.every(db)
    return _shown(services, found)


def show(services: Services, id_or_name: str) -> dict[str, Any]:
    """One node, as `listed` shows it.

    Raises:
        NotFound: there is none of that id or name.
    """
    return _shown(services, [node_services.named(services, id_or_name)])[0]


def loaded_models(services: Services) -> list[dict[str, Any]]:
    """Which node has which model in which state, one record for each replica."""
    return [
        {"model": replica["model"], "node": node["name"], "node_id": node["id"],
         **{name: value for name, value in replica.items() if name != "model"}}
        for node in listed(services) for replica in node["replicas"]
    ]  # fmt: skip


def _shown(services: Services, found: list[Node]) -> list[dict[str, Any]]:
    with services.db.transaction() as db:
        every = replicas.every(db)
        by_id = {model.id: model for model in models.every(db)}
    held = _held(services, every, found)
    return [
        _one(node, [r for r in every if r.node_id == node.id and r.model_id in by_id], by_id, held) for node in found
    ]


def _one(node: Node, own: list[Replica], by_id: Mapping[str, Model], held: Mapping[str, int] | None) -> dict[str, Any]:
    record = asdict(node)
    record.pop("secret_hash")
    shown = [{"id": r.id, "model": by_id[r.model_id].name, "number": r.number, "state": r.state, "slots": r.slots,
              "in_flight": held.get(r.id, 0) if held is not None else None, "reason": r.reason} for r in own]  # fmt: skip
    in_flight = sum(held.get(owner, 0) for owner in (node.id, *(r.id for r in own))) if held is not None else None
    remains = {"replicas": len(own), "in_flight": in_flight} if node.state is NodeState.DRAINING else None
    return {**record, "in_flight": in_flight, "remains": remains, "replicas": shown}


def _held(services: Services, every: list[Replica], found: list[Node]) -> dict[str, int] | None:
    """How many jobs each replica holds, and each node of its own, by id."""
    try:
        generations = services.leases.held_by_owner(sorted({names.model_queue(replica.model_id) for replica in every}))
        own = {node.id: services.leases.held(names.node_jobs_queue(node.id)) for node in found}
    except Unavailable:
        return None
    return {**generations, **own}
