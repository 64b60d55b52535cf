"""The next step of a replica on its way up: placed, installing, staging, loading, ready. Pure.

No task waits for a task: each stage is started when the one before it has ended. The job of a load is ended by the
replica's process, which does it; where that could not say so, by what became of the replica.
"""

from __future__ import annotations

from enum import StrEnum

from localai_q.cluster.jobs import Job
from localai_q.cluster.nodes import Replica
from localai_q.cluster.states import JobState, ReplicaState

SILENT_LOAD = 30.0  # seconds after which a node is told again to start or stop a replica
ENDING = 10.0  # seconds in which a process ends whose load has failed: until its node says so, it has its memory


class Step(StrEnum):
    """What to do for a replica now."""

    WAIT = "wait"
    INSTALL = "install"  # have the node install the backend
    FETCH = "fetch"  # have the node fetch the model's file
    LOAD = "load"  # have the node start the replica
    REMIND = "remind"  # tell the node again what it was told
    FAIL = "fail"  # the stage's job has failed


def next_step(replica: Replica, job: Job | None, *, has_file: bool, now: float) -> Step:
    """The step, given the job of the stage that is under way. `now`: seconds since the epoch."""
    if replica.state is ReplicaState.PLACED:
        return Step.INSTALL
    if replica.state in (ReplicaState.INSTALLING, ReplicaState.STAGING):
        if job and (job.state is JobState.OPEN or job.is_paused):
            return Step.WAIT
        if job is None or job.state in (JobState.FAILED, JobState.CANCELLED):
            return Step.FAIL
        return Step.FETCH if replica.state is ReplicaState.INSTALLING and has_file else Step.LOAD
    if replica.state is ReplicaState.LOADING and job and job.state in (JobState.FAILED, JobState.CANCELLED):
        return Step.FAIL if now > (job.ended or 0.0) + ENDING else Step.WAIT
    silent = now > max(replica.changed, replica.told) + SILENT_LOAD
    if replica.state in (ReplicaState.LOADING, ReplicaState.STOPPING) and silent:
        return Step.REMIND
    return Step.WAIT


def end_of_load(replica: Replica | None) -> tuple[JobState, str] | None:
    """How an open load has ended that was for this replica, and why; None: it goes on."""
    if replica is None:
        return JobState.FAILED, "What was loaded is not there any more."
    match replica.state:
        case ReplicaState.LOADING:
            return None
        case ReplicaState.READY:
            return JobState.DONE, ""
        case ReplicaState.FAILED:
            return JobState.FAILED, replica.reason
        case _:
            return JobState.FAILED, f"Not needed: {replica.reason}."
