"""How many replicas a model gets when load keeps requests from those that have read the beginning of their prompts."""

import pytest

from localai_q.cluster.fleet import PATIENCE, Board, Demand, Fleet
from localai_q.cluster.models import Model, ModelConfig
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.scaling import wanted
from localai_q.cluster.states import NodeState, ReplicaState

NOW = 10_000.0
OLD = PATIENCE


def replica(number: int, state: ReplicaState = ReplicaState.READY, age: float = OLD) -> Replica:
    return Replica(id=f"r{number}", model_id="m", node_id=f"n{number}", number=1, revision=1, state=state, slots=4,
                   changed=NOW - age)  # fmt: skip


def asked_for(replicas: list[Replica], *, pressure: int, **config: object) -> tuple[int, str]:
    model = Model(id="m", name="m", revision=1, config=ModelConfig(backend="echo", **config))
    nodes = [Node(id=each.node_id, name=each.node_id, state=NodeState.READY, approved=True, secret_hash="")
             for each in replicas]  # fmt: skip
    demand = {"m": Demand(pressure=pressure)}
    return wanted(Board(Fleet(models=[model], nodes=nodes, replicas=replicas, demand=demand, now=NOW)), model)


@pytest.mark.parametrize(
    ("case", "replicas", "pressure", "most", "count"),
    [
        ("one more", [replica(1), replica(2)], 8, 5, 3),
        ("fewer than there are slots", [replica(1), replica(2)], 7, 5, 0),
        ("one at a time, however many", [replica(1), replica(2)], 900, 5, 3),
        ("nobody was kept", [replica(1), replica(2)], 0, 5, 0),
        ("no more than the most", [replica(1), replica(2)], 9, 2, 0),
        ("one comes up", [replica(1), replica(2, ReplicaState.LOADING)], 9, 5, 0),
        ("one has just come", [replica(1), replica(2, age=OLD - 1)], 9, 5, 0),
        ("none is loaded", [], 9, 5, 0),
    ],
)
def test_pressure_asks_for_one_more(case: str, replicas: list[Replica], pressure: int, most: int, count: int) -> None:
    found, why = asked_for(replicas, pressure=pressure, max_replicas=most)
    assert found == count
    assert (f"kept {pressure} requests" in why) == bool(count)


def test_one_on_every_node_is_enough() -> None:
    assert asked_for([replica(1)], pressure=5, spread_all=True)[0] == 1
