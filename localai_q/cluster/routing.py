"""Which line a request joins, and which replica is told of it first. Pure.

A request waits in its model's line, whoever is told: the route only chooses the queue on which the doorbell is rung.
Rung for one replica, it goes to the one that has read the beginning of the prompt, unless that is busier than others;
else to the one with the least to do. Where no replica has a slot free, the first that has one takes it from the model's
queue.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

from localai_q import names
from localai_q.cluster.capacity import cooling
from localai_q.cluster.models import Model, ModelConfig
from localai_q.cluster.nodes import Replica
from localai_q.cluster.placement import hopeless
from localai_q.cluster.speeds import Speeds
from localai_q.cluster.states import COMING_UP, ReplicaState
from localai_q.errors import ModelDisabled, ModelUnavailable, UnsupportedByModel

SAMPLE = 64  # replicas that one decision looks at, the next ones in turn: its cost does not grow with the fleet
STRIDE = 61  # replicas from one turn to the next where there are more: a prime, so that each comes to be the first


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What the registry held a moment ago."""

    models: dict[str, Model]  # by name
    replicas: tuple[Replica, ...]
    node_names: dict[str, str]  # by id
    silent: frozenset[str] = frozenset()  # nodes that have not reported for a while
    speeds: Speeds = field(default_factory=Speeds)  # on nodes where something comes up
    taken: float  # when, in seconds since the epoch by the clock of the registry

    @cached_property
    def of_model(self) -> dict[str, list[Replica]]:
        """Its replicas by the ids of their models."""
        found: dict[str, list[Replica]] = {}
        for each in self.replicas:
            found.setdefault(each.model_id, []).append(each)
        return found

    @cached_property
    def _pools(self) -> dict[str, Pool]:
        return {}

    def pool(self, model: Model) -> Pool:
        """The replicas of the model, put in order once for each snapshot."""
        if model.id not in self._pools:
            self._pools[model.id] = Pool.of(model, self.of_model.get(model.id, ()), self.silent)
        return self._pools[model.id]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The replicas of one model as it is now."""

    every: tuple[Replica, ...]
    ready: tuple[Replica, ...]  # on nodes that report, if there are such
    by_id: Mapping[str, Replica] = field(repr=False)  # of those that are ready

    @classmethod
    def of(cls, model: Model, replicas: Sequence[Replica], silent: Collection[str] = ()) -> Self:
        """The pool that these replicas make, among which may be those of other models. `silent`: nodes, by id."""
        every = tuple(each for each in replicas if each.model_id == model.id and not each.is_outdated(model))
        ready = tuple(each for each in every if each.state is ReplicaState.READY)
        ready = tuple(each for each in ready if each.node_id not in silent) or ready
        return cls(every=every, ready=ready, by_id={each.id: each for each in ready})


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the replicas of a model have to do."""

    in_flight: Mapping[str, int] = field(default_factory=dict)  # jobs at work or on their way, by replica id
    waiting: int = 0  # jobs in the line that are on their way to none
    deaf: Collection[str] = ()  # replicas that did not take a moment ago what they were told of, by id

    def of(self, replica: Replica) -> int:
        return self.in_flight.get(replica.id, 0)

    def free(self, replica: Replica) -> int:
        """Slots that have no job."""
        return max(replica.slots - self.of(replica), 0)


