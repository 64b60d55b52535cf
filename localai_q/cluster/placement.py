"""Where replicas should be, given what is there and what is wanted. Pure.

The decision, in order:

1. A replica of a model that has changed since it was placed, or is disabled, or on a node that lacks the model's labels, is stopped; one
   that has not come up is dropped.
2. The models, those first for which somebody waits longest, get as many replicas as `scaling` says. What is above the
   most that a model, or a model on a node, may have is ended in the same way: what has not come up first, then what is
   idle. What works finishes that.
3. A failed replica is tried again once its back-off is over. Where one has failed for the first time, its next try comes
   sooner than a load elsewhere.
4. A new replica goes to a node that is ready and reports, has the model's labels, none of the models that exclude it, fewer of its
   replicas than the node may have, and room for its file and for what it takes in memory. Of several: one that has the
   fewest of its replicas, has the file, has the least to do, the fewest replicas, is the fastest as far as that was
   measured, and keeps the most memory free.
5. Where a model that somebody waits for, and that nothing serves, has room nowhere, `eviction` makes some. While what
   is in the way is busy, it waits.
6. A model that lacks replicas for which there is room nowhere rests, as `wishes` says.
7. A model that somebody waits for, that nothing serves, and that failed again and again or never fits, is given up for
   those who wait. A first failure is only tried again: those in line did nothing to deserve an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Any

from localai_q.cluster import eviction, scaling, wishes
from localai_q.cluster.capacity import NOTHING, Verdict, booking, cooling, matches
from localai_q.cluster.fleet import Board, Fleet
from localai_q.cluster.models import Model
from localai_q.cluster.nodes import Replica
from localai_q.cluster.states import COMING_UP, ReplicaState
from localai_q.cluster.wishes import Unmet

GIVE_UP = 2  # failures in a row
MOST_REASONS = 20  # nodes that an error names


@dataclass(frozen=True, kw_only=True)
class Place:
    """Put a replica of the model on the node."""

    model_id: str
    node_id: str
    reason: str
    survey: Survey = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Bring a failed replica up again."""

    replica_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Stop:
    """End a replica once it has finished what it holds."""

    replica_id: str
    reason: str
    if_idle: bool = False  # not if it has got something to do since


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Forget a replica that has no process, and end the stage that is under way for it."""

    replica_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class GiveUp:
    """Tell those who wait for the model that it cannot be had."""

    model_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Note:
    """Remember that the model's wish for replicas cannot be met; None: that it can be, or is none any more."""

    model_id: str
    unmet: Unmet | None


Action = Place | Retry | Stop | Drop | GiveUp | Note

RUNNING = (ReplicaState.LOADING, ReplicaState.READY)  # there is a process


def ending(replica: Replica, reason: str) -> Stop | Drop:
    """How a replica that is not stopping yet is ended."""
    kind = Stop if replica.state in RUNNING else Drop
    return kind(replica_id=replica.id, reason=reason)


class Survey:
    """Every node as a model that looks for a place finds it; put into words when somebody asks."""

    def __init__(self, board: Board, model: Model) -> None:
        self._board = board
        self._model = model
        self.chosen: set[str] = set()  # node ids

    def passed_over(self, most: int | None = None) -> dict[str, str]:
        """Why the model does not go to the nodes that were not chosen, by name, once the whole plan is carried out.

        `most`: of so many at most.
        """
        others = (node for node in self._board.nodes.values() if node.id not in self.chosen)
        return {node.name: self._why_not(node.id) for node in islice(others, most)}

    def _why_not(self, node_id: str) -> str:
        return self._board.examine(self._model, node_id).reason or "fits, but another suits better"


def hopeless(replica: Replica) -> bool:
    """Whether a replica has failed so often that nobody should wait for its next try."""
    return replica.state is ReplicaState.FAILED and replica.failures >= GIVE_UP


def plan(fleet: Fleet) -> list[Action]:
    """What to do now."""
    board = Board(fleet)
    actions: list[Action] = [action for model in fleet.models for action in _end_unwanted(board, model)]
    actions += [action for model in fleet.models for action in _end_surplus(board, model)]
    for model in sorted(fleet.models, key=lambda model: -board.demand(model.id).longest):
        actions += _by_its_wish(board, model)
    return actions


def ruled_out(fleet: Fleet, model: Model) -> dict[str, str]:
    """Why nothing would be left of a model that serves, if it were changed so, and no node could ever take it again, by
    the nodes' names, of so many as an error names; empty: it could go on.

    Args:
        fleet: with the model as it would be, and its replicas as they are.
    """
    if model.config.disabled:
        return {}
    board = Board(fleet)
    _end_unwanted(board, model)
    if board.alive(model.id):
        return {}
    verdicts = [board.examine(model, node_id) for node_id in board.nodes]
    if any(verdict.fits or (verdict.crowded and eviction.may_fit(board, verdict)) for verdict in verdicts):
        return {}
    return {verdict.node.name: verdict.reason for verdict in verdicts[:MOST_REASONS]}


