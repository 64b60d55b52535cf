"""The states of nodes, replicas and jobs, and the moves between them. Pure; the stores enforce it by compare-and-set."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

State = TypeVar("State", bound=StrEnum)


class NodeState(StrEnum):
    PENDING = "pending"  # asked to join, waits for an admin
    READY = "ready"  # takes work
    UNHEALTHY = "unhealthy"  # has not been heard of for a while
    DRAINING = "draining"  # finishes what it has
    DRAINED = "drained"  # has finished, takes nothing new
    OFFLINE = "offline"  # has gone


class ReplicaState(StrEnum):
    PLACED = "placed"  # a node has been chosen
    INSTALLING = "installing"  # the node installs the backend
    STAGING = "staging"  # the node fetches the model's file
    LOADING = "loading"  # the backend loads the model
    READY = "ready"  # takes requests
    STOPPING = "stopping"  # finishes what it has, then ends
    GONE = "gone"  # its process has ended
    FAILED = "failed"  # could not be brought up, or died


class JobState(StrEnum):
    OPEN = "open"  # accepted, not ended; who works on it stands in its lease
    DONE = "done"
    FAILED = "failed"  # with a reason
    CANCELLED = "cancelled"


NODE_MOVES: dict[NodeState, frozenset[NodeState]] = {
    NodeState.PENDING: frozenset({NodeState.READY, NodeState.OFFLINE}),
    NodeState.READY: frozenset({NodeState.UNHEALTHY, NodeState.DRAINING, NodeState.OFFLINE}),
    NodeState.UNHEALTHY: frozenset({NodeState.READY, NodeState.DRAINING, NodeState.OFFLINE}),
    NodeState.DRAINING: frozenset({NodeState.DRAINED, NodeState.READY, NodeState.OFFLINE}),
    NodeState.DRAINED: frozenset({NodeState.READY, NodeState.OFFLINE}),
    NodeState.OFFLINE: frozenset({NodeState.READY, NodeState.DRAINING}),
}

COMING_UP = (ReplicaState.PLACED, ReplicaState.INSTALLING, ReplicaState.STAGING, ReplicaState.LOADING)

REPLICA_MOVES: dict[ReplicaState, frozenset[ReplicaState]] = {
    ReplicaState.PLACED: frozenset({ReplicaState.INSTALLING, ReplicaState.FAILED, ReplicaState.GONE}),
    ReplicaState.INSTALLING: frozenset(
        {ReplicaState.STAGING, ReplicaState.LOADING, ReplicaState.FAILED, ReplicaState.GONE}
    ),
    ReplicaState.STAGING: frozenset({ReplicaState.LOADING, ReplicaState.FAILED, ReplicaState.GONE}),
    ReplicaState.LOADING: frozenset(
        {ReplicaState.READY, ReplicaState.STOPPING, ReplicaState.FAILED, ReplicaState.GONE}
    ),
    ReplicaState.READY: frozenset({ReplicaState.STOPPING, ReplicaState.FAILED, ReplicaState.GONE}),
    ReplicaState.STOPPING: frozenset({ReplicaState.GONE, ReplicaState.FAILED}),
    ReplicaState.FAILED: frozenset({ReplicaState.PLACED, ReplicaState.LOADING, ReplicaState.GONE}),
    ReplicaState.GONE: frozenset(),
}

JOB_MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.OPEN: frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED}),
    JobState.DONE: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}

QUANTIZATION_MOVES: dict[JobState, frozenset[JobState]] = {  # it stays the same one when it is tried again
    **JOB_MOVES,
    JobState.FAILED: frozenset({JobState.OPEN}),
    JobState.CANCELLED: frozenset({JobState.OPEN}),
}


def sources(moves: Mapping[State, frozenset[State]], target: State) -> list[State]:
    """The states from which a move to `target` is allowed."""
    return [state for state, targets in moves.items() if target in targets]
