"""What a node says of its replicas' processes, held against what the registry has. Pure.

The registry says what should be, the node what is. Between the two:

- A process that the registry does not know is adopted, where it could have been placed just so: its model exists in that
  revision, may be on that node, and has no replica there yet. Else it is told to stop.
- A replica that is said to load and whose process is ready, is ready.
- A replica that should have a process and was without one in two reports in a row is lost.
- A process of a replica that is not to have one (it failed, or is about to be started anew) is told to stop.

A report says nothing of what was decided after it was made. As a node makes each report after the answer to the one before,
a report is younger than all that had been decided when the one before it came.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from localai_q.cluster.capacity import WITHOUT_PROCESS, limit, matches
from localai_q.cluster.groups import rivals_of
from localai_q.cluster.models import Model
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.states import COMING_UP, NodeState, ReplicaState

MOST_REPLICAS = 500  # of one node
RUNNING = (ReplicaState.LOADING, ReplicaState.READY)  # there should be a process
WITHOUT = (*COMING_UP[:-1], ReplicaState.FAILED)  # there should be none

Id = Annotated[str, Field(pattern=r"^[a-z0-9]{1,64}$")]
Number = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class Report(BaseModel):
    """A replica's process, as its node sees it. What is not known here is dropped: a node may be newer than its API."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, protected_namespaces=())

    id: Id
    model_id: Id
    revision: int = Field(ge=1, lt=1 << 31)
    number: int = Field(ge=1, le=1000)
    state: Literal["loading", "ready", "stopping", "failed"]
    slots: int = Field(ge=1, le=256)
    context_size: int = Field(0, ge=0, lt=1 << 31)  # tokens of one request
    gpu: bool = False  # whether memory of GPUs was booked for it
    in_flight: int = Field(0, ge=0, le=1 << 20)  # requests that it works on
    tokens_per_second: Number = 0.0  # of one answer; 0: not measured yet
    load_seconds: Number = 0.0  # from its start until it was ready; 0: it is not yet


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What follows from a report."""

    adopt: list[Report] = field(default_factory=list)
    ready: list[Replica] = field(default_factory=list)  # whose processes are
    lost: list[Replica] = field(default_factory=list)  # their processes are no more
    missed: frozenset[str] = frozenset()  # replicas whose processes were missing, so far once
    stop: dict[str, str] = field(default_factory=dict)  # why, by replica id


def compare(
    node: Node,
    reports: Sequence[Report],
    own: Sequence[Replica],
    models: Mapping[str, Model],
    strangers: Collection[str],
) -> Comparison:
    """Hold a report against the registry.

    Args:
        own: the replicas that the registry has on the node.
        models: those of `own` and of the reported processes, by id, as far as they exist.
        strangers: the ids of reported processes that are replicas of other nodes.
    """
    told = {report.id: report for report in reports}
    since = node.reported or 0.0
    older = [replica for replica in own if max(replica.changed, replica.told) < since]
    absent = [replica for replica in older if replica.state in RUNNING and replica.id not in told]
    lost = [replica for replica in absent if replica.id in node.missed]
    stop = {
        replica.id: f"it is {replica.state}" for replica in older if replica.id in told and replica.state in WITHOUT
    }
    adopt: list[Report] = []
    taken = {(replica.model_id, replica.number) for replica in own}
    busy = Counter(replica.model_id for replica in own if replica.state not in WITHOUT_PROCESS)
    known = {replica.id for replica in own}
    for report in reports:
        if report.id in known:
            continue
        reason = "it is another node's" if report.id in strangers else _unfit(node, report, models, taken, busy)
        if reason:
            stop[report.id] = reason
        else:
            adopt.append(report)
            taken.add((report.model_id, report.number))
            busy[report.model_id] += 1
    return Comparison(
        adopt=adopt,
        ready=[replica for replica in older
               if replica.state is ReplicaState.LOADING and replica.id in told and told[replica.id].state == "ready"],
        lost=lost,
        missed=frozenset(replica.id for replica in absent) - {replica.id for replica in lost},
        stop=stop,
    )  # fmt: skip


def _unfit(
    node: Node, report: Report, models: Mapping[str, Model], taken: Collection[tuple[str, int]], busy: Counter[str]
) -> str:
    """Why a process without a replica cannot be one; empty if it can."""
    model = models.get(report.model_id)
    if report.state not in RUNNING:
        return f"it is {report.state}"
    if node.state not in (NodeState.READY, NodeState.DRAINING):
        return f"node {node.name} is {node.state}"
    if model is None:
        return "its model was removed"
    if report.revision != model.revision:
        return f"model {model.name} was changed"
    if not matches(model, node):
        return f"node {node.name} lacks a label that model {model.name} asks for"
    if (model.id, report.number) in taken:
        return f"node {node.name} has another replica of model {model.name}"
    if busy[model.id] >= limit(model, node):
        return f"node {node.name} has as many replicas of model {model.name} as it may"
    rivals = [name for model_id, name in rivals_of(model, models.values()).items() if busy[model_id]]
    return f"node {node.name} has model {rivals[0]}, which excludes {model.name}" if rivals else ""
