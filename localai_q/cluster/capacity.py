"""What a node has left, and whether a model can go there. Pure.

A node's free memory is what it says is available, less what was booked and does not show in that yet; and not more than
its budget leaves over what is booked in all. A booking lasts as long as its replica. It is taken off what the node says
until the replica is ready and the node has reported since: from then on its use is in the node's own numbers, but for
the bytes that never show there (`Replica.unseen`).

A node that does not say how much it has is taken to have room.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from localai_q.cluster.memory import Memory, Need, need_within
from localai_q.cluster.models import Model
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.states import NodeState, ReplicaState

UNLIMITED = 1 << 60  # bytes
DISK_SPARE = 64 << 20  # bytes that a fetch leaves free
BACKOFF_FIRST = 1.0  # seconds
BACKOFF_MOST = 300.0
UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a model can go to a node."""

    node: Node
    need: Need | None  # None: not known
    free: Memory
    reason: str = ""  # why it cannot; empty: it can
    crowded: bool = False  # it could, if there were more memory free


@dataclass(frozen=True, kw_only=True)
class Booking:
    """What is kept for a replica on its node."""

    memory: Memory = field(default_factory=Memory)
    unseen: int = 0  # bytes of its RAM that the node does not report as used
    context_size: int = 0  # tokens of one request, where that was cut to fit; 0: as the model has it


def booking(model: Model, verdict: Verdict) -> Booking:
    """What is to be kept for a replica of the model where the verdict says that it fits."""
    need = verdict.need
    if need is None:
        return Booking()
    cut = need.context_size if need.context_size < model.config.context_size else 0
    return Booking(memory=need.memory, unseen=need.unseen, context_size=cut)


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(BACKOFF_FIRST * 2.0 ** max(failures - 1, 0), BACKOFF_MOST)


def cooling(replica: Replica, now: float) -> bool:
    """Whether a failed replica must not be tried again yet. `now`: seconds since the epoch."""
    return replica.state is ReplicaState.FAILED and now < replica.changed + backoff(replica.failures)


def examine(model: Model, node: Node, there: Sequence[Replica], *, gpu: bool, now: float) -> Verdict:
    """Whether a replica of the model can go to the node, where these replicas are.

    Args:
        gpu: whether the model's backend uses GPUs.
        now: seconds since the epoch.
    """
    reason = _unfit(model, node, there, now)
    return Verdict(node=node, need=None, free=Memory(), reason=reason) if reason else weigh(model, node, there, gpu=gpu)


def weigh(model: Model, node: Node, others: Sequence[Replica], *, gpu: bool) -> Verdict:
    """Whether the memory that these replicas leave free is enough for one of the model."""
    room = free(node, others)
    wanted = need_within(model.config, model.facts, len(_gpus(node)) if gpu else 0, room)
    if wanted is None or wanted.memory.within(room):
        return Verdict(node=node, need=wanted, free=room)
    return Verdict(node=node, need=wanted, free=room, reason=_short(wanted, room), crowded=True)


def free(node: Node, there: Iterable[Replica]) -> Memory:
    """Bytes that are not used and not booked; may be less than nothing."""
    holding = [replica for replica in there if replica.state not in (ReplicaState.FAILED, ReplicaState.GONE)]
    booked, pending = Memory(), Memory()
    for replica in holding:
        booked += replica.reserved
        pending += Memory(ram=replica.unseen) if _settled(replica, node) else replica.reserved
    left = available(node) - pending
    budget = _number(node.hardware, "budget")
    if _gpus(node):
        return Memory(left.ram, min(left.vram, budget - booked.vram))
    return Memory(min(left.ram, budget - booked.ram), left.vram)


def available(node: Node) -> Memory:
    """Bytes that the node said it has free."""
    return Memory(
        ram=_number(node.hardware, "ram_available"), vram=sum(_number(gpu, "vram_free") for gpu in _gpus(node))
    )


def has_file(model: Model, node: Node) -> bool:
    """Whether the model's file lies on the node, as it said when it last reported."""
    files = node.hardware.get("files")
    return isinstance(files, list) and model.config.sha256 in files


def matches(model: Model, node: Node) -> bool:
    """Whether the node has the labels that the model asks for."""
    return all(node.labels.get(name) == value for name, value in model.config.selector.items())


def human(amount: int) -> str:
    """Bytes as people say them: 3.1 GB."""
    for unit, name in UNITS:
        if abs(amount) >= unit:
            return f"{amount / unit:.1f} {name}"
    return f"{amount} B"


def _settled(replica: Replica, node: Node) -> bool:
    """Whether the node has reported since the replica had all that it needs."""
    return (
        replica.state in (ReplicaState.READY, ReplicaState.STOPPING)
        and node.last_heartbeat is not None
        and node.last_heartbeat >= replica.changed
    )


def _unfit(model: Model, node: Node, there: Sequence[Replica], now: float) -> str:
    """Why the node is out of the question, however much memory it has; empty if it is not."""
    if node.state is not NodeState.READY:
        return str(node.state)
    if not matches(model, node):
        return "lacks the label " + ", ".join(
            f"{name}={value}" for name, value in sorted(model.config.selector.items()) if node.labels.get(name) != value
        )
    own = next((replica for replica in there if replica.model_id == model.id), None)
    if own and own.state is ReplicaState.FAILED:
        return f"failed: {own.reason}" if cooling(own, now) else ""
    if own:
        return f"has a replica that is {own.state}"
    disk, needed = _number(node.hardware, "disk_free"), _disk_need(model, node)
    return f"needs {human(needed)} of disk, {human(disk)} free" if needed > disk else ""


def _disk_need(model: Model, node: Node) -> int:
    size = model.facts.file_size if model.facts else model.config.size
    if not size or has_file(model, node):
        return 0
    copies = 2 if model.config.source.startswith("pypi:") else 1  # the wheel, and what is taken out of it
    return size * copies + DISK_SPARE


def _short(wanted: Need, room: Memory) -> str:
    lacking = [
        f"needs {human(needed)}{kind}, {human(max(left, 0))} free"
        for needed, left, kind in (
            (wanted.memory.ram, room.ram, ""),
            (wanted.memory.vram, room.vram, " of GPU memory"),
        )
        if needed > max(left, 0)
    ]
    return " and ".join(lacking) + (f" ({wanted.note})" if wanted.note else "")


def _gpus(node: Node) -> list[dict[str, Any]]:
    found = node.hardware.get("gpus")
    return [gpu for gpu in found if isinstance(gpu, dict)] if isinstance(found, list) else []


def _number(record: dict[str, Any], name: str) -> int:
    """A number of bytes that a node has reported, of whatever version it is."""
    value = record.get(name)
    return int(value) if isinstance(value, int | float) and 0 <= value < UNLIMITED else UNLIMITED
