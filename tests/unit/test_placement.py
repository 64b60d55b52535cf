"""Where replicas go: one table of cases for each rule of `placement.plan`, and what holds for any cluster."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localai_q.cluster.capacity import BACKOFF_MOST, Site, backoff, cooling, limit
from localai_q.cluster.eviction import PROTECTED
from localai_q.cluster.fleet import Board, Demand, Fleet
from localai_q.cluster.groups import rivals_of
from localai_q.cluster.memory import Memory
from localai_q.cluster.models import Model, ModelConfig
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.placement import (
    Drop,
    GiveUp,
    Note,
    Place,
    Retry,
    Stop,
    plan,
    ruled_out,
)
from localai_q.cluster.speeds import Measure, Speeds
from localai_q.cluster.states import COMING_UP, NodeState, ReplicaState

NOW = 10_000.0
GB = 10**9
S = ReplicaState


def model(name: str = "m", *, spread: bool = False, revision: int = 1) -> Model:
    return Model(id=name, name=name, revision=revision, config=ModelConfig(backend="echo", spread_all=spread))


def labelled() -> Model:
    return Model(id="m", name="m", revision=1, config=ModelConfig(backend="echo", selector={"gpu": "a100"}))


def node(name: str, state: NodeState = NodeState.READY) -> Node:
    return Node(id=name, name=name, state=state, approved=True, secret_hash="")


def replica(state: ReplicaState, at: str = "n1", *, of: str = "m", age: float = 0.0, **values) -> Replica:
    values = {"revision": 1, "failures": int(state is S.FAILED), "reason": "no memory", **values}
    number = values.pop("number", 1)
    values = {"id": f"{of}-{at}" if number == 1 else f"{of}-{at}-{number}", **values}
    return Replica(model_id=of, node_id=at, number=number, state=state, slots=1, changed=NOW - age, **values)


def fleet(models, nodes, replicas, waiting) -> Fleet:
    demand = {of: Demand(waiting=count) for of, count in waiting.items()}
    return Fleet(models=models, nodes=nodes, replicas=replicas, demand=demand, now=NOW)


def decided(actions) -> list[tuple]:
    """The actions without the words of their reasons."""
    shapes = {
        Place: lambda a: ("place", a.model_id, a.node_id),
        Retry: lambda a: ("retry", a.replica_id),
        Stop: lambda a: ("stop", a.replica_id),
        Drop: lambda a: ("drop", a.replica_id),
        GiveUp: lambda a: ("give up", a.model_id),
    }
    return [shapes[type(action)](action) for action in actions if not isinstance(action, Note)]


N1, N2, N3 = node("n1"), node("n2"), node("n3")
DOWN = [node(f"x{number}", state) for number, state in enumerate(NodeState) if state is not NodeState.READY]


def measured(**speeds: float) -> Speeds:
    """Tokens per second of the model `m` on nodes."""
    return Speeds([Measure(node_id=at, model_id="m", tokens_per_second=speed) for at, speed in speeds.items()], [])


@pytest.mark.parametrize(
    ("speeds", "free", "chosen"),
    [
        ({}, {}, "n1"),
        ({"n1": 10.0, "n2": 58.0, "n3": 30.0}, {}, "n2"),
        ({"n1": 10.0, "n2": 58.0, "n3": 30.0}, {"n3": 2 * GB}, "n2"),  # before free memory
        ({"n1": 10.0, "n2": 10.0, "n3": 10.0}, {"n3": 2 * GB}, "n3"),
        ({"n1": 10.0, "n2": 58.0}, {}, "n3"),  # nothing is known of it
    ],
)
def test_the_faster_node_gets_the_model(speeds: dict, free: dict, chosen: str) -> None:
    where = [replace(each, hardware={"ram_available": free.get(each.id, GB)}) for each in (N1, N2, N3)]
    found = Fleet(models=[model()], nodes=where, replicas=[], demand={"m": Demand(waiting=1)}, now=NOW,
                  speeds=measured(**speeds))  # fmt: skip
    assert decided(plan(found)) == [("place", "m", chosen)]


@pytest.mark.parametrize("hindrance", ["file", "busy"])
def test_what_has_the_file_or_less_to_do_goes_before_what_is_faster(hindrance: str) -> None:
    config = ModelConfig(backend="echo", source="file:/x", sha256="a" * 64)
    file = {"files": ["a" * 64]} if hindrance == "file" else {}
    others = [replica(S.READY, "n2", of="other")] if hindrance == "busy" else []
    found = Fleet(models=[model().model_copy(update={"config": config})], nodes=[replace(N1, hardware=file), N2],
                  replicas=others, demand={"m": Demand(waiting=1)}, now=NOW, speeds=measured(n1=10.0, n2=58.0))  # fmt: skip
    assert decided(plan(found)) == [("place", "m", "n1")]


@pytest.mark.parametrize(
    ("case", "models", "nodes", "replicas", "waiting", "expected"),
    [
        # 1. changed models
        ("ready of an old revision", [model(revision=2)], [N1], [replica(S.READY)], 0,
         [("stop", "m-n1"), ("place", "m", "n1")]),
        ("ready of this revision", [model()], [N1], [replica(S.READY)], 0, []),
        ("loading of an old revision", [model(revision=2)], [N1], [replica(S.LOADING)], 1,
         [("stop", "m-n1"), ("place", "m", "n1")]),
        *((f"{state} of an old revision", [model(revision=2)], [N1], [replica(state)], 1,
           [("drop", "m-n1"), ("place", "m", "n1")]) for state in (S.PLACED, S.INSTALLING, S.STAGING, S.FAILED)),
        ("one that cools, of an old revision", [model(revision=2)], [N1], [replica(S.FAILED, failures=9)], 0,
         [("drop", "m-n1")]),
        ("stopping already, its place is taken over", [model(revision=2)], [N1], [replica(S.STOPPING)], 0,
         [("place", "m", "n1")]),
        ("everywhere", [model(spread=True, revision=2)], [N1, N2], [replica(S.READY), replica(S.LOADING, "n2")], 0,
         [("stop", "m-n1"), ("stop", "m-n2"), ("place", "m", "n1"), ("place", "m", "n2")]),
        ("the new one is there already", [model(revision=2)], [N1],
         [replica(S.STOPPING), replica(S.LOADING, revision=2, id="new")], 5, []),
        ("more than it may have", [model()], [N1, N2], [replica(S.READY, age=9), replica(S.READY, "n2", age=5)], 3,
         [("stop", "m-n1")]),
        ("more than it may have, one comes up", [model()], [N1, N2], [replica(S.READY, age=9), replica(S.LOADING, "n2")], 3,
         [("stop", "m-n2")]),
        ("more than it may have, two come up", [model()], [N1, N2], [replica(S.INSTALLING), replica(S.LOADING, "n2")], 3,
         [("drop", "m-n1")]),
        ("more than it may have, all at once", [model()], [N1, N2, N3],
         [replica(S.READY, age=9), replica(S.READY, "n2", age=5), replica(S.STAGING, "n3")], 3,
         [("drop", "m-n3"), ("stop", "m-n1")]),
        ("more than its node may have", [model(spread=True)], [N1],
         [replica(S.READY, age=5), replica(S.READY, number=2, age=9)], 0, [("stop", "m-n1-2")]),
        ("more than its node may have, and none on another", [model(spread=True)], [N1, N2],
         [replica(S.READY, age=5), replica(S.READY, number=2, age=9)], 0, [("stop", "m-n1-2"), ("place", "m", "n2")]),
        ("its node lacks the labels", [labelled()], [N1], [replica(S.READY)], 0, [("stop", "m-n1")]),
        ("its node lacks the labels while it comes up", [labelled()], [N1], [replica(S.STAGING)], 0,
         [("drop", "m-n1")]),
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


@pytest.mark.parametrize(
    ("slots", "held", "expected"),
    [
        ((1, 1), [], ["n1", "n2"]),
        ((2, 1), [], ["n1", "n2", "n1"]),
        ((4, 4), [], ["n1", "n2", "n1", "n2"]),
        ((4, 4), [replica(S.READY), replica(S.READY, number=2)], ["n2", "n2"]),
        ((1, 4), [replica(S.READY)], ["n2", "n2", "n2"]),
        ((3, 0), [replica(S.FAILED)], ["n1", "n1"]),
    ],
)
def test_replicas_are_stacked_where_there_are_too_few_nodes(slots, held, expected) -> None:
    several = Model(id="m", name="m", revision=1, config=ModelConfig(backend="echo", min_replicas=4, max_replicas=4))
    nodes = [replace(node, given_slots=slot) for node, slot in zip((N1, N2), slots, strict=True) if slot]
    cooled = [replace(r, changed=NOW - 100) for r in held]
    actions = plan(fleet([several], nodes, cooled, {}))
    assert [action.node_id for action in actions if isinstance(action, Place)] == expected
    assert any(isinstance(action, Retry) for action in actions) == any(r.state is S.FAILED for r in held)


@pytest.mark.parametrize(
    ("case", "memory", "selector", "others", "reasons"),
    [
        ("it fits where the old one leaves", 8, {}, [], {}),
        ("it fits nowhere", 11, {}, [], {"n1": "needs 11 B", "n2": "draining"}),
        ("something else could make room", 8, {}, [{}], {}),
        ("what is there stays", 8, {}, [{"pinned": True}], {"n1": "needs 8 B", "n2": "draining"}),
        ("no node has the label", 5, {"a": "b"}, [], {"n1": "lacks the label a=b", "n2": "draining"}),
        ("it stays as it is", 5, {}, [{"pinned": True}], {}),
    ],
)
def test_what_no_node_could_have_is_told_with_each_nodes_reason(case, memory, selector, others, reasons) -> None:
    config = ModelConfig(backend="echo", memory=memory, selector=selector)
    changed = Model(id="m", name="m", revision=2 if memory != 5 else 1, config=config)
    rest = [
        Model(id="o", name="o", revision=1, config=ModelConfig(backend="echo", memory=5, **other)) for other in others
    ]
    held = [replica(S.READY, age=99, reserved=Memory(ram=5), of=each.id) for each in (changed, *rest)]
    where = [replace(N1, hardware={"ram_available": 99, "budget": 10}, last_heartbeat=NOW),
             node("n2", NodeState.DRAINING)]  # fmt: skip
    found = ruled_out(fleet([changed, *rest], where, held, {}), changed)
    assert found.keys() == reasons.keys(), case
    assert all(found[name].startswith(words) for name, words in reasons.items()), found


def test_replicas_of_one_plan_are_spread_over_the_nodes() -> None:
    models = [model(f"m{number}") for number in range(6)]
    actions = plan(fleet(models, [N1, N2, N3], [], {m.id: 1 for m in models}))
    assert Counter(action.node_id for action in actions) == {"n1": 2, "n2": 2, "n3": 2}


def test_giving_up_tells_why_the_last_one_failed() -> None:
    action, note = plan(fleet([model()], [N1], [replica(S.FAILED, failures=2)], {"m": 1}))
    assert (action.reason, note.unmet.reason) == ("no memory", "no memory")


def test_the_back_off_doubles_up_to_its_most() -> None:
    assert [backoff(failures) for failures in (0, 1, 2, 3, 4)] == [1, 1, 2, 4, 8]
    assert backoff(50) == backoff(10_000 if BACKOFF_MOST < 2 else 60) == BACKOFF_MOST


identifiers = st.sampled_from(["m1", "m2", "m3"])
node_names = st.sampled_from(["n1", "n2", "n3", "n4"])
zones = st.sampled_from(["", "a"])


@st.composite
def models_of_all_kinds(draw) -> Model:
    least = draw(st.integers(0, 4))
    spread = draw(st.booleans())
    zone = draw(zones)
    config = ModelConfig(
        backend="echo", spread_all=spread, memory=draw(st.integers(1, 9)), min_replicas=least,
        max_replicas=draw(st.integers(max(least, 1), 6)), pinned=draw(st.booleans()),
        idle_timeout=0 if spread else draw(st.sampled_from([0, 60])), selector={"zone": zone} if zone else {},
        concurrency_groups=draw(st.sampled_from([(), (), ("g",), ("h",), ("g", "h")])),
    )  # fmt: skip
    return Model(id=draw(identifiers), name="m", revision=draw(st.integers(1, 2)), config=config)


@st.composite
def nodes_of_all_kinds(draw) -> Node:
    name, zone = draw(node_names), draw(zones)
    hardware = {"ram_available": draw(st.integers(0, 30)), "budget": draw(st.integers(0, 30))}
    return Node(id=name, name=name, state=draw(st.sampled_from([NodeState.READY, NodeState.READY, *NodeState])),
                approved=True, secret_hash="", labels={"zone": zone} if zone else {}, hardware=hardware,
                given_slots=draw(st.sampled_from([None, 1, 2, 3])),
                last_heartbeat=NOW - draw(st.integers(0, 100)))  # fmt: skip


model_sets = st.lists(models_of_all_kinds(), unique_by=lambda m: m.id, max_size=3)
node_sets = st.lists(nodes_of_all_kinds(), unique_by=lambda n: n.id, max_size=4)
replica_sets = st.lists(
    st.builds(
        lambda state, at, of, age, failures, revision, memory, number: replica(
            state, at, of=of, age=age, failures=failures, revision=revision, reserved=Memory(ram=memory), number=number
        ),
        st.sampled_from([state for state in ReplicaState if state is not S.GONE] + [S.READY] * 4),
        node_names,
        identifiers,
        st.floats(0, 400),
        st.integers(0, 12),
        st.integers(1, 2),
        st.integers(0, 9),
        st.sampled_from([1, 1, 1, 2, 3]),
    ),
    unique_by=lambda r: r.id,
    max_size=8,
)
demands = st.dictionaries(
    identifiers,
    st.builds(lambda waiting, longest: Demand(waiting=waiting, late=waiting, longest=longest), st.integers(0, 3),
              st.floats(0, 60)),
)  # fmt: skip


@st.composite
def fleets(draw) -> Fleet:
    replicas = draw(replica_sets)
    busy = draw(st.sets(st.sampled_from([r.id for r in replicas]))) if replicas else set()
    return Fleet(models=draw(model_sets), nodes=draw(node_sets), replicas=replicas, demand=draw(demands),
                 busy=dict.fromkeys(busy, 1), now=NOW)  # fmt: skip


def carried_out(cluster: Fleet, actions) -> list[Replica]:
    """The replicas once the actions were taken."""
    now = {r.id: r for r in cluster.replicas}
    models = {m.id: m for m in cluster.models}
    for action in actions:
        match action:
            case Place(model_id=of, node_id=at):
                taken = {r.number for r in now.values() if (r.model_id, r.node_id) == (of, at)}
                number = min({1, 2, 3, 4, 5, 6, 7} - taken)
                made = replica(S.PLACED, at, of=of, number=number, id=f"new {of}-{at}-{number}",
                               reserved=Memory(ram=models[of].config.memory), revision=models[of].revision)  # fmt: skip
                now[made.id] = made
            case Retry(replica_id=found):
                reserved = Memory(ram=models[now[found].model_id].config.memory)
                now[found] = replace(now[found], state=S.PLACED, reserved=reserved)
            case Stop(replica_id=found):
                now[found] = replace(now[found], state=S.STOPPING)
            case Drop(replica_id=found):
                del now[found]
    return list(now.values())


SURPLUS = ("max_replicas is", "may have")  # words of the reasons for which replicas above the most are ended

fuzz = settings(max_examples=400, deadline=None)


@fuzz
@given(fleets())
def test_what_holds_for_any_cluster(cluster: Fleet) -> None:
    actions = plan(cluster)
    assert actions == plan(cluster)
    by_id = {r.id: r for r in cluster.replicas}
    nodes, models = {n.id: n for n in cluster.nodes}, {m.id: m for m in cluster.models}
    ready = {n.id for n in cluster.nodes if n.state is NodeState.READY}

    places = [(a.model_id, a.node_id) for a in actions if isinstance(a, Place)]
    for of, at in places:
        assert at in ready
        assert models[of].config.selector.items() <= nodes[at].labels.items()

    retried = [by_id[a.replica_id] for a in actions if isinstance(a, Retry)]
    assert all(r.state is S.FAILED and r.node_id in ready and not cooling(r, NOW) for r in retried)
    assert len({r.id for r in retried}) == len(retried)

    after = carried_out(cluster, actions)
    for of, at in {*places, *((r.model_id, r.node_id) for r in retried)}:
        there = [r for r in after if r.node_id == at and r.state is not S.FAILED]
        # No byte is promised twice.
        assert Site(nodes[at], there).free.ram >= 0
        # No node has more replicas of a model than it may, nor two models that exclude each other.
        own = [r for r in there if r.model_id == of and not r.is_outdated(models[of])]
        assert len(own) <= limit(models[of], nodes[at])
        assert not {r.model_id for r in there} & rivals_of(models[of], cluster.models).keys()
    # Each replica is told apart from the others of its model on its node.
    identities = [(r.model_id, r.node_id, r.number) for r in after]
    assert len(identities) == len(set(identities))

    # Nobody is told to give up while something serves or comes up, or is about to.
    acted = {m for m, _ in places} | {r.model_id for r in retried}
    for action in actions:
        if isinstance(action, GiveUp):
            own = [r for r in after if r.model_id == action.model_id]
            assert cluster.demand[action.model_id].waiting > 0
            assert action.model_id not in acted
            assert not [r for r in own if r.state is S.READY or r.state in COMING_UP]
            assert ready or any(r.state is S.FAILED for r in own)


@fuzz
@given(fleets())
def test_replicas_are_spread_over_nodes_before_they_are_stacked(cluster: Fleet) -> None:
    actions = plan(cluster)
    after = Board(replace(cluster, replicas=carried_out(cluster, actions)))
    for action in actions:
        if isinstance(action, Place):
            model = after.models[action.model_id]
            count = len(after.site(action.node_id).own(model))
            for other in after.matching(model):
                assert not after.examine(model, other).fits or len(after.site(other).own(model)) >= count - 1


@fuzz
@given(fleets())
def test_what_is_stopped_in_any_cluster_may_be(cluster: Fleet) -> None:
    by_id, models = {r.id: r for r in cluster.replicas}, {m.id: m for m in cluster.models}
    actions = plan(cluster)
    after = carried_out(cluster, actions)
    stops = [a for a in actions if isinstance(a, Stop)]
    assert len({a.replica_id for a in stops}) == len(stops)
    for action in stops:
        stopped = by_id[action.replica_id]
        config = models[stopped.model_id].config
        if any(words in action.reason for words in ("was changed", "lacks the labels", *SURPLUS)):
            assert stopped.state in (S.READY, S.LOADING)
            continue
        assert stopped.state is S.READY
        assert not cluster.busy.get(stopped.id)
        assert not cluster.demand.get(stopped.model_id, Demand()).waiting
        left = [r for r in after if r.model_id == stopped.model_id and (r.state is S.READY or r.state in COMING_UP)]
        assert len(left) >= config.min_replicas
        if "makes room" in action.reason:
            assert not config.pinned
            assert NOW - stopped.changed >= PROTECTED
        else:
            assert NOW - stopped.changed >= config.idle_timeout > 0


@fuzz
@given(fleets())
def test_after_any_plan_what_has_no_place_is_ending_and_only_that_was_dropped(cluster: Fleet) -> None:
    by_id, models, nodes = ({each.id: each for each in of} for of in (cluster.replicas, cluster.models, cluster.nodes))
    actions = plan(cluster)
    drops = [action for action in actions if isinstance(action, Drop)]
    assert not [a for a in drops if by_id[a.replica_id].state in (S.LOADING, S.READY, S.STOPPING)]
    dropped = [by_id[a.replica_id] for a in drops if not any(words in a.reason for words in SURPLUS)]

    def has_no_place(r: Replica) -> bool:
        model, node = models.get(r.model_id), nodes.get(r.node_id)
        lacks = model and node and not model.config.selector.items() <= node.labels.items()
        return bool(model and (r.revision < model.revision or lacks))

    assert all(map(has_no_place, dropped))
    assert not [r for r in carried_out(cluster, actions) if has_no_place(r) and r.state is not S.STOPPING]


@fuzz
@given(fleets())
def test_after_any_plan_no_model_has_more_than_it_may_and_what_is_missed_least_went(cluster: Fleet) -> None:
    def missed(r: Replica) -> tuple:
        return r.state is S.READY, cluster.busy.get(r.id, 0), max(r.used, r.changed) if r.state is S.READY else 0

    by_id, actions = {r.id: r for r in cluster.replicas}, plan(cluster)
    board = Board(replace(cluster, replicas=carried_out(cluster, actions)))
    for model in cluster.models:
        alive, most = board.alive(model.id), model.config.max_replicas
        going = [
            by_id[a.replica_id] for a in actions if isinstance(a, Stop | Drop) and a.reason == f"max_replicas is {most}"
        ]
        going = [r for r in going if r.model_id == model.id]
        assert model.config.spread_all or len(alive) <= most
        stopped = {a.replica_id for a in actions if isinstance(a, Stop) and "unused" in a.reason}
        assert not going or len(alive) + len([r for r in board.of(model.id) if r.id in stopped]) == most
        assert all(missed(gone) <= missed(kept) for gone in going for kept in alive)
        for node_id, count in Counter(r.node_id for r in alive).items():
            assert node_id not in board.nodes or count <= limit(model, board.nodes[node_id])


@fuzz
@given(fleets())
def test_of_every_node_that_was_not_chosen_it_is_said_why(cluster: Fleet) -> None:
    actions = plan(cluster)
    for action in actions:
        if isinstance(action, Place):
            passed_over = action.survey.passed_over()
            chosen = {a.node_id for a in actions if isinstance(a, Place) and a.model_id == action.model_id}
            assert set(passed_over) | chosen == {n.id for n in cluster.nodes}
            assert all(passed_over.values())
        elif isinstance(action, GiveUp):
            failed = {r.node_id for r in cluster.replicas if r.state is S.FAILED and r.model_id == action.model_id}
            assert all(f"{n.name}: " in action.reason for n in cluster.nodes if n.id not in failed)


@fuzz
@given(fleets())
def test_carrying_out_the_plan_leaves_nothing_to_place_or_retry(cluster: Fleet) -> None:
    after = carried_out(cluster, plan(cluster))
    again = plan(replace(cluster, replicas=after))
    assert [action for action in again if isinstance(action, Place | Retry)] == []


def test_room_that_a_surplus_replica_leaves_is_used_by_the_same_plan() -> None:
    small = replace(node("n1"), hardware={"ram_available": 1, "budget": 1})
    one = Model(id="m1", name="m1", revision=1, config=ModelConfig(backend="echo", memory=1))
    other = Model(id="m2", name="m2", revision=1, config=ModelConfig(backend="echo", memory=1, spread_all=True))
    there = [replica(S.READY, "n2", of="m1"), replica(S.PLACED, "n1", of="m1", reserved=Memory(ram=1))]
    waits = fleet([one, other], [small, node("n2")], there, {})
    longest = replace(waits, demand={"m2": Demand(waiting=1, longest=1.0)})
    assert decided(plan(longest))[:2] == [("drop", "m1-n1"), ("place", "m2", "n1")]


def test_nothing_of_a_disabled_model_stays_and_nobody_waits_for_it() -> None:
    off = Model(id="m", name="m", revision=1, config=ModelConfig(backend="echo", disabled=True, spread_all=True))
    there = [replica(S.READY), replica(S.STAGING, "n2"), replica(S.STOPPING, "n3")]
    actions = plan(fleet([off], [node("n1"), node("n2"), node("n3"), node("n4")], there, {"m": 2}))
    assert decided(actions) == decided([Stop(replica_id="m-n1", reason=""), Drop(replica_id="m-n2", reason=""),
                                        GiveUp(model_id="m", reason="")])  # fmt: skip
    assert plan(fleet([off], [node("n1")], [], {})) == []
    assert ruled_out(fleet([off], [node("n1")], [replica(S.READY)], {}), off) == {}
