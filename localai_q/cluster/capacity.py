"""What a node has left, and whether a model can go there. Pure.

A node's free memory is what it says is available, less what was booked and does not show in that yet; and not more than
its budget leaves over what is booked in all. A booking lasts as long as its replica. It is taken off what the node says
until the replica is ready and the node has reported since: from then on its use is in the node's own numbers, but for
the bytes that never show there (`Replica.unseen`).

A node that does not say how much it has is taken to have room. One that counts as ready and has said nothing for long
gets nothing new before it speaks: what lives there may not be in the registry, as when that is a copy from a backup.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from localai_q.cluster.amounts import part_of
from localai_q.cluster.builds import BUILDS, Build, leave_gpus_alone, uses_gpus
from localai_q.cluster.disk import SPARE, spare
from localai_q.cluster.memory import Memory, Need, need, need_within
from localai_q.cluster.models import Model
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.states import NodeState, ReplicaState

UNLIMITED = 1 << 60  # bytes
BACKOFF_FIRST = 1.0  # seconds
BACKOFF_MOST = 300.0
UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
NOTHING = Memory()
WITHOUT_PROCESS = (ReplicaState.FAILED, ReplicaState.GONE)


class Seeker:
    """A model that looks for a place, with what is the same wherever it looks."""

    def __init__(
        self,
        model: Model,
        *,
        builds: Collection[Build],
        rivals: Mapping[str, str] | None = None,
        patience: float = math.inf,
    ) -> None:
        """`builds`: what its backend is made for. `rivals`: the models that must not be on its node, name by id.
        `patience`: seconds since a node's last heartbeat after which it gets nothing new."""
        self.model = model
        self.patience = patience
        self.rivals = rivals or {}
        self._builds = builds
        self._needs: dict[int, Need | None] = {}

    def need(self, site: Site) -> Need | None:
        """What a replica takes there; None where nothing is known of the model."""
        config = self.model.config
        gpus = site.gpus if site.gpus and uses_gpus(self._builds, site.node.hardware) else 0
        if config.fit_context:
            return need_within(config, self.model.facts, gpus, site.free)
        if gpus not in self._needs:
            self._needs[gpus] = need(config, self.model.facts, gpus)
        return self._needs[gpus]


class Site:
    """A node with what is on it, the oldest first. Never changes, so that each figure is found once."""

    def __init__(self, node: Node, there: Iterable[Replica], returned: Memory = NOTHING) -> None:
        """`returned`: bytes that become free beyond those that the node said it has."""
        self.node = node
        self.there = tuple(there)
        self._returned = returned

    def without(self, gone: Collection[Replica]) -> Site:
        """The node as it will be when these have gone.

        What is stopping is taken to use all that was booked for it, also where its node has not reported since it was told
        to stop: who waits for that room is not to take more of it elsewhere.
        """
        ids = {replica.id for replica in gone}
        returned = NOTHING
        for replica in gone:
            if replica.state is ReplicaState.STOPPING or _settled(replica, self.node):
                returned += replica.reserved - Memory(ram=replica.unseen)
        return Site(self.node, [replica for replica in self.there if replica.id not in ids], returned)

    @cached_property
    def gpus(self) -> int:
        return len(_gpus(self.node))

    @cached_property
    def files(self) -> frozenset[str]:
        """The SHA-256 of the models that lie there, as the node said when it last reported."""
        files = self.node.hardware.get("files")
        return frozenset(files) if isinstance(files, list) else frozenset()

    @cached_property
    def free(self) -> Memory:
        """Bytes that are not used and not booked; may be less than nothing."""
        room, most = available(self.node) + self._returned, budget(self.node)
        ram, vram, ram_booked, vram_booked = room.ram, room.vram, 0, 0
        for replica in self.there:
            if replica.state not in WITHOUT_PROCESS:
                settled, reserved = _settled(replica, self.node), replica.reserved
                ram -= replica.unseen if settled else reserved.ram
                vram -= 0 if settled else reserved.vram
                ram_booked += reserved.ram
                vram_booked += reserved.vram
        if self.gpus:
            return Memory(ram, min(vram, most - vram_booked))
        return Memory(min(ram, most - ram_booked), vram)

    def own(self, model: Model) -> list[Replica]:
        """The replicas there of the model as it is now."""
        return [each for each in self.there if each.model_id == model.id and not each.is_outdated(model)]

    def number(self, model_id: str) -> int:
        """The least number that none of the model's replicas there has, from 1."""
        taken = {replica.number for replica in self.there if replica.model_id == model_id}
        return next(number for number in range(1, len(taken) + 2) if number not in taken)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a model can go to a node."""

    site: Site
    need: Need | None = None  # None: not known
    why: Callable[[], str] | None = None  # puts into words why it cannot; None: it can
    crowded: bool = False  # it could, if something there went
    rivals: frozenset[str] = frozenset()  # replicas that would have to

    @property
    def node(self) -> Node:
        return self.site.node

    @property
    def fits(self) -> bool:
        return self.why is None

    @property
    def reason(self) -> str:
        """Why it cannot; empty: it can."""
        return self.why() if self.why else ""


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


def examine(seeker: Seeker, site: Site, now: float) -> Verdict:
    """Whether a replica of the model can go there. `now`: seconds since the epoch."""
    why = _unfit(seeker, site, now)
    return Verdict(site=site, why=why) if why else weigh(seeker, site)


def weigh(seeker: Seeker, site: Site) -> Verdict:
    """Whether what is there leaves enough memory for a replica, and tolerates it."""
    need = seeker.need(site)
    rivals = [r for r in site.there if r.model_id in seeker.rivals and r.state not in WITHOUT_PROCESS]
    short = need is not None and not need.memory.within(site.free)
    if not short and not rivals:
        return Verdict(site=site, need=need)

    def why() -> str:
        words = (
            [f"shares a group with {', '.join(sorted({seeker.rivals[r.model_id] for r in rivals}))}"] if rivals else []
        )
        return " and ".join([*words, *([_short(need, site.free)] if need and short else [])])

    return Verdict(site=site, need=need, why=why, crowded=True, rivals=frozenset(r.id for r in rivals))


def is_silent(node: Node, now: float, patience: float) -> bool:
    """Whether nothing was heard of the node for longer than so many seconds. `now`: seconds since the epoch."""
    return now - (node.last_heartbeat or 0.0) > patience


def limit(model: Model, node: Node) -> int:
    """How many replicas of the model the node may have."""
    return 1 if model.config.spread_all else node.replica_slots


def available(node: Node) -> Memory:
    """Bytes that the node said it has free."""
    return Memory(
        ram=_number(node.hardware, "ram_available"), vram=sum(_number(gpu, "vram_free") for gpu in _gpus(node))
    )


def disk_free(node: Node) -> int:
    """Bytes that the node said its models' folder has left."""
    return _number(node.hardware, "disk_free")


