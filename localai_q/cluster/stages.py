"""The next step of a replica on its way up: placed, installing, staging, loading, ready. Pure.

No task waits for a task: each stage is started when the one before it has ended.
"""

from __future__ import annotations

from enum import StrEnum

from localai_q.cluster.jobs import Job
from localai_q.cluster.nodes import Replica
from localai_q.cluster.states import JobState, ReplicaState

SILENT_LOAD = 30.0  # seconds after which a node is told again to start or stop a replica


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
    silent = now > max(replica.changed, replica.told) + SILENT_LOAD
    if replica.state in (ReplicaState.LOADING, ReplicaState.STOPPING) and silent:
        return Step.REMIND
    return Step.WAIT
