"""The cluster as a plan sees it, and as the plan has changed it so far. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from localai_q.cluster.capacity import Verdict, booking, examine
from localai_q.cluster.models import Model
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.states import COMING_UP, NodeState, ReplicaState

PATIENCE = 5.0  # seconds that a job may wait before its model counts as short of replicas


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Who waits for a model."""

    waiting: int = 0
    late: int = 0  # of these, since more than `PATIENCE`
    longest: float = 0.0  # seconds that the first in line has waited


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What is there and what is wanted."""

    models: Sequence[Model]
    nodes: Sequence[Node]
    replicas: Sequence[Replica]
    demand: Mapping[str, Demand] = field(default_factory=dict)  # by model id
    busy: Mapping[str, int] = field(default_factory=dict)  # jobs at work, by replica id
    gpu_backends: frozenset[str] = frozenset()  # that use a node's GPUs
    now: float  # seconds since the epoch


class Board:
    """A fleet, with what a plan has decided so far carried out."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.now = fleet.now
        self.models = {model.id: model for model in fleet.models}
        self.nodes = {node.id: node for node in fleet.nodes}
        self.ready = {node.id for node in fleet.nodes if node.state is NodeState.READY}
        self._replicas = {replica.id: replica for replica in fleet.replicas}
        self._alive: dict[str, list[Replica]] = {}  # of models that have not changed since it was asked for
        self._on_node: dict[str, list[str]] = defaultdict(list)
        self._of_model: dict[str, list[str]] = defaultdict(list)
        for replica in fleet.replicas:
            self._on_node[replica.node_id].append(replica.id)
            self._of_model[replica.model_id].append(replica.id)

    def there(self, node_id: str) -> list[Replica]:
        """What the node has, the oldest first."""
        return [self._replicas[replica_id] for replica_id in self._on_node[node_id]]

    def of(self, model_id: str) -> list[Replica]:
        """The replicas of the model, the oldest first."""
        return [self._replicas[replica_id] for replica_id in self._of_model[model_id]]

    def alive(self, model_id: str) -> list[Replica]:
        """Those that serve, or come up on a node that is ready."""
        if model_id not in self._alive:
            self._alive[model_id] = [
                replica
                for replica in self.of(model_id)
                if replica.state is ReplicaState.READY or (replica.state in COMING_UP and replica.node_id in self.ready)
            ]
        return self._alive[model_id]

    def demand(self, model_id: str) -> Demand:
        return self.fleet.demand.get(model_id, Demand())

    def busy(self, replica_id: str) -> int:
        return self.fleet.busy.get(replica_id, 0)

    def examine(self, model: Model, node: Node) -> Verdict:
        gpu = model.config.backend in self.fleet.gpu_backends
        return examine(model, node, self.there(node.id), gpu=gpu, now=self.now)

    def change(self, replica: Replica, state: ReplicaState, **values: Any) -> None:
        """Let a replica have another state."""
        self._replicas[replica.id] = replace(replica, state=state, **values)
        self._alive.pop(replica.model_id, None)

    def book(self, model: Model, verdict: Verdict) -> None:
        """Let a replica of the model be placed where the verdict says."""
        made = Replica(id=f"{model.id}@{verdict.node.id}", model_id=model.id, node_id=verdict.node.id, number=1,
                       revision=model.revision, state=ReplicaState.PLACED, slots=model.config.slots,
                       reserved=booking(model, verdict).memory)  # fmt: skip
        self._replicas[made.id] = made
        self._on_node[made.node_id].append(made.id)
        self._of_model[made.model_id].append(made.id)
        self._alive.pop(made.model_id, None)
