"""Which replicas make room for a model that somebody waits for. Pure.

Those of one node whose end makes the model fit there, as memory goes and as groups that exclude each other go: the
fewest, and among equals the least recently used. None that works, that somebody waits for, that is pinned, that has only
just become ready, or that its model's `min_replicas` needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from localai_q.cluster.capacity import Verdict
from localai_q.cluster.fleet import Board
from localai_q.cluster.nodes import Replica
from localai_q.cluster.scaling import last_used
from localai_q.cluster.states import COMING_UP, ReplicaState

PROTECTED = 30.0  # seconds after becoming ready


def choose(board: Board, crowded: Iterable[Verdict]) -> tuple[Verdict, list[Replica]] | None:
    """The node on which the model is to go, and what is to be stopped there; None if nothing may be."""
    found = [(verdict, victims) for verdict in crowded if (victims := _victims(board, verdict))]
    return min(found, key=lambda pair: _cost(*pair), default=None)


def is_leaving(board: Board, verdict: Verdict) -> bool:
    """Whether the model fits on the node once what is being stopped there has gone."""
    return _fits(verdict, [each for each in board.site(verdict.node.id).there if each.state is ReplicaState.STOPPING])


def may_fit(board: Board, verdict: Verdict) -> bool:
    """Whether the model would fit on the node if all that may ever make room for it did."""
    there = board.site(verdict.node.id).there
    return _fits(verdict, _above_minimum(board, [each for each in there if _may_leave(board, each)]))


def _victims(board: Board, verdict: Verdict) -> list[Replica]:
    there = board.site(verdict.node.id).there
    leaving = [replica for replica in there if replica.state is ReplicaState.STOPPING]
    idle = sorted((replica for replica in there if _is_idle(board, replica)), key=last_used)
    idle.sort(key=lambda replica: replica.id not in verdict.rivals)  # those must go in any case
    idle = _above_minimum(board, idle)
    if not _fits(verdict, leaving + idle):
        return []
    chosen: list[Replica] = []
    while not _fits(verdict, leaving + chosen):
        chosen.append(idle[len(chosen)])
    for replica in reversed(chosen):  # the last used one stays if it can
        rest = [other for other in chosen if other is not replica]
        if _fits(verdict, leaving + rest):
            chosen = rest
    return chosen


def _above_minimum(board: Board, leaving: Iterable[Replica]) -> list[Replica]:
    """Of these, the first ones of each model that it can do without."""
    kept: list[Replica] = []
    gone: Counter[str] = Counter()
    for replica in leaving:
        if replica.state is not ReplicaState.STOPPING:
            gone[replica.model_id] += 1
            least = board.models[replica.model_id].config.min_replicas
            if len(board.alive(replica.model_id)) - gone[replica.model_id] < least:
                continue
        kept.append(replica)
    return kept


def _fits(verdict: Verdict, gone: Sequence[Replica]) -> bool:
    enough = verdict.need is None or verdict.need.memory.within(verdict.site.without(gone).free)
    return enough and verdict.rivals <= {replica.id for replica in gone}


def _cost(verdict: Verdict, victims: Sequence[Replica]) -> tuple[int, float, str]:
    return len(victims), max(map(last_used, victims)), verdict.node.name


def _is_idle(board: Board, replica: Replica) -> bool:
    return (
        replica.state is ReplicaState.READY
        and _may_leave(board, replica)
        and not board.busy(replica.id)
        and not board.demand(replica.model_id).waiting
        and board.now - replica.changed >= PROTECTED
    )


def _may_leave(board: Board, replica: Replica) -> bool:
    if replica.state is ReplicaState.STOPPING:
        return True
    model = board.models.get(replica.model_id)
    return model is not None and not model.config.pinned and replica.state in (*COMING_UP, ReplicaState.READY)
