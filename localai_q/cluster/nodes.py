"""What nodes and replicas are, as the registry shows them. Pure values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from localai_q.cluster.memory import Memory
from localai_q.cluster.models import Model
from localai_q.cluster.states import NodeState, ReplicaState

MOST_SLOTS = 64  # replicas of one model on one node


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine that runs replicas."""

    id: str
    name: str
    state: NodeState
    approved: bool
    secret_hash: str
    next_secret_hash: str = ""  # of a secret that it has announced and not used yet
    rotate: bool = False  # it is to make itself a new secret
    version: str = ""
    hardware: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)  # those that it has by what it is, under those it was given
    given_labels: dict[str, str] = field(default_factory=dict)  # by an admin
    last_heartbeat: float | None = None  # seconds since the epoch
    reported: float | None = None  # when it last said what all its replicas do
    report: dict[str, Any] = field(default_factory=dict)  # what it said then, by the replicas' ids
    missed: tuple[str, ...] = ()  # replicas that should have been in that report
    drain: bool = False  # it is to be empty and to stay so, whatever its state is at the moment
    given_budget: str = ""  # how much models may take there, as an admin says; empty: as the node says
    given_slots: int | None = None  # replicas of one model at most, as an admin says; None: as the node says

    @property
    def replica_slots(self) -> int:
        """How many replicas of one model it may have."""
        return replica_slots(self.hardware, self.given_slots)

    @property
    def secret_hashes(self) -> tuple[str, ...]:
        """SHA-256 of every secret by which it is known."""
        return (self.secret_hash, *filter(None, [self.next_secret_hash]))

    @property
    def serving_state(self) -> NodeState:
        """The state of an approved node that reports."""
        return NodeState.DRAINING if self.drain else NodeState.READY

    @property
    def at_work(self) -> bool:
        """Whether others may count on it."""
        return self.state in (NodeState.READY, NodeState.UNHEALTHY, NodeState.DRAINING)


def replica_slots(hardware: dict[str, Any], given: int | None) -> int:
    """How many replicas of one model a node may have: what an admin says goes before what the node says."""
    told = hardware.get("max_replicas_per_model")
    return given or (told if isinstance(told, int) and told > 0 else 1)


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One loaded copy of a model, or one on its way."""

    id: str
    model_id: str
    node_id: str
    number: int
    revision: int
    state: ReplicaState
    slots: int
    speed: float = 0.0  # tokens per second of one answer, as measured of its model on its node; 0: not yet
    reason: str = ""
    job_id: str | None = None
    failures: int = 0
    changed: float = 0.0  # seconds since the epoch
    told: float = 0.0  # when its node was last told again what to do with it
    used: float = 0.0  # when a job of its last ended, to 10 s
    reserved: Memory = field(default_factory=Memory)  # what it needs, as it was booked when it was placed
    unseen: int = 0  # bytes of its RAM that its node does not report as used
    context_size: int = 0  # tokens of one request, where that was cut to fit; 0: as the model has it

    def is_outdated(self, model: Model) -> bool:
        """Whether its model has been changed since it was placed, so that a replica of that is another one."""
        return self.revision < model.revision


def on_nodes(replicas: Iterable[Replica]) -> Mapping[str, list[Replica]]:
    """The replicas of each node, by its id."""
    found: dict[str, list[Replica]] = defaultdict(list)
    for replica in replicas:
        found[replica.node_id].append(replica)
    return found
