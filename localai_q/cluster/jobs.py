"""What a job is: anything that was accepted and must end exactly once. Pure values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from localai_q.cluster.events import Usage
from localai_q.cluster.states import JobState
from localai_q.errors import Paused

GENERATIONS = ("chat", "completion", "embedding", "rerank")  # kinds that any replica of the model may do
BACKEND_JOBS = ("install_backend", "upgrade_backend", "delete_backend")
FILE_JOBS = ("fetch_model", "clean_models", "check_file", "scan_files", "import_files", "quantize")
LOAD = "load_model"  # waits in the line of a replica, whose process does it
NODE_JOBS = (*BACKEND_JOBS, *FILE_JOBS, LOAD)  # kinds that a certain node must do
DOWNLOADS = ("fetch_model",)  # kinds that go on from where they were when they are done again
DEATHS = 2  # a generation that so many owners died of is not tried again
GRACE = 20.0  # seconds for which a job goes on without a reader who may come back


class Keep(StrEnum):
    """What becomes of a generation when its last reader disconnects."""

    NOT = "not"  # it is cancelled
    GRACE = "grace"  # it is cancelled after `GRACE`
    BACKGROUND = "background"  # it goes on to its end


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as its row tells it. Who works on it now stands in its lease."""

    id: str
    kind: str
    state: JobState
    line: str  # the queue in which it waits
    model_id: str | None = None
    node_id: str | None = None
    key_id: str | None = None
    request: dict[str, Any] | None = None  # None once the job has ended
    subject: str = ""  # the backend or model that a node's job is about
    stream: bool = False
    keep: Keep = Keep.NOT
    attempt: int = 0
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    usage: Usage = field(default_factory=Usage)
    timings: dict[str, float] = field(default_factory=dict)
    deadline: float | None = None  # seconds since the epoch, like the next two
    created: float = 0.0
    ended: float | None = None

    @property
    def is_paused(self) -> bool:
        """Whether it was cancelled to be done again later, and what needs it waits for that."""
        return self.state is JobState.CANCELLED and is_pause(self.error)


def is_pause(error: dict[str, Any] | None) -> bool:
    """Whether a job that has ended with this error is to be done again later."""
    return (error or {}).get("error") == Paused.__name__