def _end_unwanted(board: Board, model: Model) -> list[Stop | Drop]:
    return [
        _end(board, replica, reason)
        for replica in board.of(model.id)
        if replica.state is not ReplicaState.STOPPING and (reason := _unwanted(board, model, replica))
    ]


def _end_surplus(board: Board, model: Model) -> list[Stop | Drop]:
    return [_end(board, replica, reason) for replica, reason in scaling.surplus(board, model)]


def _stop(board: Board, replica: Replica, reason: str, *, if_idle: bool = False) -> Stop:
    board.change(replica, ReplicaState.STOPPING)
    return Stop(replica_id=replica.id, reason=reason, if_idle=if_idle)


def _unwanted(board: Board, model: Model, replica: Replica) -> str:
    """Why the model should not have this replica, whatever else it has; empty if it may."""
    if replica.is_outdated(model):
        return f"model {model.name} was changed"
    if model.config.disabled:
        return f"model {model.name} is disabled"
    node = board.nodes.get(replica.node_id) if model.config.selector else None
    return f"node {node.name} lacks the labels of model {model.name}" if node and not matches(model, node) else ""


def _end(board: Board, replica: Replica, reason: str) -> Stop | Drop:
    action = ending(replica, reason)
    if isinstance(action, Drop):
        board.remove(replica)
    else:
        board.change(replica, ReplicaState.STOPPING)
    return action


def _by_its_wish(board: Board, model: Model) -> list[Action]:
    """What brings a model that has no more than it may closer to what it should have."""
    if model.config.disabled:
        forgotten: list[Action] = [Note(model_id=model.id, unmet=None)] if model.unmet else []
        waits = board.demand(model.id).waiting
        return [*forgotten, GiveUp(model_id=model.id, reason="it was disabled")] if waits else forgotten
    unused = scaling.superfluous(board, model)
    if unused:
        return [_stop(board, unused, f"unused for {_unused(board, unused)}", if_idle=True)]
    count, reason = scaling.wanted(board, model)
    alive = board.alive(model.id)
    if model.config.spread_all:  # a copy elsewhere does not stand for one where it should be
        where = set(board.matching(model))
        alive = [replica for replica in alive if replica.node_id in where]
    lacking = count - len(alive)
    if lacking <= 0:
        over = model.unmet and wishes.is_over(model.unmet, model.revision, len(alive), board.now)
        return [Note(model_id=model.id, unmet=None)] if over else []
    failed = [replica for replica in board.of(model.id) if replica.state is ReplicaState.FAILED]
    actions = _retries(board, model, failed, lacking)
    lacking -= len(actions)
    returning = any(
        replica.node_id in board.ready and not hopeless(replica) and cooling(replica, board.now) for replica in failed
    )
    if not lacking or (returning and not model.config.spread_all):
        return actions
    urgent = not actions and not returning and not board.alive(model.id) and board.demand(model.id).waiting > 0
    known = model.unmet
    if known and known.rests(count, count - lacking, board.fleet.circumstances, board.now):
        if known.hopeless and urgent:
            return [GiveUp(model_id=model.id, reason=known.reason)]
        if not urgent:
            return actions
    places = _places(board, model, lacking, reason)
    actions += places
    if len(places) == lacking:
        return actions
    given_up = None
    if urgent and not places:
        actions = _make_room(board, model)
        given_up = next((action for action in actions if isinstance(action, GiveUp)), None)
        if given_up is None:
            return actions  # it is a matter of time
        reason = given_up.reason
    found = wishes.unmet(known, board.now, revision=model.revision, wanted=count, has=count - lacking + len(places), reason=reason,
                         nodes=_why_nowhere(board, model, MOST_REASONS), hopeless=given_up is not None,
                         seen=board.fleet.circumstances)  # fmt: skip
    return [*actions, Note(model_id=model.id, unmet=found)]


def _retries(board: Board, model: Model, failed: Sequence[Replica], most: int) -> list[Action]:
    found: list[Action] = []
    for replica in failed:
        if len(found) == most or replica.node_id not in board.ready:
            continue
        verdict = board.examine(model, replica.node_id)
        if verdict.fits:
            board.change(replica, ReplicaState.PLACED, reserved=booking(model, verdict).memory)
            found.append(Retry(replica_id=replica.id, reason=f"try {replica.failures + 1}"))
    return found


