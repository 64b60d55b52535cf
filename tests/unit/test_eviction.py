"""Which replicas make room, and which never do; and how many a model has. Tables over `placement.plan`."""

from dataclasses import replace

import pytest

from localai_q.cluster.eviction import PROTECTED
from localai_q.cluster.fleet import PATIENCE, Demand, Fleet
from localai_q.cluster.memory import Memory
from localai_q.cluster.models import Model, ModelConfig
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.placement import GiveUp, Place, Retry, Stop, plan
from localai_q.cluster.states import NodeState, ReplicaState

NOW = 10_000.0
S = ReplicaState


def model(name: str, memory: int = 6, **config) -> Model:
    return Model(id=name, name=name, revision=1, config=ModelConfig(backend="echo", memory=memory, **config))


def node(name: str, room: int = 10, used: int = 0, **values) -> Node:
    """A node with a budget, of which so much is in use by what it has."""
    hardware = {"ram_available": 1000 - used, "budget": room}
    values = {"state": NodeState.READY, "last_heartbeat": NOW, **values}
    return Node(id=name, name=name, approved=True, secret_hash="", hardware=hardware, **values)


def replica(
    of: str, at: str, state: ReplicaState = S.READY, *, unused: float = 100, memory: int = 6, **values
) -> Replica:
    values = {"changed": NOW - 1000, "used": NOW - unused, "slots": 2, **values}
    return Replica(id=f"{of}-{at}", model_id=of, node_id=at, number=1, revision=1, state=state,
                   reserved=Memory(ram=memory), **values)  # fmt: skip


def decided(models, nodes, replicas, *, waiting=("new",), busy=(), late=0) -> list[str]:
    """The plan's actions for those who wait, in short."""
    demand = {of: Demand(waiting=1, late=late, longest=9 - place) for place, of in enumerate(waiting)}
    fleet = Fleet(models=models, nodes=nodes, replicas=replicas, demand=demand, busy=dict.fromkeys(busy, 1), now=NOW)
    said = []
    for action in plan(fleet):
        match action:
            case Place():
                said.append(f"place {action.model_id} {action.node_id}")
            case Stop():
                said.append(f"stop {action.replica_id}")
            case Retry():
                said.append(f"retry {action.replica_id}")
            case GiveUp():
                said.append(f"give up {action.model_id}: {action.reason}")
    return said


NEW, OLD = model("new"), model("old")
A, B = node("a"), node("b")
FULL = "give up new: a: needs 6 B, 4 B free (as configured)"


@pytest.mark.parametrize(
    ("case", "old", "held", "busy", "waiting", "expected"),
    [
        ("idle: it goes", OLD, replica("old", "a"), (), ("new",), ["stop old-a"]),
        ("at work: it is waited for", OLD, replica("old", "a"), ("old-a",), ("new",), []),
        ("somebody waits for it", OLD, replica("old", "a"), (), ("new", "old"), []),
        ("it has only just become ready", OLD, replica("old", "a", changed=NOW - PROTECTED + 1), (), ("new",), []),
        ("it has been ready for long enough", OLD, replica("old", "a", changed=NOW - PROTECTED), (), ("new",), ["stop old-a"]),
        ("it still comes up", OLD, replica("old", "a", S.LOADING), (), ("new",), []),
        ("it is being stopped already", OLD, replica("old", "a", S.STOPPING), (), ("new",), []),
        ("pinned: there is no hope", model("old", pinned=True), replica("old", "a"), (), ("new",), [FULL]),
        ("its least number: there is no hope", model("old", min_replicas=1), replica("old", "a"), (), ("new",), [FULL]),
        ("its model is gone", None, replica("old", "a"), (), ("new",), [FULL]),
        ("nobody waits", OLD, replica("old", "a"), (), (), []),
    ],
)  # fmt: skip
def test_what_makes_room_and_what_does_not(case, old, held, busy, waiting, expected) -> None:
    models = [each for each in (NEW, old) if each]
    assert decided(models, [A], [held], busy=busy, waiting=waiting) == expected, case


def test_of_several_replicas_on_one_node_only_those_above_the_minimum_make_room() -> None:
    old = model("old", 3, min_replicas=1, max_replicas=3)
    held = [replace(replica("old", "a", unused=age, memory=3), id=f"old{age}", number=age) for age in (100, 200, 300)]
    several = replace(A, given_slots=3)
    assert decided([model("new", 6), old], [several], held) == ["stop old300", "stop old200"]
    (said,) = decided([model("new", 8), old], [several], held)
    assert said.startswith("give up new")