def disk_spare(node: Node, payload: int) -> int:
    """Bytes that stay free of the node's disk when so many come."""
    return spare(payload, _number(node.hardware, "disk_spare", SPARE))


def budget(node: Node) -> int:
    """Bytes that models may take: of the GPUs' memory, or of RAM where there are none."""
    told = _number(node.hardware, "budget")
    if not node.given_budget:
        return told
    total = sum(_number(gpu, "vram_total") for gpu in _gpus(node)) or _number(node.hardware, "ram_total")
    if total >= UNLIMITED and node.given_budget.endswith("%"):
        return told  # a part of nobody knows what
    return part_of(total, node.given_budget)


def matches(model: Model, node: Node) -> bool:
    """Whether the node has the labels that the model asks for."""
    return model.config.selector.items() <= node.labels.items()


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


def _unfit(seeker: Seeker, site: Site, now: float) -> Callable[[], str] | None:
    """Puts into words why the node is out of the question, whatever went from there; None if it is not."""
    model, node = seeker.model, site.node
    if node.state is not NodeState.READY:
        return lambda: str(node.state)
    if is_silent(node, now, seeker.patience):
        return lambda: f"has not reported for {seeker.patience:.0f} s"
    if not matches(model, node):
        return lambda: _lacking(model, node)
    own = site.own(model)
    if own:
        failed = next((replica for replica in own if cooling(replica, now)), None)
        if failed:
            return lambda: f"failed: {failed.reason}"
        holding = [replica for replica in own if replica.state not in WITHOUT_PROCESS]
        if len(holding) >= limit(model, node):
            return lambda: _full(holding)
    needed, disk = _disk_need(model, site), disk_free(node)
    return (lambda: f"needs {human(needed)} of disk, {human(disk)} free") if needed > disk else None


def _lacking(model: Model, node: Node) -> str:
    return "lacks the label " + ", ".join(
        f"{name}={value}" for name, value in sorted(model.config.selector.items()) if node.labels.get(name) != value
    )


def _full(holding: list[Replica]) -> str:
    if len(holding) == 1:
        return f"has a replica that is {holding[0].state}"
    return f"has {len(holding)} replicas, as many as it may"


def _disk_need(model: Model, site: Site) -> int:
    config = model.config
    own = [file for file in config.own if file.sha256 not in site.files]
    whole = model.facts is not None and len(own) == len(config.own)
    size = model.facts.file_size if model.facts and whole else sum(file.size for file in own)
    copies = 2 if config.source.startswith("pypi:") else 1  # the wheel, and what is taken out of it
    needed = size * copies + sum(file.size for file in config.further if file.sha256 not in site.files)
    return needed + disk_spare(site.node, needed) if needed else 0


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
    """The GPUs that have memory of their own and that models may use; what runs on others takes the machine's."""
    found = None if leave_gpus_alone(node.hardware.get("builds", BUILDS)) else node.hardware.get("gpus")
    gpus = [gpu for gpu in found if isinstance(gpu, dict)] if isinstance(found, list) else []
    return [gpu for gpu in gpus if _number(gpu, "vram_total") < UNLIMITED]


def _number(record: dict[str, Any], name: str, default: int = UNLIMITED) -> int:
    """A number of bytes that a node has reported, of whatever version it is."""
    value = record.get(name)
    return int(value) if isinstance(value, int | float) and 0 <= value < UNLIMITED else default
