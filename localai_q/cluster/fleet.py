"""The cluster as a plan sees it, and as the plan has changed it so far. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from localai_q.cluster.builds import Build
from localai_q.cluster.capacity import (
    WITHOUT_PROCESS,
    Seeker,
    Site,
    Verdict,
    available,
    booking,
    budget,
    disk_free,
    examine,
    is_silent,
    matches,
)
from localai_q.cluster.groups import rivals_of
from localai_q.cluster.models import Model
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.speeds import Speeds
from localai_q.cluster.states import COMING_UP, NodeState, ReplicaState
from localai_q.cluster.wishes import STEP, circumstances

PATIENCE = 5.0  # seconds that a job may wait before its model counts as short of replicas


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Who waits for a model."""

    waiting: int = 0
    late: int = 0  # of these, since more than `PATIENCE`
    longest: float = 0.0  # seconds that the first in line has waited
    pressure: int = 0  # requests that load has lately kept from the replica that had read the beginning of their prompt


NOBODY = Demand()
NOWHERE: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What is there and what is wanted."""

    models: Sequence[Model]
    nodes: Sequence[Node]
    replicas: Sequence[Replica]
    demand: Mapping[str, Demand] = field(default_factory=dict)  # by model id
    busy: Mapping[str, int] = field(default_factory=dict)  # jobs at work, by replica id
    builds: Mapping[str, Collection[Build]] = field(default_factory=dict)  # that there are of a backend, by its name
    speeds: Speeds = field(default_factory=Speeds)  # of models on nodes
    now: float  # seconds since the epoch
    patience: float = math.inf  # seconds since its last heartbeat after which a node gets nothing new

    @cached_property
    def circumstances(self) -> str:
        """What decides for which models there is room."""
        models = [(model.id, model.config) for model in self.models]
        replicas = [(each.id, each.state, each.reserved) for each in self.replicas if each.state not in WITHOUT_PROCESS]
        return circumstances([models, replicas, *map(self._footing, self.nodes)])

    def _footing(self, node: Node) -> tuple[Any, ...]:
        """What of a node decides for which models there is room."""
        room, silent = available(node), is_silent(node, self.now, self.patience)
        coarse = [amount // STEP for amount in (room.ram, room.vram, budget(node), disk_free(node))]
        return (node.id, node.state, silent, sorted(node.labels.items()), node.replica_slots, coarse)


class Board:
    """A fleet, with what a plan has decided so far carried out."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.now = fleet.now
        self.models = {model.id: model for model in fleet.models}
        self.nodes = {node.id: node for node in fleet.nodes}
        self.ready = {node.id for node in fleet.nodes if node.state is NodeState.READY}
        self._alive: dict[str, list[Replica]] = {}  # of models that have not changed since it was asked for
        self._matching: dict[tuple[tuple[str, str], ...], dict[str, None]] = {}  # by selector
        self._seekers: dict[str, Seeker] = {}
        self._sites: dict[str, Site] = {}  # of nodes that have not changed since it was asked for
        self._on_node: dict[str, dict[str, Replica]] = defaultdict(dict)
        self._of_model: dict[str, dict[str, Replica]] = defaultdict(dict)
        for replica in fleet.replicas:
            self._on_node[replica.node_id][replica.id] = replica
            self._of_model[replica.model_id][replica.id] = replica

    def site(self, node_id: str) -> Site:
        """The node with what it has."""
        if node_id not in self._sites:
            self._sites[node_id] = Site(self.nodes[node_id], self._on_node[node_id].values())
        return self._sites[node_id]

    def of(self, model_id: str) -> list[Replica]:
        """The replicas of the model, the oldest first."""
        return list(self._of_model[model_id].values())

    def alive(self, model_id: str) -> list[Replica]:
        """Those that serve, or come up on a node that is ready."""
        if model_id not in self._alive:
            self._alive[model_id] = [
                replica
                for replica in self._of_model[model_id].values()
                if replica.state is ReplicaState.READY or (replica.state in COMING_UP and replica.node_id in self.ready)
            ]
        return self._alive[model_id]

    def matching(self, model: Model) -> Collection[str]:
        """The nodes that are ready and have the labels that the model asks for."""
        selector = tuple(sorted(model.config.selector.items()))
        if selector not in self._matching:
            self._matching[selector] = dict.fromkeys(
                node_id for node_id, node in self.nodes.items() if node_id in self.ready and matches(model, node)
            )
        return self._matching[selector]

    def with_file(self, sha256: str | None) -> Set[str]:
        """The nodes that are ready and have this file."""
        return self._with_file.get(sha256 or "", NOWHERE)

    @cached_property
    def _with_file(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = defaultdict(set)
        for node_id in self.ready:
            for sha256 in self.site(node_id).files:
                found[sha256].add(node_id)
        return found

    def tiers(self) -> list[list[str]]:
        """The nodes that are ready, in groups of those that have equally much to do and equally many replicas, least
        first."""
        return [list(self._tiers[load]) for load in sorted(self._tiers)]

    @cached_property
    def _tiers(self) -> dict[tuple[int, int], set[str]]:
        found: dict[tuple[int, int], set[str]] = defaultdict(set)
        for node_id in self.ready:
            found[self.load(node_id)].add(node_id)
        return found

    def load(self, node_id: str) -> tuple[int, int]:
        """How many jobs are at work on the node, and how many replicas it has."""
        there = self._on_node[node_id]
        return sum(map(self.busy, there)) if self.fleet.busy else 0, len(there)

    def demand(self, model_id: str) -> Demand:
        return self.fleet.demand.get(model_id, NOBODY)

    def busy(self, replica_id: str) -> int:
        return self.fleet.busy.get(replica_id, 0)

    def is_silent(self, node_id: str) -> bool:
        """Whether the node has not reported for so long that it gets nothing new until it does."""
        return is_silent(self.nodes[node_id], self.now, self.fleet.patience)

    def examine(self, model: Model, node_id: str) -> Verdict:
        """Whether a replica of the model can go to the node."""
        if model.id not in self._seekers:
            self._seekers[model.id] = Seeker(model, builds=self.fleet.builds.get(model.config.backend, ()),
                                             rivals=rivals_of(model, self.fleet.models),
                                             patience=self.fleet.patience)  # fmt: skip
        return examine(self._seekers[model.id], self.site(node_id), self.now)

    def change(self, replica: Replica, state: ReplicaState, **values: Any) -> None:
        """Let a replica have another state."""
        self._set(replace(replica, state=state, **values))

    def remove(self, replica: Replica) -> None:
        """Let there be no such replica."""
        before = self.load(replica.node_id)
        del self._on_node[replica.node_id][replica.id]
        del self._of_model[replica.model_id][replica.id]
        self._note_change(replica, before)

    def book(self, model: Model, verdict: Verdict) -> None:
        """Let a replica of the model be placed where the verdict says."""
        number = self.site(verdict.node.id).number(model.id)
        self._set(Replica(id=f"{model.id}@{verdict.node.id}#{number}", model_id=model.id, node_id=verdict.node.id,
                          number=number, revision=model.revision, state=ReplicaState.PLACED,
                          slots=model.config.slots, reserved=booking(model, verdict).memory))  # fmt: skip

    def _set(self, replica: Replica) -> None:
        before = self.load(replica.node_id)
        self._on_node[replica.node_id][replica.id] = replica
        self._of_model[replica.model_id][replica.id] = replica
        self._note_change(replica, before)

    def _note_change(self, replica: Replica, before: tuple[int, int]) -> None:
        """Keep what was found out so far true; `before`: the load of the replica's node until now."""
        if "_tiers" in self.__dict__ and replica.node_id in self._tiers[before]:
            self._tiers[before].discard(replica.node_id)
            self._tiers[self.load(replica.node_id)].add(replica.node_id)
        self._sites.pop(replica.node_id, None)
        self._alive.pop(replica.model_id, None)
