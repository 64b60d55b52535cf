"""Where replicas should be, given what is there and what is wanted. Pure.

The decision, in order:

1. A replica of a model that has changed since it was placed is stopped.
2. The models, those first for which somebody waits longest, get as many replicas as `scaling` says.
3. A failed replica is tried again once its back-off is over. Where one has failed for the first time, its next try comes
   sooner than a load elsewhere.
4. A new replica goes to a node that is ready, has the model's labels, none of its replicas, and room for its file and
   for what it takes in memory. Of several: one that has the file, has the least to do, the fewest replicas, and keeps
   the most memory free.
5. Where a model that somebody waits for, and that nothing serves, has room nowhere, `eviction` makes some. While what
   is in the way is busy, it waits.
6. A model that somebody waits for, that nothing serves, and that failed again and again or never fits, is given up for
   those who wait. A first failure is only tried again: those in line did nothing to deserve an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from localai_q.cluster import eviction, scaling
from localai_q.cluster.capacity import Verdict, booking, cooling, has_file, matches
from localai_q.cluster.fleet import Board, Fleet
from localai_q.cluster.memory import Memory
from localai_q.cluster.models import Model
from localai_q.cluster.nodes import Replica
from localai_q.cluster.states import COMING_UP, ReplicaState

GIVE_UP = 2  # failures in a row
MOST_REASONS = 20  # nodes that an error names


@dataclass(frozen=True, kw_only=True)
class Place:
    """Put a replica of the model on the node."""

    model_id: str
    node_id: str
    reason: str
    passed_over: dict[str, str] = field(default_factory=dict, repr=False)  # why no other node, by name


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
class GiveUp:
    """Tell those who wait for the model that it cannot be had."""

    model_id: str
    reason: str


Action = Place | Retry | Stop | GiveUp


def hopeless(replica: Replica) -> bool:
    """Whether a replica has failed so often that nobody should wait for its next try."""
    return replica.state is ReplicaState.FAILED and replica.failures >= GIVE_UP


def plan(fleet: Fleet) -> list[Action]:
    """What to do now."""
    board = Board(fleet)
    actions: list[Action] = [
        _stop(board, replica, f"model {model.name} was changed")
        for model in fleet.models
        for replica in board.of(model.id)
        if replica.revision != model.revision and replica.state is ReplicaState.READY
    ]
    for model in sorted(fleet.models, key=lambda model: -board.demand(model.id).longest):
        actions += _of_model(board, model)
    return actions


def _stop(board: Board, replica: Replica, reason: str, *, if_idle: bool = False) -> Stop:
    board.change(replica, ReplicaState.STOPPING)
    return Stop(replica_id=replica.id, reason=reason, if_idle=if_idle)


def _of_model(board: Board, model: Model) -> list[Action]:
    unused = scaling.superfluous(board, model)
    if unused:
        return [_stop(board, unused, f"unused for {_unused(board, unused)}", if_idle=True)]
    count, reason = scaling.wanted(board, model)
    alive = board.alive(model.id)
    if model.config.spread_all:  # a copy elsewhere does not stand for one where it should be
        alive = [r for r in alive if r.node_id in board.ready and matches(model, board.nodes[r.node_id])]
    lacking = count - len(alive)
    if lacking <= 0:
        return []
    failed = [replica for replica in board.of(model.id) if replica.state is ReplicaState.FAILED]
    actions = _retries(board, model, failed, lacking)
    lacking -= len(actions)
    returning = any(
        replica.node_id in board.ready and not hopeless(replica) and cooling(replica, board.now) for replica in failed
    )
    if not lacking or (returning and not model.config.spread_all):
        return actions
    verdicts = [board.examine(model, node) for node in board.nodes.values()]
    actions += _places(board, model, verdicts, lacking, reason)
    if actions or returning or board.alive(model.id) or not board.demand(model.id).waiting:
        return actions
    return _make_room(board, model, verdicts)


def _retries(board: Board, model: Model, failed: Sequence[Replica], most: int) -> list[Action]:
    found: list[Action] = []
    for replica in failed:
        if len(found) == most or replica.node_id not in board.ready:
            continue
        verdict = board.examine(model, board.nodes[replica.node_id])
        if not verdict.reason:
            board.change(replica, ReplicaState.PLACED, reserved=booking(model, verdict).memory)
            found.append(Retry(replica_id=replica.id, reason=f"try {replica.failures + 1}"))
    return found


def _places(board: Board, model: Model, verdicts: Sequence[Verdict], most: int, reason: str) -> list[Action]:
    taken = {replica.node_id for replica in board.of(model.id)}
    fitting = [verdict for verdict in verdicts if not verdict.reason and verdict.node.id not in taken]
    fitting.sort(key=lambda verdict: _score(board, model, verdict))
    chosen = fitting[:most]
    passed_over = {verdict.node.name: verdict.reason for verdict in verdicts if verdict.reason}
    passed_over |= {verdict.node.name: "fits, but another suits better" for verdict in fitting[most:]}
    for verdict in chosen:
        board.book(model, verdict)
    return [
        Place(model_id=model.id, node_id=verdict.node.id, reason=reason, passed_over=passed_over) for verdict in chosen
    ]


def _score(board: Board, model: Model, verdict: Verdict) -> tuple[bool, int, int, int, str]:
    """Lower is better."""
    there = board.there(verdict.node.id)
    wanted = verdict.need.memory if verdict.need else Memory()
    left = verdict.free - wanted
    return (
        not has_file(model, verdict.node),
        sum(board.busy(replica.id) for replica in there),
        len(there),
        -(left.vram if wanted.vram else left.ram),
        verdict.node.name,
    )


def _make_room(board: Board, model: Model, verdicts: Sequence[Verdict]) -> list[Action]:
    """What to do for a model that somebody waits for and that has room nowhere."""
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
    if moving or any(eviction.may_fit(board, verdict) for verdict in crowded):
        return []
    return _give_up(board, model, verdicts)


def _unused(board: Board, replica: Replica) -> str:
    return f"{board.now - scaling.last_used(replica):.0f} s"


def _give_up(board: Board, model: Model, verdicts: Sequence[Verdict]) -> list[Action]:
    failed = [replica for replica in board.of(model.id) if hopeless(replica)]
    if not failed and not board.ready:
        return []  # nodes may be about to come
    where = {replica.node_id for replica in failed}
    others = [verdict for verdict in verdicts if verdict.node.id not in where]
    reasons = [replica.reason for replica in failed[-1:]]
    reasons += [f"{verdict.node.name}: {verdict.reason}" for verdict in others[:MOST_REASONS]]
    if len(others) > MOST_REASONS:
        reasons.append(f"and {len(others) - MOST_REASONS} more nodes")
    return [GiveUp(model_id=model.id, reason="; ".join(reasons))]
