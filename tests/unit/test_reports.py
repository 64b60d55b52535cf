"""What a node says of its processes is held against the registry: nothing lives twice, and nothing is believed too soon."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from localai_q.cluster.models import Model, ModelConfig
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.reports import RUNNING, Comparison, Report, compare
from localai_q.cluster.states import NodeState, ReplicaState

NODE = Node(id="n1", name="n1", state=NodeState.READY, approved=True, secret_hash="", reported=100.0)
S = ReplicaState


def model(name: str = "m", **config: object) -> Model:
    return Model(id=name, name=name, revision=1, config=ModelConfig(backend="echo", **config))


RIVALS = {name: model(name, concurrency_groups=("g",)) for name in "mn"}


def replica(replica_id: str, state: ReplicaState = S.READY, **values: object) -> Replica:
    values = {"model_id": "m", "number": 1, "changed": 50.0, **values}
    return Replica(id=replica_id, node_id="n1", revision=1, state=state, slots=4, **values)


def report(replica_id: str, **values: object) -> Report:
    return Report(
        **{"id": replica_id, "model_id": "m", "revision": 1, "number": 1, "state": "ready", "slots": 4, **values}
    )


def compared(reports: list[Report], own: list[Replica], node: Node = NODE, **more: object) -> Comparison:
    known = {"models": {"m": model()}, "strangers": (), **more}
    return compare(node, reports, own, **known)


@pytest.mark.parametrize("state", [NodeState.READY, NodeState.DRAINING])
@pytest.mark.parametrize("lives", ["ready", "loading"])
def test_a_process_without_a_row_is_adopted(lives: str, state: NodeState) -> None:
    said = report("a", state=lives)
    found = compared([said], [], replace(NODE, state=state))
    assert (found.adopt, found.stop) == ([said], {})


@pytest.mark.parametrize(
    ("said", "more", "why"),
    [
        ({"state": "stopping"}, {}, "stopping"),
        ({"state": "failed"}, {}, "failed"),
        ({"revision": 2}, {}, "was changed"),
        ({"model_id": "other"}, {}, "was removed"),
        ({}, {"strangers": ("a",)}, "another node's"),
        ({}, {"own": [replica("b")]}, "another replica of model m"),
        ({}, {"node": replace(NODE, state=NodeState.DRAINED)}, "is drained"),
        ({}, {"node": replace(NODE, state=NodeState.PENDING)}, "is pending"),
        ({}, {"models": {"m": model(selector={"zone": "attic"})}}, "lacks a label"),
        ({"number": 2}, {"own": [replica("b")]}, "as many replicas of model m as it may"),
        ({}, {"own": [replica("b", model_id="n")], "models": RIVALS}, "has model n, which excludes m"),
    ],
)
def test_a_process_that_could_not_have_been_placed_so_is_told_to_stop(said: dict, more: dict, why: str) -> None:
    found = compared([report("a", **said)], more.pop("own", []), **more)
    assert found.adopt == []
    assert why in found.stop["a"]


def test_of_two_processes_in_one_place_one_is_adopted() -> None:
    node = replace(NODE, given_slots=2)
    found = compared([report("a"), report("b"), report("c", number=2), report("d", number=3)], [], node)
    assert [each.id for each in found.adopt] == ["a", "c"]
    assert list(found.stop) == ["b", "d"]


@pytest.mark.parametrize("state", RUNNING)
def test_a_row_without_a_process_is_lost_the_second_time(state: ReplicaState) -> None:
    own = [replica("a", state)]
    once = compared([], own)
    assert (once.lost, once.missed) == ([], {"a"})
    twice = compared([], own, replace(NODE, missed=tuple(once.missed)))
    assert (twice.lost, twice.missed) == (own, frozenset())
    seen = compared([report("a")], own, replace(NODE, missed=tuple(once.missed)))
    assert (seen.lost, seen.missed) == ([], frozenset())


@pytest.mark.parametrize("reported", [None, 50.0, 49.0])
def test_a_report_says_nothing_of_what_was_decided_after_it(reported: float | None) -> None:
    node = replace(NODE, reported=reported, missed=("a",))
    assert compared([], [replica("a")], node) == Comparison()
    assert compared([], [replica("a", S.LOADING, changed=0.0, told=50.0)], node) == Comparison()
    assert compared([report("a")], [replica("a", S.PLACED)], node) == Comparison()
    assert compared([report("a")], [replica("a", S.LOADING)], node) == Comparison()


@pytest.mark.parametrize("state", [state for state in ReplicaState if state not in RUNNING])
def test_what_needs_no_process_is_never_lost(state: ReplicaState) -> None:
    assert compared([], [replica("a", state)], replace(NODE, missed=("a",))) == Comparison()


def test_a_replica_whose_readiness_was_never_heard_is_ready() -> None:
    own = [replica("a", S.LOADING)]
    assert compared([report("a")], own).ready == own
    assert compared([report("a", state="loading")], own).ready == []


@pytest.mark.parametrize("state", [S.PLACED, S.INSTALLING, S.STAGING, S.FAILED])
def test_a_process_of_what_should_have_none_is_told_to_stop(state: ReplicaState) -> None:
    assert list(compared([report("a")], [replica("a", state)]).stop) == ["a"]
    assert compared([report("a")], [replica("a", S.STOPPING)]).stop == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"in_flight": -1}, {"in_flight": 0.5}, {"in_flight": "1"}, {"tokens_per_second": float("nan")},
        {"tokens_per_second": float("inf")}, {"tokens_per_second": 1e7}, {"load_seconds": -1.0}, {"slots": 0},
        {"state": "gone"}, {"id": "../a"}, {"id": "a" * 65}, {"revision": 0}, {"number": 0}, {"in_flight": 1 << 21},
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        report("a", **wrong)


ids = st.sampled_from("abcdef")
rows = st.lists(
    st.builds(
        replica, ids, st.sampled_from([state for state in ReplicaState if state is not S.GONE]),
        model_id=st.sampled_from("mn"), number=st.integers(1, 2), changed=st.sampled_from([50.0, 150.0]),
    ),
    unique_by=(lambda each: each.id, lambda each: (each.model_id, each.number)),
)  # fmt: skip
processes = st.lists(
    st.builds(
        report, ids, model_id=st.sampled_from("mnx"), number=st.integers(1, 2), revision=st.integers(1, 2),
        state=st.sampled_from(["loading", "ready", "stopping", "failed"]),
    ),
    unique_by=lambda each: each.id,
)  # fmt: skip


@given(rows, processes, st.sampled_from(NodeState), st.integers(1, 2))
def test_after_two_reports_every_process_has_its_row_or_an_order_and_every_row_its_process(
    own: list[Replica], lives: list[Report], state: NodeState, slots: int
) -> None:
    known = {"models": {"m": model("m"), "n": model("n")}}
    node = replace(NODE, state=state, given_slots=slots)
    stopped: set[str] = set()
    for at in (200.0, 300.0, 400.0):  # the first may be too early for what has changed since the one before it
        found = compared(lives, own, node, **known)
        assert len({each.id for each in found.adopt} | set(found.stop)) == len(found.adopt) + len(found.stop)
        stopped |= set(found.stop)
        lost, ready = {each.id for each in found.lost}, {each.id for each in found.ready}
        own = [replace(each, state=S.FAILED, changed=at) if each.id in lost else each for each in own]
        own = [replace(each, state=S.READY, changed=at) if each.id in ready else each for each in own]
        own += [
            replica(each.id, S(each.state), model_id=each.model_id, number=each.number, changed=at)
            for each in found.adopt
        ]
        assert len({each.id for each in own}) == len(own), "no two rows for one process"
        assert len({(each.model_id, each.number) for each in own}) == len(own), "no two rows for one place"
        node = replace(node, reported=at, missed=tuple(found.missed))
    with_process = {each.id for each in own if each.state in (*RUNNING, S.STOPPING)}
    assert {each.id for each in lives} <= with_process | stopped
    assert {each.id for each in own if each.state in RUNNING} <= {each.id for each in lives}
