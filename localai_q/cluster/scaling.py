"""How many replicas a model should have. Pure.

As many as `min_replicas`, and one more than none when somebody waits. One more than there are when too many wait for too
long, or when load keeps requests from the replicas that have read the beginning of their prompts; one less when a
replica was not used for `idle_timeout`. Where a model is to be on every node, as many as there are nodes. Where it was
changed, as many new ones as there are old ones that still end.
"""

from __future__ import annotations

import math
from collections import Counter

from localai_q.cluster.capacity import limit
from localai_q.cluster.fleet import PATIENCE, Board
from localai_q.cluster.models import Model
from localai_q.cluster.nodes import Replica
from localai_q.cluster.states import COMING_UP, ReplicaState

PRESSURE = 0.5  # jobs that wait too long, for each slot, from which on a model gets one more replica
DIVERTED = 1.0  # requests kept from where their beginning was read, for each slot, from which on it does, too


def last_used(replica: Replica) -> float:
    """When a ready replica was last of use, in seconds since the epoch; one that was not yet, when it became ready."""
    return max(replica.used, replica.changed)


def wanted(board: Board, model: Model) -> tuple[int, str]:
    """How many replicas the model should have, and why."""
    config, demand = model.config, board.demand(model.id)
    if config.spread_all:
        return len(board.matching(model)), "one on every ready node"
    least, why = _least(board, model)
    alive = board.alive(model.id)
    may_grow = least <= len(alive) < config.max_replicas
    if may_grow and _is_short(board, model, alive):
        return len(alive) + 1, f"{demand.late} waited longer than {PATIENCE:.0f} s for {len(alive)} replicas"
    if may_grow and 0 < DIVERTED * _settled_slots(board, alive) <= demand.pressure:
        return len(alive) + 1, f"load kept {demand.pressure} requests from the replica that had read their beginning"
    if demand.waiting and not least:
        return 1, f"{demand.waiting} waiting, none loaded"
    return least, why


def surplus(board: Board, model: Model) -> list[tuple[Replica, str]]:
    """The replicas that should go because the model may not have so many, there or at all, and why.

    Those go that are missed least, in this order: first what has not come up, then what has nothing to do, the longest unused first.
    """
    alive, most = board.alive(model.id), _most(model)
    crowded = {
        node_id: allowed
        for node_id, count in Counter(replica.node_id for replica in alive).items()
        if count > 1 and node_id in board.nodes and count > (allowed := limit(model, board.nodes[node_id]))
    }
    if len(alive) <= most and not crowded:
        return []
    kept: Counter[str] = Counter()
    going = []
    for replica in sorted(alive, key=lambda replica: _worth(board, replica), reverse=True):
        there = replica.node_id
        if kept.total() >= most:
            going.append((replica, f"max_replicas is {most}"))
        elif kept[there] >= crowded.get(there, math.inf):
            going.append((replica, f"node {board.nodes[there].name} may have {crowded[there]} of model {model.name}"))
        else:
            kept[there] += 1
    return going[::-1]


def is_complete(board: Board, model: Model) -> bool:
    """Whether the model may not have one more."""
    return len(board.alive(model.id)) >= _most(model)


def superfluous(board: Board, model: Model) -> Replica | None:
    """A replica that should go because it was not used for long."""
    timeout, alive = model.config.idle_timeout, board.alive(model.id)
    if not timeout or board.demand(model.id).waiting or len(alive) <= _least(board, model)[0]:
        return None
    idle = [
        replica
        for replica in alive
        if replica.state is ReplicaState.READY
        and not board.busy(replica.id)
        and board.now - last_used(replica) >= timeout
    ]
    return min(idle, key=last_used, default=None)


def _most(model: Model) -> float:
    """How many replicas the model may have at all."""
    return math.inf if model.config.spread_all else model.config.max_replicas


def _worth(board: Board, replica: Replica) -> tuple[int, int, float, str]:
    """By how much a replica would be missed."""
    progress = (*COMING_UP, ReplicaState.READY).index(replica.state)
    return progress, board.busy(replica.id), last_used(replica), replica.id


def _least(board: Board, model: Model) -> tuple[int, str]:
    """How many replicas the model should have whoever asks, and why."""
    least, most = model.config.min_replicas, model.config.max_replicas
    outgoing = min(sum(replica.is_outdated(model) for replica in board.of(model.id)), most)
    return (outgoing, "those of an old revision end") if outgoing > least else (least, f"min_replicas is {least}")


def _is_short(board: Board, model: Model, alive: list[Replica]) -> bool:
    """Whether the replicas leave too many waiting."""
    slots = _settled_slots(board, alive)
    return bool(slots) and board.demand(model.id).late >= PRESSURE * slots


def _settled_slots(board: Board, alive: list[Replica]) -> int:
    """The slots of the replicas, if all of them had time to show what they do; else 0."""
    settled = all(each.state is ReplicaState.READY and board.now - each.changed >= PATIENCE for each in alive)
    return sum(each.slots for each in alive) if settled else 0