def _places(board: Board, model: Model, most: int, reason: str) -> list[Action]:
    survey = Survey(board, model)
    actions: list[Action] = []
    for verdict in islice(best(board, model), most):
        survey.chosen.add(verdict.node.id)
        actions.append(Place(model_id=model.id, node_id=verdict.node.id, reason=reason, survey=survey))
    return actions


def best(board: Board, model: Model) -> Iterator[Verdict]:
    """Places for the model, each the best by `_score` once those before it are booked, which they are when given.

    The nodes are looked at in groups, each of which has nothing but better ones than those after it, so that a good
    place is found without a look at every node.
    """
    for group in _groups(board, model):
        fitting = [(_score(board, model, verdict), verdict) for verdict in group if verdict.fits]
        heapify(fitting)
        while fitting:
            _, verdict = heappop(fitting)
            board.book(model, verdict)
            yield verdict
            if verdict.site.own(model) and (again := board.examine(model, verdict.node.id)).fits:
                heappush(fitting, (_score(board, model, again), again))


def _groups(board: Board, model: Model) -> Iterator[Iterable[Verdict]]:
    """The nodes that match: those without a replica of the model, first with its file, then by what they have to do;
    last those with replicas of it, as they are by then."""
    matching = board.matching(model)
    with_file = board.with_file(model.config.sha256)

    def examined(nodes: Iterable[str]) -> Iterable[Verdict]:
        return (board.examine(model, node_id) for node_id in nodes if node_id in matching)

    taken = _where(board, model)
    yield examined(with_file - taken)
    for tier in board.tiers():
        yield examined([node_id for node_id in tier if node_id not in taken and node_id not in with_file])
    yield examined(_where(board, model))


def _where(board: Board, model: Model) -> set[str]:
    """The nodes that have replicas of the model as it is now."""
    return {replica.node_id for replica in board.of(model.id) if not replica.is_outdated(model)}


def _score(board: Board, model: Model, verdict: Verdict) -> tuple[Any, ...]:
    """Lower is better; no two nodes have the same. One of unknown speed goes first, so that its speed becomes known."""
    site = verdict.site
    speed = board.fleet.speeds.tokens_per_second(model, site.node.id)
    wanted = verdict.need.memory if verdict.need else NOTHING
    left = site.free.vram - wanted.vram if wanted.vram else site.free.ram - wanted.ram
    return (
        len(site.own(model)),
        model.config.sha256 not in site.files,
        *board.load(site.node.id),
        -speed if speed else -math.inf,
        -left,
        site.node.name,
        site.node.id,
    )


def _make_room(board: Board, model: Model) -> list[Action]:
    """What to do for a model that somebody waits for and that has room nowhere."""
    verdicts = [board.examine(model, node_id) for node_id in board.matching(model)]
    crowded = [verdict for verdict in verdicts if verdict.crowded]
    leaving = next((verdict for verdict in crowded if eviction.is_leaving(board, verdict)), None)
    if leaving:
        board.book(model, leaving)  # so that nothing else takes what becomes free
        return []
    chosen = eviction.choose(board, crowded)
    if chosen:
        verdict, victims = chosen
        board.book(model, verdict)
        return [
            _stop(board, victim, f"makes room for {model.name}, unused for {_unused(board, victim)}", if_idle=True)
            for victim in victims
        ]
    own = {replica.state for replica in board.of(model.id)}
    moving = not own.isdisjoint((*COMING_UP, ReplicaState.STOPPING))  # on a node that may be back, or out of the way
    silent = any(board.is_silent(node_id) for node_id in board.matching(model))  # it may report in a moment
    if moving or silent or any(eviction.may_fit(board, verdict) for verdict in crowded):
        return []
    return _give_up(board, model)


def _why_nowhere(board: Board, model: Model, most: int) -> dict[str, str]:
    """Why no replica can go to any of these nodes, by name; of so many at most."""
    return {node.name: board.examine(model, node.id).reason for node in islice(board.nodes.values(), most)}


def _unused(board: Board, replica: Replica) -> str:
    return f"{board.now - scaling.last_used(replica):.0f} s"


def _give_up(board: Board, model: Model) -> list[Action]:
    failed = [replica for replica in board.of(model.id) if hopeless(replica)]
    if not failed and not board.ready:
        return []  # nodes may be about to come
    where = {board.nodes[replica.node_id].name for replica in failed if replica.node_id in board.nodes}
    told = _why_nowhere(board, model, MOST_REASONS + len(where))
    others = [f"{name}: {reason}" for name, reason in told.items() if name not in where][:MOST_REASONS]
    reasons = [*(replica.reason for replica in failed[-1:]), *others]
    if more := len(board.nodes) - len(where) - len(others):
        reasons.append(f"and {more} more nodes")
    return [GiveUp(model_id=model.id, reason="; ".join(reasons))]
