"""Backends on nodes: who a request for many nodes is for, and what becomes of it on each. Pure.

What is wanted of a backend on a node is a wish: it stays until it is fulfilled or given up, whatever is away meanwhile. A
later wish for the same backend on the same node takes the place of the one before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from localai_q.cluster.builds import Build, choose, suitable
from localai_q.cluster.jobs import Job
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState, NodeState
from localai_q.errors import NodeGone

REACHABLE = (NodeState.READY, NodeState.DRAINING, NodeState.DRAINED)
FIRST_PAUSE = 30.0  # seconds before a wish that failed is tried again; each further time twice as long
LONGEST_PAUSE = 900.0
MOST_ATTEMPTS = 10  # after which it is given up, and shown so


class Op(StrEnum):
    """What is to be done with a backend on a node."""

    INSTALL = "install"
    UPGRADE = "upgrade"  # make it anew, of the newest that its entry names
    DELETE = "delete"

    @property
    def kind(self) -> str:
        """The kind of job that does it."""
        return f"{self}_backend"


class WishState(StrEnum):
    """How far a wish is."""

    OPEN = "open"
    DONE = "done"
    DEAD = "dead"  # given up after `MOST_ATTEMPTS`
    CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is wanted of a backend on a node."""

    node_id: str
    backend: str
    op: Op
    operation: str  # the id of the request, which may be for many nodes
    entry: dict[str, Any] | None = None  # of a gallery; None: the node's own version has it
    state: WishState = WishState.OPEN
    attempts: int = 0  # that failed
    last_error: str = ""
    next_try: float = 0.0  # seconds since the epoch, like the next
    created: float = 0.0
    job_id: str | None = None  # of the attempt that is under way


class Step(StrEnum):
    """What to do about a wish now."""

    WAIT = "wait"
    BEGIN = "begin"  # give the node a job
    DONE = "done"
    CANCELLED = "cancelled"
    AGAIN = "again"  # the attempt does not count, for its node went away
    FAILED = "failed"  # the attempt failed


def next_step(wish: Wish, job: Job | None, *, reachable: bool, now: float) -> Step:
    """The step, given the job of the attempt that is under way."""
    if wish.state is not WishState.OPEN:
        return Step.WAIT
    if wish.job_id is None:
        return Step.BEGIN if reachable and now >= wish.next_try else Step.WAIT
    if job is None:
        return Step.AGAIN
    match job.state:
        case JobState.DONE:
            return Step.DONE
        case JobState.CANCELLED:
            return Step.CANCELLED
        case JobState.FAILED:
            went_away = not reachable or (job.error or {}).get("error") == NodeGone.__name__
            return Step.AGAIN if went_away else Step.FAILED
    return Step.WAIT


def pause(attempts: int) -> float:
    """Seconds until the next try after so many failed ones."""
    return float(min(FIRST_PAUSE * 2 ** (attempts - 1), LONGEST_PAUSE))


@dataclass(frozen=True, kw_only=True)
class Installed:
    """A backend as a node reports it."""

    name: str
    version: str
    digest: str
    build: str
    installed_at: float = 0.0


def installed_on(node: Node) -> list[Installed]:
    """What a node has said last."""
    return [Installed(**backend) for backend in node.hardware.get("backends") or ()]


def has(node: Node, backend: str) -> bool:
    return any(found.name == backend for found in installed_on(node))


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The nodes that a request is for, and why it is for none of the others."""

    nodes: list[Node]
    others: dict[str, str]  # reason by name


def targets(
    op: Op, backend: str, builds: Collection[Build], nodes: Sequence[Node], *, only: Collection[str] = (),
    selector: Mapping[str, str] | None = None, wished: Collection[str] = (),
) -> Targets:  # fmt: skip
    """Who a request is for: an install for all nodes that can run it, anything else for those that have it.

    Args:
        only: ids or names of nodes; none: all.
        selector: labels that they must have.
        wished: ids of nodes that are still to get it, which it is deleted on, too.
    """
    theirs = wished if op is Op.DELETE else ()
    reasons = {node.id: _not_for(op, backend, builds, node, only, selector or {}, theirs) for node in nodes}
    return Targets(
        nodes=[node for node in nodes if not reasons[node.id]],
        others={node.name: reason for node in nodes if (reason := reasons[node.id])},
    )


def _not_for(
    op: Op, backend: str, builds: Collection[Build], node: Node, only: Collection[str], selector: Mapping[str, str],
    wished: Collection[str],
) -> str:  # fmt: skip
    if only and node.id not in only and node.name not in only:
        return "it is not named"
    if not node.approved:
        return "it is not approved"
    if missing := [f"{key}={value}" for key, value in selector.items() if node.labels.get(key) != value]:
        return f"it lacks the label {', '.join(missing)}"
    if op is Op.INSTALL and choose(builds, node.hardware) is None:
        return f"it has {', '.join(suitable(node.hardware))}, and the backend is made for {', '.join(builds)}"
    if op is not Op.INSTALL and not has(node, backend) and node.id not in wished:
        return "it does not have it"
    return ""


def outdated(name: str, version: str, nodes: Sequence[Node]) -> list[tuple[Node, Installed]]:
    """The nodes that have a backend in another version than the one that is to be had, with what they have."""
    return [
        (node, found)
        for node in nodes
        for found in installed_on(node)
        if found.name == name and found.version != version
    ]


def drifts(found: Collection[Installed]) -> bool:
    """Whether nodes of the same kind have different versions of a backend."""
    return any(len({(other.version, other.digest) for other in found if other.build == one.build}) > 1 for one in found)