class TestGroups:
    def test_a_model_that_excludes_another_takes_its_place_and_not_beside_it(self) -> None:
        new, old = (model(name, 1, concurrency_groups=("g",)) for name in ("new", "old"))
        held = replica("old", "a", memory=1)
        assert decided([new, old], [A], [held]) == ["stop old-a"]
        assert decided([new, old], [A, B], [held]) == ["place new b"]
        assert decided([new, model("old", 1)], [A], [held]) == ["place new a"]
        assert decided([new, old], [A], [replace(held, state=S.STOPPING)]) == []
        assert decided([new, old], [A], [held], busy=("old-a",)) == []
        pinned = model("old", 1, concurrency_groups=("g",), pinned=True)
        assert decided([new, pinned], [A], [held]) == ["give up new: a: shares a group with old"]

    def test_who_must_go_for_the_group_goes_even_if_another_would_free_the_memory(self) -> None:
        new, rival = (model(name, 3, concurrency_groups=("g",)) for name in ("new", "rival"))
        held = [replica("old", "a", unused=900, memory=3), replica("rival", "a", unused=50, memory=3)]
        assert decided([new, rival, model("old", 3)], [A], held) == ["stop rival-a"]

    def test_two_that_exclude_each_other_are_not_placed_on_one_node_by_one_plan(self) -> None:
        pair = [model(name, 1, concurrency_groups=("g", name)) for name in ("x", "y")]
        assert decided(pair, [A], [], waiting=("x", "y")) == ["place x a"]
        assert decided(pair, [A, B], [], waiting=("x", "y")) == ["place x a", "place y b"]


def test_the_least_recently_used_goes_and_no_more_than_must() -> None:
    models = [NEW, *(model(name, 3) for name in "xyz")]
    held = [replica(name, "a", unused=age, memory=3) for name, age in (("x", 100), ("y", 300), ("z", 200))]
    assert decided(models, [A], held) == ["stop y-a", "stop z-a"]


def test_one_large_replica_rather_than_a_small_one_that_does_not_suffice() -> None:
    models = [NEW, model("big", 7), model("small", 2)]
    held = [replica("small", "a", unused=900, memory=2), replica("big", "a", unused=50, memory=7)]
    assert decided(models, [A], held) == ["stop big-a"]


def test_all_victims_stand_on_one_node_the_one_where_fewest_go() -> None:
    models = [NEW, model("x", 4), model("y", 4), OLD]
    held = [replica("x", "a", memory=4), replica("y", "a", memory=4), replica("old", "b")]
    assert decided(models, [node("a", 8), B], held) == ["stop old-b"]


@pytest.mark.parametrize(
    ("place", "why"),
    [
        (node("b", labels={"zone": "2"}), "lacks the label zone=1"),
        (replace(B, hardware={**B.hardware, "disk_free": 0}), "needs 1.1 GB of disk, 0 B free"),
    ],
)
def test_nothing_is_stopped_where_the_model_cannot_go_anyway(place, why) -> None:
    new = model("new", selector={"zone": "1"}, source="file:/x", sha256="a" * 64, size=5)
    place = place if place.labels else replace(place, labels={"zone": "1"})
    (said,) = decided([new, OLD], [place], [replica("old", "b")])
    assert said == f"give up new: b: {why}"


def test_while_a_place_becomes_free_nobody_else_gets_it() -> None:
    leaving = [replica("old", "a", S.STOPPING)]
    assert decided([NEW, OLD, model("small", 4)], [A], leaving, waiting=("new", "small")) == []
    assert decided([NEW, OLD, model("small", 4)], [A], leaving, waiting=("small",)) == ["place small a"]


@pytest.mark.parametrize("heard", [NOW - 5, NOW], ids=["before", "since"])
def test_what_is_leaving_is_enough_whether_its_node_has_reported_since_or_not(heard: float) -> None:
    place = replace(A, hardware={"ram_available": 4}, last_heartbeat=heard)
    there = [replica("old", "a", S.STOPPING, changed=NOW - 1), replica("idle", "a")]
    assert decided([NEW, OLD, model("idle")], [place], there) == []


