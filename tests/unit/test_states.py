"""The tables of moves are complete, and everything that the services want to do is in them."""

import itertools
from dataclasses import replace

import pytest

from localai_q.cluster.jobs import Job
from localai_q.cluster.nodes import Replica
from localai_q.cluster.stages import SILENT_LOAD, Step, next_step
from localai_q.cluster.states import (
    COMING_UP,
    JOB_MOVES,
    NODE_MOVES,
    QUANTIZATION_MOVES,
    REPLICA_MOVES,
    JobState,
    NodeState,
    ReplicaState,
    sources,
)

TABLES = [(NodeState, NODE_MOVES), (ReplicaState, REPLICA_MOVES), (JobState, JOB_MOVES), (JobState, QUANTIZATION_MOVES)]

# What `services.replicas` makes of a step that changes the state.
MOVE_OF = {
    Step.INSTALL: ReplicaState.INSTALLING,
    Step.FETCH: ReplicaState.STAGING,
    Step.LOAD: ReplicaState.LOADING,
    Step.FAIL: ReplicaState.FAILED,
}
REPLICA = Replica(id="r", model_id="m", node_id="n", number=1, revision=1, state=ReplicaState.PLACED, slots=1)


@pytest.mark.parametrize(("states", "moves"), TABLES)
def test_a_table_names_every_state_and_leads_to_states_only(states, moves) -> None:
    assert set(moves) == set(states)
    assert all(target in states for targets in moves.values() for target in targets)


@pytest.mark.parametrize(("states", "moves"), TABLES)
def test_no_state_leads_to_itself(states, moves) -> None:
    assert [state for state in states if state in moves[state]] == []


@pytest.mark.parametrize(
    ("moves", "first"),
    [(NODE_MOVES, NodeState.PENDING), (REPLICA_MOVES, ReplicaState.PLACED), (JOB_MOVES, JobState.OPEN)],
)
def test_every_state_can_be_reached_from_the_first(moves, first) -> None:
    reached, edge = {first}, [first]
    while edge:
        new = moves[edge.pop()] - reached
        reached |= new
        edge += new
    assert reached == set(moves)


def test_what_has_ended_stays_ended() -> None:
    assert REPLICA_MOVES[ReplicaState.GONE] == frozenset()
    assert [state for state, targets in JOB_MOVES.items() if targets] == [JobState.OPEN]
    assert QUANTIZATION_MOVES[JobState.DONE] == frozenset()


@pytest.mark.parametrize(("states", "moves"), TABLES)
def test_sources_is_the_table_read_backwards(states, moves) -> None:
    for source, target in itertools.product(states, states):
        assert (source in sources(moves, target)) == (target in moves[source])


def test_a_replica_in_any_state_but_gone_can_fail_or_be_gone() -> None:
    for state in set(ReplicaState) - {ReplicaState.GONE}:
        assert ReplicaState.GONE in REPLICA_MOVES[state]
        assert state is ReplicaState.FAILED or ReplicaState.FAILED in REPLICA_MOVES[state]


@pytest.mark.parametrize("state", ReplicaState)
@pytest.mark.parametrize("job_state", [None, *JobState])
@pytest.mark.parametrize("has_file", [True, False])
@pytest.mark.parametrize("age", [0.0, SILENT_LOAD + 1])
def test_every_step_of_a_replica_is_a_move_that_its_table_allows(state, job_state, has_file, age) -> None:
    job = job_state and Job(id="j", kind="install_backend", state=job_state, line="node.n.jobs")
    step = next_step(replace(REPLICA, state=state), job, has_file=has_file, now=age)
    if step in MOVE_OF:
        assert MOVE_OF[step] in REPLICA_MOVES[state]
    elif step is Step.REMIND:
        assert state in (ReplicaState.LOADING, ReplicaState.STOPPING)
    else:
        assert step is Step.WAIT


def test_all_states_on_the_way_up_lead_to_ready() -> None:
    for state in COMING_UP:
        reached = {state}
        for _ in COMING_UP:
            reached |= {target for seen in reached for target in REPLICA_MOVES[seen] if target in COMING_UP}
        assert any(ReplicaState.READY in REPLICA_MOVES[seen] for seen in reached)
