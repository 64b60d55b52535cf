"""Nodes as an admin sees them, and what he says of them: labels and limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from localai_q import names
from localai_q.cluster import capacity
from localai_q.cluster.labels import MOST_LABELS, found_labels
from localai_q.cluster.models import Model
from localai_q.cluster.nodes import Node, Replica, on_nodes
from localai_q.cluster.states import NodeState
from localai_q.errors import InvalidValue, NotFound, Unavailable
from localai_q.services import nodes as node_services
from localai_q.services.wiring import Services
from localai_q.store import models, nodes, replicas

INNER = (
    "secret_hash",
    "next_secret_hash",
    "given_budget",
    "given_slots",
    "report",
    "missed",
)  # of a node, nobody is shown


def listed(services: Services) -> list[dict[str, Any]]:
    """Every node with its replicas. While Redis cannot tell what they hold, that of a replica is what its node said last,
    and that of a node None."""
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


def labels(services: Services, id_or_name: str) -> dict[str, Any]:
    """A node's `labels`, and what they are made of: those `found` by itself, and over these those `given` by an admin.

    Raises:
        NotFound: there is no such node.
    """
    return _labels_of(node_services.named(services, id_or_name))


def give_labels(services: Services, id_or_name: str, new: dict[str, str], *, keep: bool) -> dict[str, Any]:
    """Give a node these labels, instead of those it was given or, with `keep`, besides them. Answers like `labels`.

    Raises:
        NotFound: there is no such node.
        InvalidValue: it would have too many.
    """
    return _relabel(services, id_or_name, lambda given: {**(given if keep else {}), **new})


def take_label(services: Services, id_or_name: str, key: str) -> dict[str, Any]:
    """Take a label back that a node was given. Answers like `labels`.

    Raises:
        NotFound: there is no such node, or it was not given that label.
    """

    def without(given: dict[str, str]) -> dict[str, str]:
        if key not in given:
            raise NotFound(f"Nobody gave node '{id_or_name}' a label '{key}'.")
        return {name: value for name, value in given.items() if name != key}

    return _relabel(services, id_or_name, without)


def limits(services: Services, id_or_name: str) -> dict[str, Any]:
    """What a node may hold, with LocalAI's names: `max_replicas_per_model`, `vram_budget` (an admin's words, or empty),
    `vram_budget_bytes` (None where nobody knows), and `…_manually_set` of what an admin says.

    Raises:
        NotFound: there is no such node.
    """
    return _limits_of(node_services.named(services, id_or_name))


def limit(services: Services, id_or_name: str, name: str, value: str | int | None) -> dict[str, Any]:
    """Have an admin's word go before the node's own, or no more with "" or None. Answers like `limits`.

    Args:
        name: `vram_budget` (an `Amount`) or `max_replicas_per_model`.

    Raises:
        NotFound: there is no such node.
    """
    node_id = node_services.named(services, id_or_name).id
    with services.db.transaction() as db:
        nodes.set_limit(db, node_id, name, value)
    services.redis.publish(names.WAKE_CHANNEL, node_id)
    return limits(services, node_id)


def _limits_of(node: Node) -> dict[str, Any]:
    budget = capacity.budget(node)
    return {
        "max_replicas_per_model": node.replica_slots,
        "max_replicas_per_model_manually_set": node.given_slots is not None,
        "vram_budget": node.given_budget,
        "vram_budget_bytes": budget if budget < capacity.UNLIMITED else None,
        "vram_budget_manually_set": bool(node.given_budget),
    }


def _relabel(services: Services, id_or_name: str, change: Callable[[dict[str, str]], dict[str, str]]) -> dict[str, Any]:
    node_id = node_services.named(services, id_or_name).id
    with services.db.transaction() as db:
        node = nodes.lock(db, node_id)
        if node is None:
            raise NotFound(f"Node '{id_or_name}' was deleted.")
        given = change(node.given_labels)
        if len(given) > MOST_LABELS:
            raise InvalidValue(f"A node can be given {MOST_LABELS} labels.", param="labels")
        nodes.set_labels(db, node_id, given)
    services.redis.publish(names.WAKE_CHANNEL, node_id)
    return labels(services, node_id)


def _labels_of(node: Node) -> dict[str, Any]:
    return {
        "labels": node.labels,
        "found": found_labels(node.name, node.hardware, node.replica_slots),
        "given": node.given_labels,
    }


def _shown(services: Services, found: list[Node]) -> list[dict[str, Any]]:
    with services.db.transaction() as db:
        every = replicas.every(db)
        by_id = {model.id: model for model in models.every(db)}
    held, there = _held(services, every, found), on_nodes(r for r in every if r.model_id in by_id)
    return [_one(node, there[node.id], by_id, held) for node in found]


def _one(node: Node, own: list[Replica], by_id: Mapping[str, Model], held: Mapping[str, int] | None) -> dict[str, Any]:
    record = {name: value for name, value in asdict(node).items() if name not in INNER}
    shown = [{"id": r.id, "model": by_id[r.model_id].name, "number": r.number, "state": r.state, "slots": r.slots,
              "reason": r.reason, "memory": asdict(r.reserved), **_figures(node, r, held)} for r in own]  # fmt: skip
    in_flight = sum(held.get(owner, 0) for owner in (node.id, *(r.id for r in own))) if held is not None else None
    remains = {"replicas": len(own), "in_flight": in_flight} if node.state is NodeState.DRAINING else None
    return {**record, **_limits_of(node), "in_flight": in_flight, "remains": remains, "replicas": shown}


def _figures(node: Node, replica: Replica, held: Mapping[str, int] | None) -> dict[str, Any]:
    """What the replica holds and what was measured of it, and when its node last said that it lives; None: it never did."""
    said = node.report.get(replica.id)
    told = said["in_flight"] if said else None
    return {
        "in_flight": told if held is None else held.get(replica.id, 0),
        "tokens_per_second": replica.speed,
        "load_seconds": said["load_seconds"] if said else 0.0,
        "reported": node.reported if said else None,
    }


def _held(services: Services, every: list[Replica], found: list[Node]) -> dict[str, int] | None:
    """How many jobs each replica holds, and each node of its own, by id."""
    try:
        generations = services.leases.owners(sorted({names.model_queue(replica.model_id) for replica in every}))
        own = {node.id: services.leases.held(names.node_jobs_queue(node.id)) for node in found}
    except Unavailable:
        return None
    return {**generations, **own}