@pytest.mark.parametrize(("there", "chosen"), [("a", "b"), ("b", "a")])
def test_a_node_on_which_something_still_comes_up_is_not_idle(there: str, chosen: str) -> None:
    coming = [replica("old", there, S.STAGING, memory=1)]
    assert decided([NEW, OLD], [A, B], coming) == [f"place new {chosen}"]


def test_where_no_node_is_ready_those_who_wait_go_on_waiting() -> None:
    assert decided([NEW], [node("b", state=NodeState.DRAINING)], []) == []


def test_who_waits_longest_is_served_first() -> None:
    assert decided([model("a1"), model("a2")], [A], [], waiting=("a2", "a1")) == ["place a2 a"]


def test_a_model_that_never_fits_is_told_each_nodes_reason() -> None:
    (said,) = decided([model("new", 50)], [A, node("b", state=NodeState.UNHEALTHY)], [])
    assert said == "give up new: a: needs 50 B, 10 B free (as configured); b: unhealthy"


def test_of_many_nodes_the_error_names_some() -> None:
    (said,) = decided([model("new", 50)], [node(f"n{number:02}") for number in range(25)], [])
    assert said.count("needs 50 B") == 20
    assert said.endswith("and 5 more nodes")


def test_a_retry_that_has_no_room_any_more_makes_room_too() -> None:
    failed = replica("new", "a", S.FAILED, failures=1, reason="x")
    assert decided([NEW, OLD], [A], [failed, replica("old", "a")]) == ["stop old-a"]
    assert decided([NEW], [A], [failed]) == ["retry new-a"]


def test_a_node_that_has_the_file_then_the_idlest_then_the_roomiest() -> None:
    new = model("new", source="file:/x", sha256="a" * 64, size=5)
    has = replace(A, hardware={**A.hardware, "files": ["a" * 64]})
    assert decided([new], [node("b", 90), has], []) == ["place new a"]
    there = [replica("o", "a", memory=1), replica("o", "b", memory=1)]
    assert decided([NEW, model("o", max_replicas=2)], [A, B], there, busy=("o-a",)) == ["place new b"]
    assert decided([NEW], [A, node("b", 90)], []) == ["place new b"]


SHORT = {"late": 1, "waiting": ("new",)}


@pytest.mark.parametrize(
    ("case", "new", "held", "asked", "expected"),
    [
        ("loaded before anybody asks", model("new", min_replicas=2, max_replicas=2), [], {}, ["place new a", "place new b"]),
        ("one is lost", model("new", min_replicas=2, max_replicas=2), [replica("new", "a")], {}, ["place new b"]),
        ("too many wait too long", model("new", max_replicas=2), [replica("new", "a")], SHORT, ["place new b"]),
        ("they have waited a moment", model("new", max_replicas=2), [replica("new", "a")], {"waiting": ("new",)}, []),
        ("no more than the most", model("new"), [replica("new", "a")], SHORT, []),
        ("one comes up already", model("new", max_replicas=3), [replica("new", "a"), replica("new", "b", S.LOADING)], SHORT, []),
        ("it has only just come", model("new", max_replicas=2), [replica("new", "a", changed=NOW - PATIENCE + 1)], SHORT, []),
        ("unused for long", model("new", idle_timeout=60), [replica("new", "a")], {}, ["stop new-a"]),
        ("used of late", model("new", idle_timeout=200), [replica("new", "a")], {}, []),
        ("unused for long, but at work", model("new", idle_timeout=60), [replica("new", "a")], {"busy": ("new-a",)}, []),
        ("unused for long, but waited for", model("new", idle_timeout=60), [replica("new", "a")], {"waiting": ("new",)}, []),
        ("never", model("new"), [replica("new", "a", unused=10**6)], {}, []),
        ("not below the least", model("new", idle_timeout=60, min_replicas=1), [replica("new", "a")], {}, []),
        ("the least used of two", model("new", idle_timeout=60, min_replicas=1, max_replicas=2),
         [replica("new", "a"), replica("new", "b", unused=150)], {}, ["stop new-b"]),
        ("everywhere its labels are", model("new", spread_all=True, selector={"zone": "1"}), [], {}, ["place new c"]),
    ],
)  # fmt: skip
def test_how_many_replicas_a_model_has(case, new, held, asked, expected) -> None:
    nodes = [A, B, node("c", 3)] if not new.config.selector else [A, B, node("c", labels={"zone": "1"})]
    assert decided([new], nodes, held, **{"waiting": (), **asked}) == expected, case
