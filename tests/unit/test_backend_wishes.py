"""What becomes of a wish for a backend on a node, and which nodes a request is for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localai_q.cluster.backends import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    Installed,
    Op,
    Step,
    Wish,
    WishState,
    drifts,
    next_step,
    pause,
    targets,
)
from localai_q.cluster.jobs import Job
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState, NodeState

ECHO = {"name": "echo", "version": "1", "digest": "0" * 64, "build": "cpu"}


def wish(**values: object) -> Wish:
    return Wish(**{"node_id": "n", "backend": "echo", "op": Op.INSTALL, "operation": "o", **values})


def job(state: JobState) -> Job:
    return Job(id="j", kind="install_backend", state=state, line="node.n.jobs")


def node(name: str, *, approved: bool = True, labels: dict | None = None, **hardware: object) -> Node:
    return Node(id=f"id-{name}", name=name, state=NodeState.READY, approved=approved, secret_hash="", version="1",
                hardware=hardware, last_heartbeat=0.0, labels=labels or {})  # fmt: skip


@pytest.mark.parametrize(
    ("found", "state", "reachable", "now", "step"),
    [
        (wish(), None, True, 0.0, Step.BEGIN),
        (wish(), None, False, 0.0, Step.WAIT),
        (wish(next_try=10.0), None, True, 9.0, Step.WAIT),
        (wish(next_try=10.0), None, True, 10.0, Step.BEGIN),
        (wish(job_id="j"), JobState.OPEN, True, 0.0, Step.WAIT),
        (wish(job_id="j"), JobState.OPEN, False, 0.0, Step.WAIT),
        (wish(job_id="j"), JobState.DONE, True, 0.0, Step.DONE),
        (wish(job_id="j"), JobState.DONE, False, 0.0, Step.DONE),
        (wish(job_id="j"), JobState.CANCELLED, True, 0.0, Step.CANCELLED),
        (wish(job_id="j"), JobState.FAILED, True, 0.0, Step.FAILED),
        (wish(job_id="j"), JobState.FAILED, False, 0.0, Step.AGAIN),
        (wish(job_id="j"), None, True, 0.0, Step.AGAIN),
        (wish(state=WishState.DEAD), None, True, 0.0, Step.WAIT),
        (wish(state=WishState.CANCELLED, job_id="j"), JobState.DONE, True, 0.0, Step.WAIT),
    ],
)
def test_the_next_step_of_a_wish(found: Wish, state: JobState | None, reachable: bool, now: float, step: Step) -> None:
    assert next_step(found, job(state) if state else None, reachable=reachable, now=now) is step


def test_pauses_double_up_to_the_longest() -> None:
    assert [pause(attempts) for attempts in range(1, 8)] == [30, 60, 120, 240, 480, 900, 900]


@given(st.integers(1, 100))
def test_a_pause_is_never_out_of_bounds(attempts: int) -> None:
    assert FIRST_PAUSE <= pause(attempts) <= LONGEST_PAUSE
    assert pause(attempts) <= pause(attempts + 1)


def test_an_install_is_for_the_nodes_that_can_run_it() -> None:
    nodes = [node("a"), node("b", gpus=[{"vendor": "amd"}]), node("c", approved=False), node("d", backends=[ECHO])]
    found = targets(Op.INSTALL, "x", ("rocm",), nodes)
    assert [each.name for each in found.nodes] == ["b"]
    assert found.others["a"] == "it has cpu, and the backend is made for rocm"
    assert found.others["c"] == "it is not approved"
    assert [each.name for each in targets(Op.INSTALL, "x", ("rocm", "cpu"), nodes).nodes] == ["a", "b", "d"]


@pytest.mark.parametrize("op", [Op.UPGRADE, Op.DELETE])
def test_other_changes_are_for_the_nodes_that_have_it(op: Op) -> None:
    found = targets(op, "echo", ("rocm",), [node("a"), node("b", backends=[ECHO])])
    assert [each.name for each in found.nodes] == ["b"]
    assert found.others == {"a": "it does not have it"}


def test_a_request_is_narrowed_by_names_ids_and_labels() -> None:
    nodes = [node("a", labels={"zone": "home"}), node("b", labels={"zone": "away"}), node("c")]
    found = targets(Op.INSTALL, "x", ("cpu",), nodes, only=("a", "id-c"), selector={"zone": "home"})
    assert [each.name for each in found.nodes] == ["a"]
    assert found.others == {"b": "it is not named", "c": "it lacks the label zone=home"}


@pytest.mark.parametrize(
    ("versions", "differ"),
    [
        ([], False),
        ([("1", "a", "cpu")], False),
        ([("1", "a", "cpu"), ("1", "a", "cpu")], False),
        ([("1", "a", "cpu"), ("1", "b", "rocm")], False),
        ([("1", "a", "cpu"), ("1", "b", "cpu")], True),
        ([("1", "a", "cpu"), ("2", "a", "cpu")], True),
    ],
)
def test_versions_drift_among_nodes_of_a_kind(versions: list[tuple[str, str, str]], differ: bool) -> None:
    found = [Installed(name="x", version=version, digest=digest, build=build) for version, digest, build in versions]
    assert drifts(found) is differ
