"""How a draining node becomes empty. Pure.

What has not come up yet is dropped, what has is stopped, which lets it finish what it holds. A node without replicas is
drained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from localai_q.cluster.nodes import Node, Replica, on_nodes
from localai_q.cluster.placement import Drop, Stop, ending
from localai_q.cluster.states import NodeState, ReplicaState


@dataclass(frozen=True, kw_only=True)
class Drained:
    """Nothing is left on the node."""

    node_id: str


def plan_drains(nodes: Sequence[Node], replicas: Sequence[Replica]) -> list[Stop | Drop | Drained]:
    """What to do now for the nodes that are draining."""
    actions: list[Stop | Drop | Drained] = []
    there = on_nodes(replicas)
    for node in nodes:
        if node.state is NodeState.DRAINING:
            own = there[node.id]
            actions += [
                ending(replica, f"node {node.name} is draining")
                for replica in own
                if replica.state is not ReplicaState.STOPPING
            ]
            actions += [] if own else [Drained(node_id=node.id)]
    return actions