@dataclass(frozen=True, kw_only=True)
class Guards:
    """How much a replica must have read to be preferred, and how much busier it may be than the least busy one."""

    min_match: float = 0.3  # part of the prompt's head
    balance_abs: int = 2  # jobs above the least busy one's
    balance_rel: float = 1.5  # times the least busy one's, and one

    def of(self, config: ModelConfig) -> Guards:
        """These, with what the model has of its own."""
        return replace(
            self,
            min_match=config.min_prefix_match or self.min_match,
            balance_abs=config.balance_abs_threshold or self.balance_abs,
            balance_rel=config.balance_rel_threshold or self.balance_rel,
        )

    def allow(self, load: int, least: int) -> bool:
        return load <= least + self.balance_abs and load <= self.balance_rel * least + 1


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where a request waits, who is told of it, and whether something must be loaded for it."""

    queue: str  # the line
    doorbell: str  # the queue to ring on
    needs_load: bool
    reason: str
    replica_id: str | None = None  # which is told; None: whichever has a slot
    pressed: bool = False  # its load kept the request from the replica that has read most of the prompt


def route(
    model: Model,
    pool: Pool,
    kind: str,
    now: float,
    *,
    load: Load | None = None,
    matched: Mapping[str, float] | None = None,
    guards: Guards | None = None,
    turn: int = 0,
) -> Route:
    """The route of a request of this kind (chat, completion, embedding …).

    Args:
        matched: the part of the prompt's head that replicas have read, by their ids.
        turn: a number that grows with each request, by which equals take turns.

    Raises:
        ModelDisabled: nothing is accepted for it.
        UnsupportedByModel: the model does not serve that kind.
        ModelUnavailable: it failed to load a moment ago, and will not be tried again just yet.
    """
    if model.config.disabled:
        raise disabled(model)
    if kind not in model.config.tasks:
        serves = ", ".join(sorted(model.config.tasks))
        raise UnsupportedByModel(f"The model '{model.name}' does not serve {kind} requests; it serves {serves}.",
                                 param="model")  # fmt: skip
    queue = names.model_queue(model.id)
    if pool.ready:
        if model.config.route_policy == "round_robin":
            matched = None
        return _share(queue, pool, load or Load(), matched or {}, (guards or Guards()).of(model.config), turn)
    if any(replica.state in COMING_UP for replica in pool.every):
        return Route(queue=queue, doorbell=queue, needs_load=False, reason="a replica is coming up")
    failed = [replica for replica in pool.every if hopeless(replica) and cooling(replica, now)]
    if failed:
        raise ModelUnavailable(f"The model '{model.name}' could not be loaded: {failed[-1].reason}")
    return Route(queue=queue, doorbell=queue, needs_load=True, reason="nothing is loaded")


def disabled(model: Model) -> ModelDisabled:
    """What those are told who ask for a model that is, or wait for it."""
    return ModelDisabled(f"The model '{model.name}' is disabled. An admin enables it with 'localai-q models edit "
                         f"{model.name} --no-disabled'.", param="model")  # fmt: skip


def _share(queue: str, pool: Pool, load: Load, matched: Mapping[str, float], guards: Guards, turn: int) -> Route:
    """Choose among the ready replicas."""
    if len(pool.ready) == 1:
        return Route(queue=queue, doorbell=queue, needs_load=False, reason="one replica is ready")
    known = [pool.by_id[each] for each in sorted(matched) if each in pool.by_id]
    looked_at = {each.id: each for each in (*_in_turn(pool.ready, turn), *known) if each.id not in load.deaf}.values()
    if load.waiting >= sum(map(load.free, looked_at)):
        return Route(queue=queue, doorbell=queue, needs_load=False, reason="no slot is free for it")
    least = min(map(load.of, looked_at))
    cost = _cost(load, looked_at)
    hot = [each for each in looked_at if matched.get(each.id, 0.0) >= guards.min_match]
    hot.sort(key=lambda each: (-matched[each.id], cost[each.id]))
    warm = next((each for each in hot if load.free(each) and guards.allow(load.of(each), least)), None)
    chosen = warm or min((each for each in looked_at if load.free(each)), key=lambda each: cost[each.id])
    reason = f"has read {matched[warm.id]:.0%} of the prompt's head" if warm else "has the least to do"
    return Route(queue=queue, doorbell=names.replica_queue(chosen.id), needs_load=False, reason=reason,
                 replica_id=chosen.id, pressed=bool(hot) and chosen is not hot[0])  # fmt: skip


def _in_turn(ready: Sequence[Replica], turn: int) -> Sequence[Replica]:
    """The replicas that are looked at, the one whose turn it is first."""
    start = turn * (STRIDE if len(ready) > SAMPLE else 1) % len(ready)
    return (*ready[start : start + SAMPLE], *ready[: min(max(start + SAMPLE - len(ready), 0), start)])[:SAMPLE]


def _cost(load: Load, replicas: Iterable[Replica]) -> dict[str, float]:
    """How long each would take, relative to the others: jobs with this one, for each slot and token per second."""
    known = [each.speed for each in replicas if each.speed > 0]
    usual = sum(known) / len(known) if known else 1.0
    return {each.id: (load.of(each) + 1) / (each.slots * (each.speed or usual)) for each in replicas}
