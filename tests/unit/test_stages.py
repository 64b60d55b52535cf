"""A replica comes up one stage at a time: backend, file, load."""

from dataclasses import replace

import pytest

from localai_q.cluster.jobs import LOAD, Job
from localai_q.cluster.nodes import Replica
from localai_q.cluster.stages import ENDING, SILENT_LOAD, Step, end_of_load, next_step
from localai_q.cluster.states import JobState, ReplicaState
from localai_q.errors import Paused, to_record

REPLICA = Replica(id="r", model_id="m", node_id="n", number=1, revision=1, state=ReplicaState.PLACED, slots=1)
JOB = Job(id="j", kind="install_backend", state=JobState.OPEN, line="node.n.jobs")
S, J = ReplicaState, JobState


@pytest.mark.parametrize(
    ("state", "job", "has_file", "step"),
    [
        (S.PLACED, None, True, Step.INSTALL),
        (S.PLACED, J.FAILED, True, Step.INSTALL),  # a retry: the old stage's job is of no interest
        (S.INSTALLING, J.OPEN, True, Step.WAIT),
        (S.INSTALLING, J.DONE, True, Step.FETCH),
        (S.INSTALLING, J.DONE, False, Step.LOAD),
        (S.INSTALLING, J.FAILED, True, Step.FAIL),
        (S.INSTALLING, J.CANCELLED, True, Step.FAIL),
        (S.INSTALLING, None, True, Step.FAIL),
        (S.STAGING, J.OPEN, True, Step.WAIT),
        (S.STAGING, J.DONE, True, Step.LOAD),
        (S.STAGING, J.FAILED, True, Step.FAIL),
        (S.STAGING, J.CANCELLED, True, Step.FAIL),
        (S.STAGING, None, True, Step.FAIL),
        (S.LOADING, None, True, Step.WAIT),
        (S.READY, None, True, Step.WAIT),
        (S.STOPPING, None, True, Step.WAIT),
        (S.GONE, None, True, Step.WAIT),
        (S.FAILED, None, True, Step.WAIT),
    ],
)
def test_the_next_step_follows_from_the_state_and_the_job_of_its_stage(state, job, has_file, step) -> None:
    replica = replace(REPLICA, state=state, changed=1000.0)
    assert next_step(replica, job and replace(JOB, state=job), has_file=has_file, now=1000.0) is step


@pytest.mark.parametrize("state", [J.FAILED, J.CANCELLED])
@pytest.mark.parametrize("error", [None, to_record(Paused())])
def test_what_could_not_be_loaded_fails_once_its_process_has_had_time_to_end(state, error) -> None:
    replica = replace(REPLICA, state=S.LOADING, changed=1000.0)
    job = replace(JOB, kind=LOAD, state=state, error=error, ended=2000.0)
    assert next_step(replica, job, has_file=True, now=2000.0 + ENDING) is Step.WAIT
    assert next_step(replica, job, has_file=True, now=2000.1 + ENDING) is Step.FAIL
    done = replace(job, state=J.DONE)
    assert next_step(replica, done, has_file=True, now=1001.0 + SILENT_LOAD) is Step.REMIND, "until its node says so"


@pytest.mark.parametrize("state", ReplicaState)
def test_an_open_load_ends_with_what_became_of_its_replica(state) -> None:
    ended = {S.LOADING: None, S.READY: (J.DONE, ""), S.FAILED: (J.FAILED, "why")}
    assert end_of_load(replace(REPLICA, state=state, reason="why")) == ended.get(state, (J.FAILED, "Not needed: why."))


def test_an_open_load_of_nothing_has_failed() -> None:
    assert end_of_load(None) == (J.FAILED, "What was loaded is not there any more.")


def test_what_was_paused_is_waited_for() -> None:
    paused = replace(JOB, state=J.CANCELLED, error=to_record(Paused()))
    assert next_step(replace(REPLICA, state=S.STAGING), paused, has_file=True, now=1000.0) is Step.WAIT


@pytest.mark.parametrize("state", ReplicaState)
def test_only_a_node_that_should_load_or_stop_is_reminded_and_only_after_a_silence(state) -> None:
    replica = replace(REPLICA, state=state, changed=1000.0)
    told = state in (S.LOADING, S.STOPPING)
    assert (next_step(replica, JOB, has_file=True, now=1001.0 + SILENT_LOAD) is Step.REMIND) == told
    assert next_step(replica, JOB, has_file=True, now=999.0 + SILENT_LOAD) is not Step.REMIND


def test_a_node_that_was_told_again_is_given_time() -> None:
    replica = replace(REPLICA, state=S.LOADING, changed=1000.0, told=1040.0)
    assert next_step(replica, None, has_file=True, now=1040.0 + SILENT_LOAD) is Step.WAIT
    assert next_step(replica, None, has_file=True, now=1041.0 + SILENT_LOAD) is Step.REMIND
