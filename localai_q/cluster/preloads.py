"""When a node is to fetch the files of a model that nobody has asked for yet. Pure.

A model that says `preload` has its files on some node. Where a fetch fails, the next one is tried after a pause that
grows, up to a most; one that was cancelled is not tried again until the model has another file. Who forgets it lets
the model no more say `preload` (`store.jobs.forget`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import StrEnum

from localai_q.cluster.backends import MOST_ATTEMPTS, pause
from localai_q.cluster.jobs import Job
from localai_q.cluster.models import ModelConfig
from localai_q.cluster.states import JobState

SETTLES = 60.0  # seconds in which a node reports what it has fetched


class Standing(StrEnum):
    """How it stands with the files of a model."""

    THERE = "there"  # on some node
    COMING = "coming"  # a job is under way, or its node has not reported yet
    DUE = "due"  # somebody is to fetch them now
    WAITING = "waiting"  # for the next try
    GIVEN_UP = "given up"


def standing(config: ModelConfig, on_nodes: Sequence[Collection[str]], fetches: Sequence[Job], now: float) -> Standing:
    """How it stands, given the files of each node, and the fetches for this model's source, the newest first."""
    if all(file.sha256 for file in config.files) and any(config.contents <= set(files) for files in on_nodes):
        return Standing.THERE
    if not fetches:
        return Standing.DUE
    last = fetches[0]
    ended = last.ended or now
    match last.state:
        case JobState.OPEN:
            return Standing.COMING
        case JobState.CANCELLED:
            return Standing.GIVEN_UP
        case JobState.DONE:
            return Standing.COMING if now < ended + SETTLES else Standing.DUE
    failures = next((n for n, job in enumerate(fetches) if job.state is not JobState.FAILED), len(fetches))
    if failures >= MOST_ATTEMPTS:
        return Standing.GIVEN_UP
    return Standing.WAITING if now < ended + pause(failures) else Standing.DUE
