"""A node's report on its replicas, carried out: the registry gets what the node says, the node what the registry says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from localai_q.cluster.capacity import Booking, Site, Verdict, booking
from localai_q.cluster.memory import need
from localai_q.cluster.models import Model
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.reports import Comparison, Report, compare
from localai_q.cluster.speeds import Measure
from localai_q.cluster.states import ReplicaState
from localai_q.store import measures, models, nodes, replicas

log = logging.getLogger(__name__)

LOST = "its process is gone, and nobody was told how it ended"


def settle(db: Any, node: Node, reports: Sequence[Report]) -> Comparison:
    """Bring the registry's rows of this node and its processes together; returns what was found.

    Who calls holds the node's row: nothing is placed on it meanwhile.
    """
    own = replicas.every(db, node_id=node.id)
    known = {replica.id: replica for replica in own}
    reports = [_corrected(node, report, known.get(report.id)) for report in reports]
    orphans = [report for report in reports if report.id not in known]
    news = _news(reports, measures.fresh(db, node.id))
    # Held, so that none is removed while rows of it are made; before replicas are changed, as when a model is removed.
    named = {*news, *(report.model_id for report in orphans), *(replica.model_id for replica in own)}
    held = models.held(db, named) if orphans or news else {}
    strangers = replicas.known(db, [report.id for report in orphans])
    found = compare(node, reports, own, held, strangers)
    for report in found.adopt:
        _adopt(db, node, report, held[report.model_id])
    for replica in found.ready:
        replicas.move(db, replica.id, ReplicaState.READY)
    for replica in found.lost:
        replicas.move(db, replica.id, ReplicaState.FAILED, reason=LOST)
    believed = [report for report in reports if report.id not in found.stop]
    for report in believed:
        if report.model_id in news and report.model_id in held and report.revision == held[report.model_id].revision:
            measures.note(db, Measure(node_id=node.id, model_id=report.model_id, load_seconds=report.load_seconds,
                                      tokens_per_second=report.tokens_per_second))  # fmt: skip
    kept = {report.id: report.model_dump(include={"in_flight", "tokens_per_second", "load_seconds"})
            for report in believed}  # fmt: skip
    nodes.keep_report(db, node.id, kept, found.missed)
    _tell(node, found)
    return found


def _corrected(node: Node, report: Report, replica: Replica | None) -> Report:
    """The report, without what cannot be."""
    slots = replica.slots if replica else report.slots
    truth: dict[str, Any] = {"in_flight": min(report.in_flight, slots)}
    if replica:
        truth |= {"model_id": replica.model_id, "number": replica.number, "revision": replica.revision}
    wrong = {name: value for name, value in report.model_dump(include=set(truth)).items() if value != truth[name]}
    if wrong:
        log.warning("node %s says of replica %s what cannot be: %s", node.name, report.id, wrong)
    return report.model_copy(update=truth)


def _adopt(db: Any, node: Node, report: Report, model: Model) -> None:
    replicas.enter(db, report.id, ReplicaState(report.state), booking=_booking(node, report, model), model_id=model.id,
                   node_id=node.id, number=report.number, revision=model.revision, slots=model.config.slots)  # fmt: skip


def _booking(node: Node, report: Report, model: Model) -> Booking:
    """What the process takes with the context that it was given, whatever is free: it has that already."""
    tokens = min(report.context_size or model.config.context_size, model.config.context_size)
    config = model.config.model_copy(update={"context_size": tokens, "fit_context": False})
    site = Site(node, [])
    found = need(config, model.facts, site.gpus if report.gpu else 0)
    return booking(model, Verdict(site=site, need=found))


def _news(reports: Sequence[Report], fresh: Sequence[Measure]) -> set[str]:
    """The models of which something was measured that was not noted a moment ago."""
    noted = {measure.model_id: measure for measure in fresh}
    return {
        report.model_id
        for report in reports
        if _is_news(report.tokens_per_second, report, noted, "tokens_per_second")
        or _is_news(report.load_seconds, report, noted, "load_seconds")
    }


def _is_news(value: float, report: Report, noted: dict[str, Measure], name: str) -> bool:
    before = noted.get(report.model_id)
    return bool(value) and (before is None or not getattr(before, name))


def _tell(node: Node, found: Comparison) -> None:
    for report in found.adopt:
        log.warning("replica %s lives on node %s and has no row: it is entered again", report.id, node.name,
                    extra={"action": "adopt"})  # fmt: skip
    for replica in found.lost:
        log.warning("replica %s of node %s is lost: %s", replica.id, node.name, LOST, extra={"action": "lost"})
    for replica_id, why in found.stop.items():
        log.warning("node %s is to stop the process of %s: %s", node.name, replica_id, why, extra={"action": "stray"})
