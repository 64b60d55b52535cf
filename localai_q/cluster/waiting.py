"""What a request that waits can be told: its place in the line, and how far the model is that must be loaded. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from localai_q.cluster.events import Progress
from localai_q.cluster.nodes import Replica
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

    def body(self) -> dict[str, Any]:
        """LocalAI's `loading` object."""
        in_bytes = self.unit == "bytes"
        return {
            "model": self.model,
            "state": "pending" if self.state == ReplicaState.PLACED else self.state,
            "node": self.node,
            "progress": round(100 * self.done / self.total, 1) if self.total else 0.0,
            "bytes_sent": int(self.done) if in_bytes else 0,
            "total_bytes": int(self.total) if in_bytes else 0,
            "eta_seconds": None if self.eta is None else math.ceil(self.eta),
        }

    def __str__(self) -> str:
        parts = [f"{self.model} is {self.state} on {self.node}"]
        if self.total:
            parts.append(f"{100 * self.done / self.total:.0f} % {self.stage}".rstrip())
        if self.eta is not None:
            parts.append(f"about {math.ceil(self.eta)} s left")
        return ", ".join(parts)


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
    model: str, own: Sequence[Replica], node_names: dict[str, str], progress: dict[str, Progress], now: float
) -> Load | None:
    """The load that is furthest on its way up; None when a replica is ready or none is coming.

    Args:
        own: the model's replicas.
        progress: of the stages' jobs, by job id.
        now: seconds since the epoch.
    """
    coming = [replica for replica in own if replica.state in COMING_UP]
    if not coming or any(replica.state is ReplicaState.READY for replica in own):
        return None
    first = max(coming, key=lambda replica: (COMING_UP.index(replica.state), replica.id))
    node = node_names.get(first.node_id, first.node_id)
    at = progress.get(first.job_id or "")
    if at is None:
        return Load(model=model, state=first.state, node=node)
    spent = now - first.changed
    eta = spent * (at.total - at.done) / at.done if at.total and at.done and spent > 0 else None
    return Load(model=model, state=first.state, node=node, stage=at.stage, done=at.done, total=at.total, unit=at.unit,
                eta=eta)  # fmt: skip
