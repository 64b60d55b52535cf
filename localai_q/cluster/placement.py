"""Where replicas should be, given what is there and what is wanted. Pure.

The decision, in order:

1. A replica of a model that has changed since it was placed is stopped.
2. A failed replica is tried again once its back-off is over.
3. A model that is to be everywhere gets a replica on each ready node that has none.
4. A model that somebody waits for and that nothing serves gets one replica, on the ready node with the fewest. Where one
   has failed for the first time, its next try comes sooner than a load elsewhere.
5. A model that somebody waits for, that nothing serves and whose replicas failed again and again is given up for those
   who wait. A first failure is only tried again: those in line did nothing to deserve an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from localai_q.cluster.models import Model
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.states import COMING_UP, NodeState, ReplicaState

BACKOFF_FIRST = 1.0  # seconds
BACKOFF_MOST = 300.0
GIVE_UP = 2  # failures in a row


@dataclass(frozen=True, kw_only=True)
class Place:
    """Put a replica of the model on the node."""

    model_id: str
    node_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Bring a failed replica up again."""

    replica_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Stop:
    """End a replica once it has finished what it holds."""

    replica_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class GiveUp:
    """Tell those who wait for the model that it cannot be had."""

    model_id: str
    reason: str


Action = Place | Retry | Stop | GiveUp


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(BACKOFF_FIRST * 2.0 ** max(failures - 1, 0), BACKOFF_MOST)


def hopeless(replica: Replica) -> bool:
    """Whether a replica has failed so often that nobody should wait for its next try."""
    return replica.state is ReplicaState.FAILED and replica.failures >= GIVE_UP


def cooling(replica: Replica, now: float) -> bool:
    """Whether a failed replica must not be tried again yet. `now`: seconds since the epoch."""
    return replica.state is ReplicaState.FAILED and now < replica.changed + backoff(replica.failures)


def plan(
    models: Sequence[Model], nodes: Sequence[Node], replicas: Sequence[Replica], waiting: Mapping[str, int], now: float
) -> list[Action]:
    """What to do now. `waiting`: jobs in line by model id; `now`: seconds since the epoch."""
    ready = [node for node in nodes if node.state is NodeState.READY]
    load = Counter(replica.node_id for replica in replicas)
    actions: list[Action] = []
    for model in models:
        own = [replica for replica in replicas if replica.model_id == model.id]
        actions += _outdated(model, own)
        actions += _of_model(model, ready, own, load, waiting.get(model.id, 0), now)
    return actions


def _outdated(model: Model, own: Sequence[Replica]) -> list[Action]:
    stale = [r for r in own if r.revision != model.revision and r.state is ReplicaState.READY]
    return [Stop(replica_id=r.id, reason=f"model {model.name} was changed") for r in stale]


def _of_model(
    model: Model, ready: Sequence[Node], own: Sequence[Replica], load: Counter[str], waiting: int, now: float
) -> list[Action]:
    ready_ids = {node.id for node in ready}
    alive = [r for r in own if r.state is ReplicaState.READY or (r.state in COMING_UP and r.node_id in ready_ids)]
    wanted = model.config.spread_all or (waiting > 0 and not alive)
    if not wanted:
        return []
    failed = [replica for replica in own if replica.state is ReplicaState.FAILED]
    actions: list[Action] = [
        Retry(replica_id=replica.id, reason=f"try {replica.failures + 1}")
        for replica in failed
        if replica.node_id in ready_ids and not cooling(replica, now)
    ]
    taken = {replica.node_id for replica in own}
    free = sorted((node for node in ready if node.id not in taken), key=lambda node: (load[node.id], node.name))
    if model.config.spread_all:
        chosen, reason = free, "one on every ready node"
    else:
        returning = any(r.node_id in ready_ids and not hopeless(r) for r in failed)
        chosen, reason = ([] if actions or returning else free[:1]), f"{waiting} waiting, none loaded"
    for node in chosen:
        load[node.id] += 1
        actions.append(Place(model_id=model.id, node_id=node.id, reason=reason))
    coming = any(r.state in COMING_UP for r in own)  # even on a node that is away: it may be back
    if waiting and not alive and not coming and not actions and any(map(hopeless, failed)):
        actions.append(GiveUp(model_id=model.id, reason=failed[-1].reason))
    return actions
