"""How a draining node becomes empty: one decision for each state of its replicas."""

import pytest

from localai_q.cluster.draining import Drained, plan_drains
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.placement import Drop, Stop
from localai_q.cluster.states import REPLICA_MOVES, NodeState, ReplicaState


def node(state: NodeState, name: str = "n1") -> Node:
    return Node(id=name, name=name, state=state, approved=True, secret_hash="")


def replica(state: ReplicaState, at: str = "n1") -> Replica:
    return Replica(id=f"{at}-{state}", model_id="m", node_id=at, number=1, revision=1, state=state, slots=1)


@pytest.mark.parametrize("state", sorted(set(NodeState) - {NodeState.DRAINING}))
def test_nodes_in_other_states_are_left_alone(state: NodeState) -> None:
    assert plan_drains([node(state)], [replica(each) for each in ReplicaState]) == []


@pytest.mark.parametrize("state", [ReplicaState.READY, ReplicaState.LOADING])
def test_what_has_a_process_is_stopped(state: ReplicaState) -> None:
    (action,) = plan_drains([node(NodeState.DRAINING)], [replica(state), replica(state, at="n2")])
    assert action == Stop(replica_id=f"n1-{state}", reason="node n1 is draining")
    assert ReplicaState.STOPPING in REPLICA_MOVES[state]


@pytest.mark.parametrize(
    "state", [ReplicaState.PLACED, ReplicaState.INSTALLING, ReplicaState.STAGING, ReplicaState.FAILED]
)
def test_what_has_no_process_is_dropped(state: ReplicaState) -> None:
    (action,) = plan_drains([node(NodeState.DRAINING)], [replica(state)])
    assert action == Drop(replica_id=f"n1-{state}", reason="node n1 is draining")


def test_a_node_is_drained_when_no_replica_is_left_and_not_while_one_is_stopping() -> None:
    draining = node(NodeState.DRAINING)
    assert plan_drains([draining], [replica(ReplicaState.STOPPING)]) == []
    assert plan_drains([draining], [replica(ReplicaState.READY, at="n2")]) == [Drained(node_id="n1")]
