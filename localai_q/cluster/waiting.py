"""What a request that waits can be told: its place in the line, and how far the model is that must be loaded. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from localai_q.cluster.capacity import backoff
from localai_q.cluster.events import Progress
from localai_q.cluster.models import Model
from localai_q.cluster.nodes import Replica
from localai_q.cluster.speeds import Speeds
from localai_q.cluster.states import COMING_UP, ReplicaState


@dataclass(frozen=True, kw_only=True)
class Load:
    """A model on its way up."""

    model: str
    state: str  # placed | installing | staging | loading
    node: str
    stage: str = ""  # what its job does now, e.g. "downloading"
    done: float = 0.0
    total: float = 0.0  # 0: not known
    unit: str = ""  # "bytes", "packages", or nothing
    eta: float | None = None  # seconds until this stage is done
    ready_in: float | None = None  # seconds until the model is loaded
    since: float = 0.0  # when this state began, in seconds since the epoch
    attempt: int = 1  # 2 after one failure

    def body(self) -> dict[str, Any]:
        """LocalAI's `loading` object, with the time until the model is loaded besides that of the stage."""
        in_bytes = self.unit == "bytes"
        return {
            "model": self.model,
            "state": "pending" if self.state == ReplicaState.PLACED else self.state,
            "node": self.node,
            "progress": round(100 * self.done / self.total, 1) if self.total else 0.0,
            "bytes_sent": int(self.done) if in_bytes else 0,
            "total_bytes": int(self.total) if in_bytes else 0,
            "eta_seconds": None if self.eta is None else math.ceil(self.eta),
            "ready_in_seconds": None if self.ready_in is None else math.ceil(self.ready_in),
            "since": self.since,
            "attempt": self.attempt,
        }

    def __str__(self) -> str:
        parts = [f"{self.model} is {self.state} on {self.node}"]
        if self.total:
            parts.append(f"{100 * self.done / self.total:.0f} % {self.stage}".rstrip())
        if self.eta is not None:
            parts.append(f"about {math.ceil(self.eta)} s left")
        if self.ready_in is not None and self.ready_in != self.eta:
            parts.append(f"ready in about {math.ceil(self.ready_in)} s")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a model is not loaded yet."""

    node: str
    reason: str
    attempts: int  # that have failed, one after the other
    retry_at: float | None  # when it is tried next, in seconds since the epoch; None: it is being tried


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a waiting request stands."""

    place: int  # in its line, from 1
    seconds: float | None = None  # until its turn, about
    load: Load | None = None

    def __str__(self) -> str:
        if self.load:
            return f"waiting: {self.load}"
        about = "" if self.seconds is None else f", about {math.ceil(self.seconds)} s"
        return f"waiting: place {self.place}{about}"


def expected_wait(place: int, slots: int, pace: float | None) -> float | None:
    """Seconds until the request at this place has its turn; None where nothing is known.

    Args:
        slots: requests that the model works on at once.
        pace: seconds that a request takes.
    """
    return None if pace is None or not slots else pace * math.ceil(place / slots)


def load_of(
    model: Model,
    own: Sequence[Replica],
    node_names: dict[str, str],
    progress: dict[str, Progress],
    speeds: Speeds,
    now: float,
) -> Load | None:
    """The load that is furthest on its way up; None when a replica is ready or none is coming.

    Args:
        own: the model's replicas.
        progress: of the stages' jobs, by job id.
        speeds: what was measured on the nodes where the replicas are.
        now: seconds since the epoch.
    """
    coming = [replica for replica in own if replica.state in COMING_UP]
    if not coming or any(replica.state is ReplicaState.READY for replica in own):
        return None
    first = max(coming, key=lambda replica: (COMING_UP.index(replica.state), replica.id))
    node = node_names.get(first.node_id, first.node_id)
    found = Load(model=model.name, state=first.state, node=node, since=first.changed, attempt=first.failures + 1)
    loading = speeds.load_seconds(model, first.node_id) or None
    spent = max(now - first.changed, 0.0)
    if first.state is ReplicaState.LOADING:
        left = None if loading is None else max(loading - spent, 0.0)
        return replace(found, eta=left, ready_in=left)
    at = progress.get(first.job_id or "") or Progress(stage="", done=0.0, total=0.0)
    eta = spent * (at.total - at.done) / at.done if at.total and at.done and spent else None
    last = first.state is ReplicaState.STAGING  # what is to be fetched after an installation is not known before
    ready_in = eta + loading if last and eta is not None and loading is not None else None
    return replace(found, stage=at.stage, done=at.done, total=at.total, unit=at.unit, eta=eta, ready_in=ready_in)


def failure_of(own: Sequence[Replica], node_names: dict[str, str]) -> Failure | None:
    """The last failure to load a model with these replicas; None when one is ready, or none has failed."""
    failed = [replica for replica in own if replica.failures and replica.state in (ReplicaState.FAILED, *COMING_UP)]
    if not failed or any(replica.state is ReplicaState.READY for replica in own):
        return None
    last = max(failed, key=lambda replica: (replica.state is ReplicaState.FAILED, replica.changed, replica.id))
    retry_at = last.changed + backoff(last.failures) if last.state is ReplicaState.FAILED else None
    node = node_names.get(last.node_id, last.node_id)
    return Failure(node=node, reason=last.reason, attempts=last.failures, retry_at=retry_at)
