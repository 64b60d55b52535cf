"""Where replicas go: one table of cases for each rule of `placement.plan`, and what holds for any cluster."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localai_q.cluster.capacity import BACKOFF_MOST, backoff, cooling
from localai_q.cluster.fleet import Demand, Fleet
from localai_q.cluster.models import Model, ModelConfig
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.placement import (
    GiveUp,
    Place,
    Retry,
    Stop,
    plan,
)
from localai_q.cluster.states import COMING_UP, NodeState, ReplicaState

NOW = 10_000.0
S = ReplicaState


def model(name: str = "m", *, spread: bool = False, revision: int = 1) -> Model:
    return Model(id=name, name=name, revision=revision, config=ModelConfig(backend="echo", spread_all=spread))


def node(name: str, state: NodeState = NodeState.READY) -> Node:
    return Node(id=name, name=name, state=state, approved=True, secret_hash="")


def replica(state: ReplicaState, at: str = "n1", *, of: str = "m", age: float = 0.0, **values) -> Replica:
    values = {"revision": 1, "failures": int(state is S.FAILED), "reason": "no memory", **values}
    identity = f"{of}-{at}"
    return Replica(id=identity, model_id=of, node_id=at, number=1, state=state, slots=1, changed=NOW - age, **values)


def fleet(models, nodes, replicas, waiting) -> Fleet:
    demand = {of: Demand(waiting=count) for of, count in waiting.items()}
    return Fleet(models=models, nodes=nodes, replicas=replicas, demand=demand, now=NOW)


def decided(actions) -> list[tuple]:
    """The actions without the words of their reasons."""
    shapes = {
        Place: lambda a: ("place", a.model_id, a.node_id),
        Retry: lambda a: ("retry", a.replica_id),
        Stop: lambda a: ("stop", a.replica_id),
        GiveUp: lambda a: ("give up", a.model_id),
    }
    return [shapes[type(action)](action) for action in actions]


N1, N2, N3 = node("n1"), node("n2"), node("n3")
DOWN = [node(f"x{number}", state) for number, state in enumerate(NodeState) if state is not NodeState.READY]


@pytest.mark.parametrize(
    ("case", "models", "nodes", "replicas", "waiting", "expected"),
    [
        # 1. changed models
        ("ready of an old revision", [model(revision=2)], [N1], [replica(S.READY)], 0, [("stop", "m-n1")]),
        ("ready of this revision", [model()], [N1], [replica(S.READY)], 0, []),
        ("loading of an old revision is let be", [model(revision=2)], [N1], [replica(S.LOADING)], 0, []),
        ("stopping already", [model(revision=2)], [N1], [replica(S.STOPPING)], 0, []),
        # 2. failed replicas
        ("back-off over, wanted", [model()], [N1], [replica(S.FAILED, age=2)], 1, [("retry", "m-n1")]),
        ("back-off over, everywhere", [model(spread=True)], [N1], [replica(S.FAILED, age=2)], 0, [("retry", "m-n1")]),
        ("back-off over, nobody waits", [model()], [N1], [replica(S.FAILED, age=2)], 0, []),
        ("its node is away", [model()], [replace(N1, state=NodeState.OFFLINE)], [replica(S.FAILED, age=2, failures=2)], 1,
         [("give up", "m")]),
        ("after many failures", [model()], [N1], [replica(S.FAILED, age=30, failures=6)], 1, [("give up", "m")]),
        # 3. everywhere
        ("one on each ready node", [model(spread=True)], [N1, N2, *DOWN], [], 0,
         [("place", "m", "n1"), ("place", "m", "n2")]),
        ("where there is none", [model(spread=True)], [N1, N2], [replica(S.READY)], 0, [("place", "m", "n2")]),
        ("not beside a failed one", [model(spread=True)], [N1, N2], [replica(S.FAILED)], 0, [("place", "m", "n2")]),
        ("not beside one that stops", [model(spread=True)], [N1], [replica(S.STOPPING)], 5, []),
        # 4. on demand
        ("one for those who wait", [model()], [N1, N2], [], 3, [("place", "m", "n1")]),
        ("nobody waits", [model()], [N1], [], 0, []),
        ("one is coming up", [model()], [N1, N2], [replica(S.INSTALLING)], 3, []),
        ("one is ready", [model()], [N1, N2], [replica(S.READY)], 3, []),
        ("no node is ready", [model()], DOWN, [], 3, []),
        ("the emptiest node", [model(), model("o")], [N1, N2], [replica(S.READY, of="o")], 3,
         [("place", "m", "n2")]),
        ("the same load: by name", [model()], [N3, N2], [], 1, [("place", "m", "n2")]),
        ("another node while one cools", [model()], [N1, N2], [replica(S.FAILED, failures=2)], 1,
         [("place", "m", "n2")]),
        ("no other node after a first failure", [model()], [N1, N2], [replica(S.FAILED)], 1, []),
        ("another node while one comes up on a node that is away", [model()], [N1, replace(N2, state=NodeState.UNHEALTHY)],
         [replica(S.LOADING, "n2")], 1, [("place", "m", "n1")]),
        ("a retry before a new place", [model()], [N1, N2], [replica(S.FAILED, age=2)], 1, [("retry", "m-n1")]),
        # 5. given up
        ("all cool down", [model()], [N1], [replica(S.FAILED, failures=2)], 1, [("give up", "m")]),
        ("a first failure", [model()], [N1], [replica(S.FAILED)], 1, []),
        ("all cool down, nobody waits", [model()], [N1], [replica(S.FAILED)], 0, []),
        ("everywhere, all cool down", [model(spread=True)], [N1], [replica(S.FAILED, failures=2)], 1, [("give up", "m")]),
        ("one serves, another cools", [model(spread=True)], [N1, N2], [replica(S.READY), replica(S.FAILED, "n2")], 1,
         []),
    ],
)  # fmt: skip
def test_the_plan_by_its_rules(case, models, nodes, replicas, waiting, expected) -> None:
    assert decided(plan(fleet(models, nodes, replicas, {"m": waiting}))) == expected, case


def test_replicas_of_one_plan_are_spread_over_the_nodes() -> None:
    models = [model(f"m{number}") for number in range(6)]
    actions = plan(fleet(models, [N1, N2, N3], [], {m.id: 1 for m in models}))
    assert Counter(action.node_id for action in actions) == {"n1": 2, "n2": 2, "n3": 2}


def test_giving_up_tells_why_the_last_one_failed() -> None:
    (action,) = plan(fleet([model()], [N1], [replica(S.FAILED, failures=2)], {"m": 1}))
    assert action.reason == "no memory"


def test_the_back_off_doubles_up_to_its_most() -> None:
    assert [backoff(failures) for failures in (0, 1, 2, 3, 4)] == [1, 1, 2, 4, 8]
    assert backoff(50) == backoff(10_000 if BACKOFF_MOST < 2 else 60) == BACKOFF_MOST


identifiers = st.sampled_from(["m1", "m2", "m3"])
node_names = st.sampled_from(["n1", "n2", "n3", "n4"])
model_sets = st.lists(
    st.builds(model, identifiers, spread=st.booleans(), revision=st.integers(1, 2)),
    unique_by=lambda m: m.id,
    max_size=3,
)
node_sets = st.lists(
    st.builds(node, node_names, st.sampled_from(list(NodeState))), unique_by=lambda n: n.id, max_size=4
)
replica_sets = st.lists(
    st.builds(
        lambda state, at, of, age, failures, revision: replica(
            state, at, of=of, age=age, failures=failures, revision=revision
        ),
        st.sampled_from([state for state in ReplicaState if state is not S.GONE]),
        node_names,
        identifiers,
        st.floats(0, 400),
        st.integers(0, 12),
        st.integers(1, 2),
    ),
    unique_by=lambda r: r.id,
    max_size=8,
)
clusters = st.tuples(model_sets, node_sets, replica_sets, st.dictionaries(identifiers, st.integers(0, 3)))


@settings(max_examples=400, deadline=None)
@given(clusters)
def test_what_holds_for_any_cluster(cluster) -> None:
    models, nodes, replicas, waiting = cluster
    actions = plan(fleet(models, nodes, replicas, waiting))
    assert actions == plan(fleet(models, nodes, replicas, waiting))
    by_id = {r.id: r for r in replicas}
    ready = {n.id for n in nodes if n.state is NodeState.READY}

    places = [(a.model_id, a.node_id) for a in actions if isinstance(a, Place)]
    assert len(places) == len(set(places))
    assert not set(places) & {(r.model_id, r.node_id) for r in replicas}
    assert {at for _, at in places} <= ready

    retried = [by_id[a.replica_id] for a in actions if isinstance(a, Retry)]
    assert all(r.state is S.FAILED and r.node_id in ready and not cooling(r, NOW) for r in retried)
    assert len({r.id for r in retried}) == len(retried)

    stopped = [by_id[a.replica_id] for a in actions if isinstance(a, Stop)]
    assert all(r.state is S.READY for r in stopped)

    # Nobody is told to give up while something serves or comes up, or is about to.
    acted = {m for m, _ in places} | {r.model_id for r in retried}
    for action in actions:
        if isinstance(action, GiveUp):
            own = [r for r in replicas if r.model_id == action.model_id]
            assert waiting[action.model_id] > 0
            assert action.model_id not in acted
            assert not [r for r in own if r.state is S.READY or r.state in COMING_UP]
            assert any(r.state is S.FAILED for r in own)


@settings(max_examples=200, deadline=None)
@given(clusters)
def test_carrying_out_the_plan_leaves_nothing_to_place_or_retry(cluster) -> None:
    models, nodes, replicas, waiting = cluster
    now = {r.id: r for r in replicas}
    for action in plan(fleet(models, nodes, replicas, waiting)):
        match action:
            case Place(model_id=of, node_id=at):
                made = replica(S.PLACED, at, of=of)
                now[made.id] = made
            case Retry(replica_id=found):
                now[found] = replace(now[found], state=S.PLACED)
            case Stop(replica_id=found):
                now[found] = replace(now[found], state=S.STOPPING)
    again = plan(fleet(models, nodes, list(now.values()), {}))
    assert [action for action in again if not isinstance(action, GiveUp)] == []
