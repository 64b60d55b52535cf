"""Replicas: placed where the plan says, brought up stage by stage, stopped when they should go."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from localai_q import names
from localai_q.bus import pressure
from localai_q.cluster.backends import Op
from localai_q.cluster.capacity import Seeker, Site, Verdict, booking, examine, weigh
from localai_q.cluster.draining import Drained, plan_drains
from localai_q.cluster.events import End
from localai_q.cluster.fleet import Board, Fleet
from localai_q.cluster.groups import rivals_of
from localai_q.cluster.jobs import DOWNLOADS, LOAD, Job, Keep
from localai_q.cluster.models import Facts, File, Model
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.placement import MOST_REASONS, Action, Drop, GiveUp, Note, Place, Retry, Stop, plan
from localai_q.cluster.routing import disabled
from localai_q.cluster.scaling import is_complete
from localai_q.cluster.speeds import Speeds
from localai_q.cluster.stages import Step, end_of_load, next_step
from localai_q.cluster.states import COMING_UP, JobState, NodeState, ReplicaState
from localai_q.cluster.wishes import Unmet
from localai_q.errors import Conflict, ModelDisabled, ModelNotFound, ModelUnavailable, Unavailable, to_record
from localai_q.services import galleries, node_users
from localai_q.services import jobs as job_services
from localai_q.services.backends import request_for
from localai_q.services.nodes import UNHEALTHY_AFTER
from localai_q.services.wiring import Services
from localai_q.store import jobs, measures, models, nodes, replicas
from localai_q.store.engine import clock

log = logging.getLogger(__name__)

MOVING = (*COMING_UP, ReplicaState.STOPPING)
MOST_LOADS = 10_000  # that are looked at in one go


def reconcile(services: Services) -> None:
    """Bring what is there closer to what should be."""
    galleries.look(services)
    drain_nodes(services)
    with services.db.transaction() as db:
        known = models.every(db)
        where = nodes.every(db)
        what = replicas.every(db)
        speeds = Speeds(measures.every(db), known)
        now = clock(db)
    lines = {model.id: names.model_queue(model.id) for model in known}
    demand = services.leases.demand(list(lines.values()))
    pressed = pressure.read(services.redis, list(lines))
    fleet = Fleet(
        models=known,
        nodes=where,
        replicas=what,
        demand={model_id: replace(demand[line], pressure=pressed[model_id]) for model_id, line in lines.items()},
        busy=services.leases.owners(list(lines.values())),
        builds=galleries.builds(services),
        speeds=speeds,
        now=now,
        patience=_patience(services),
    )
    for action in plan(fleet):
        if not isinstance(action, Note):
            log.info("%s", action, extra={"action": "placement"})
        _act(services, action, {model.id: model for model in known})
    advance(services)


def drain_nodes(services: Services) -> None:
    """Empty the nodes that are draining a step further."""
    with services.db.transaction() as db:
        draining = [node for node in nodes.every(db) if node.state is NodeState.DRAINING]
        actions = plan_drains(draining, replicas.every(db)) if draining else []
    for action in actions:
        log.info("%s", action, extra={"action": "drain"})
        match action:
            case Stop():
                stop(services, action.replica_id, action.reason)
            case Drop():
                _drop(services, action)
            case Drained():
                with services.db.transaction() as db:
                    nodes.move(db, action.node_id, NodeState.DRAINED)


def _drop(services: Services, action: Drop) -> None:
    with services.db.transaction() as db:
        replica = replicas.by_id(db, action.replica_id)
        if replica is None:
            return
        replicas.forget(db, replica.id)
        shared = any(other.job_id == replica.job_id for other in replicas.every(db))  # as that of a backend
        stage = jobs.by_id(db, replica.job_id) if replica.job_id and not shared else None
        job_services.end_at_once(services, db, [stage] if stage else [], Unavailable(f"Not needed: {action.reason}."))


def _act(services: Services, action: Action, known: dict[str, Model]) -> None:
    match action:
        case Place():
            if log.isEnabledFor(logging.DEBUG):
                log.debug("not elsewhere: %s", action.survey.passed_over(MOST_REASONS))
            place(services, known[action.model_id], action.node_id)
        case Retry():
            _retry(services, action.replica_id, known)
        case Stop():
            if not action.if_idle or is_idle(services, action.replica_id):
                stop(services, action.replica_id, action.reason)
        case Note():
            _note(services, known[action.model_id], action.unmet)
        case Drop():
            _drop(services, action)
        case GiveUp():
            model = known[action.model_id]
            error = ModelUnavailable(f"The model '{model.name}' could not be loaded: {action.reason}")
            fail_waiting(services, model.id, disabled(model) if model.config.disabled else error)


def _note(services: Services, model: Model, unmet: Unmet | None) -> None:
    """Keep whether the model's wish for replicas can be met; one line when that begins, and one when it ends."""
    with services.db.transaction() as db:
        models.note(db, model.id, unmet)
        now = clock(db)
    if unmet and not model.unmet:
        where = "; ".join(f"{name}: {reason}" for name, reason in unmet.nodes.items())
        log.warning("model %s has %d of %d replicas (%s), and no node takes one more: %s",
                    model.name, unmet.has, unmet.wanted, unmet.reason, where)  # fmt: skip
    elif model.unmet and not unmet:
        log.info("model %s does not lack replicas any more, after %.0f s", model.name, now - model.unmet.since)


def is_idle(services: Services, replica_id: str) -> bool:
    """Whether the replica works on nothing, and nobody waits for its model."""
    with services.db.transaction() as db:
        replica = replicas.by_id(db, replica_id)
    if replica is None:
        return True
    line = names.model_queue(replica.model_id)
    return not services.leases.demand([line])[line].waiting and not services.leases.owners([line])[replica_id]


def place(services: Services, model: Model, node_id: str) -> None:
    """Put a replica of the model on the node, if it still fits there: others may place at the same time."""
    with services.db.transaction() as db:
        verdict = _verdict(services, db, model, node_id)
        if verdict is None or not verdict.fits:
            return  # somebody else was faster; the next plan knows it
        number = verdict.site.number(model.id)
        placed = replicas.place(db, model_id=model.id, node_id=node_id, number=number, revision=model.revision,
                                slots=model.config.slots, booking=booking(model, verdict))  # fmt: skip
    if placed:
        pressure.relieve(services.redis, model.id)


def _retry(services: Services, replica_id: str, known: dict[str, Model]) -> None:
    with services.db.transaction() as db:
        replica = replicas.by_id(db, replica_id)
        model = known.get(replica.model_id) if replica else None
        verdict = _verdict(services, db, model, replica.node_id) if replica and model else None
        if model and verdict and verdict.fits:
            replicas.move(db, replica_id, ReplicaState.PLACED, booking=booking(model, verdict))


def _load(services: Services, replica: Replica, model: Model) -> str:
    """Have the node load the model, as a job: what that takes is booked anew, for by now more may be known of it.

    Returns why there is no room for that; empty: it was begun.
    """
    node_users.extend(services, replica.node_id)
    job = Job(id=names.new_id(), kind=LOAD, state=JobState.OPEN, line=names.replica_queue(replica.id), model_id=model.id,
              node_id=replica.node_id, request={"kind": LOAD, "replica": replica.id, "name": model.name},
              keep=Keep.BACKGROUND)  # fmt: skip
    with services.db.transaction() as db:
        node = nodes.lock(db, replica.node_id)
        if node is None:
            return "its node is gone"
        others = [other for other in replicas.every(db, node_id=node.id) if other.id != replica.id]
        verdict = weigh(_seeker(services, db, model), Site(node, others))
        if not verdict.fits:
            replicas.move(db, replica.id, ReplicaState.FAILED, reason=verdict.reason)
            return verdict.reason
        moved = replicas.move(db, replica.id, ReplicaState.LOADING, job_id=job.id, booking=booking(model, verdict))
        if moved:
            jobs.add(db, job)
    if not moved:
        log.error("replica %s cannot go from %s to loading", replica.id, replica.state)
        return "something else has become of it"
    job_services.enter_line(services, job)
    services.doorbells.ring(names.START_REPLICA, replica.id, queue=names.node_queue(replica.node_id))
    return ""


def load_again(services: Services, replica_id: str) -> str:
    """Load what has failed again without waiting for its back-off; the id of the job, which may have been begun before.

    Raises:
        Conflict: the replica is gone, is past that, or cannot be loaded where it was.
    """
    with services.db.transaction() as db:
        replica = replicas.by_id(db, replica_id)
        model = models.by_id(db, replica.model_id) if replica else None
        node = nodes.by_id(db, replica.node_id) if replica else None
    if replica and model and node and replica.state is ReplicaState.FAILED:
        if why := _unfit(services, replica, model, node) or _load(services, replica, model):
            raise Conflict(f"This copy cannot be loaded again: {why}. The next request has one loaded where it can be.")
        with services.db.transaction() as db:
            replica = replicas.by_id(db, replica_id)
    if replica is None:
        raise Conflict("This copy is not there any more. The next request for its model has another one loaded.")
    if replica.state is not ReplicaState.LOADING or not replica.job_id:
        raise Conflict(f"This copy is {replica.state}: only one that has failed can be loaded again.")
    with services.db.transaction() as db:
        job = jobs.by_id(db, replica.job_id)
    if job is None or job.state is not JobState.OPEN:
        raise Conflict("This copy's process is about to end: try again in a moment.")
    return job.id


def _unfit(services: Services, replica: Replica, model: Model, node: Node) -> str:
    """Why a copy that has failed is not to be loaded again, whatever room there is; empty: it may be."""
    if node.state is not NodeState.READY or replica.is_outdated(model) or model.config.disabled:
        return "its model was changed, or its node takes nothing new"
    with services.db.transaction() as db:
        there = replicas.every(db, model_id=model.id)
        fleet = Fleet(models=[model], nodes=nodes.every(db), replicas=there, now=clock(db))
    if is_complete(Board(fleet), model):
        return f"its model has {model.config.max_replicas} elsewhere, and max_replicas allows no more"
    return ""


def _verdict(services: Services, db: Any, model: Model, node_id: str) -> Verdict | None:
    """Whether the model fits on the node now, which stays so until the transaction ends; None if the node is gone."""
    node = nodes.lock(db, node_id)
    there = replicas.every(db, node_id=node_id)
    return examine(_seeker(services, db, model), Site(node, there), clock(db)) if node else None


def _seeker(services: Services, db: Any, model: Model) -> Seeker:
    rivals = rivals_of(model, models.every(db)) if model.config.concurrency_groups else {}
    builds = galleries.builds(services).get(model.config.backend, ())
    return Seeker(model, builds=builds, rivals=rivals, patience=_patience(services))


def _patience(services: Services) -> float:
    return UNHEALTHY_AFTER * services.settings.heartbeat


def fail_waiting(services: Services, model_id: str, error: ModelUnavailable | ModelNotFound | ModelDisabled) -> None:
    """End every job that waits for this model, with the reason."""
    line = names.model_queue(model_id)
    end = End(state=JobState.FAILED, error=to_record(error))
    seen: list[str] = []
    while (waiting := services.leases.waiting(line)) != seen:  # each look shows a part of a long line
        for job_id in waiting:
            with services.db.transaction() as db:
                job = jobs.by_id(db, job_id)
            if job:
                job_services.abort(services, job, error)
            else:
                services.leases.abort(job_id, line, end)
        seen = waiting


def stop(services: Services, replica_id: str, reason: str) -> None:
    """Have a replica finish what it holds and end."""
    with services.db.transaction() as db:
        replica = replicas.by_id(db, replica_id)
        moved = replicas.move(db, replica_id, ReplicaState.STOPPING, reason=reason)
    if replica and moved:
        services.doorbells.ring(names.STOP_REPLICA, replica_id, queue=names.node_queue(replica.node_id))


def advance(services: Services) -> None:
    """Take every replica that is on its way one step further, and end the loads of those that load no more."""
    end_loads(services)
    with services.db.transaction() as db:
        moving = replicas.every(db, states=MOVING)
        known = {model.id: model for model in models.every(db)}
        stages = {replica.id: jobs.by_id(db, replica.job_id) if replica.job_id else None for replica in moving}
        now = clock(db)
    for replica in moving:
        model = known.get(replica.model_id)
        if model:
            job = stages[replica.id]
            if job and job.kind in DOWNLOADS and replica.revision == model.revision:
                model = learned(services, model, job)
            step = next_step(replica, job, has_file=bool(model.config.source), now=now)
            _take(services, step, replica, model, str((job.error or {}).get("message", "cancelled")) if job else "")


def end_loads(services: Services) -> None:
    """End every open load whose owner could not say how it has ended, as its replica did."""
    with services.db.transaction() as db:
        loads = jobs.listed(db, states=(JobState.OPEN,), kinds=(LOAD,), limit=MOST_LOADS)
        known = replicas.of_jobs(db, [job.id for job in loads])
    for job in loads:
        if ended := end_of_load(known.get(job.id)):
            state, reason = ended
            error = None if state is JobState.DONE else ModelUnavailable(reason or None)
            job_services.abort(services, job, error, state=state, force=True)


def fetch_request(model: Model) -> dict[str, Any]:
    """What a node is asked that is to fetch the files of a model."""
    config = model.config
    own, *further = [
        {**file.model_dump(include=set(File.model_fields)), "mirrors": list(config.mirrors_of(number))}
        for number, file in enumerate(config.files)
    ]
    return {"kind": "fetch_model", **own, "name": model.name, "parts": len(config.parts), "further": further}


def learned(services: Services, model: Model, job: Job) -> Model:
    """The model with what a node has read in its files, and with their SHA-256 and size where only the source knew these."""
    told = job.result or {}
    record = told.get("facts")
    facts = Facts.from_json(record) if not model.facts and isinstance(record, dict) else None
    if facts:
        with services.db.transaction() as db:
            models.learn(db, model, facts)
        model = model.model_copy(update={"facts": facts})
    contents = [told, *further] if isinstance(further := told.get("further", []), list) else []
    if told.get("sha256") and any(not (file.sha256 and file.size) for file in model.config.files):
        try:
            with services.db.transaction() as db:
                config = models.learn_contents(db, model, contents)
        except (ValueError, AttributeError) as error:
            log.warning("what was fetched for model %s cannot be what its node says: %s", model.name, error)
            return model
        model = model.model_copy(update={"config": config}) if config else model
    return model


def _take(services: Services, step: Step, replica: Replica, model: Model, reason: str) -> None:
    match step:
        case Step.INSTALL:
            name = model.config.backend
            request = request_for(Op.INSTALL, name, galleries.record(services, name))
            _start_stage(services, replica, ReplicaState.INSTALLING, "install_backend", model.id, request)
        case Step.FETCH:
            _start_stage(services, replica, ReplicaState.STAGING, "fetch_model", model.id, fetch_request(model))
        case Step.LOAD:
            _load(services, replica, model)
        case Step.REMIND:
            task = names.START_REPLICA if replica.state is ReplicaState.LOADING else names.STOP_REPLICA
            with services.db.transaction() as db:
                replicas.touch(db, replica.id)
            services.doorbells.ring(task, replica.id, queue=names.node_queue(replica.node_id))
        case Step.FAIL:
            with services.db.transaction() as db:
                replicas.move(db, replica.id, ReplicaState.FAILED, reason=f"{replica.state}: {reason}")
        case Step.WAIT:
            return


def _start_stage(
    services: Services, replica: Replica, state: ReplicaState, kind: str, model_id: str, request: dict[str, Any]
) -> None:
    job_id = job_services.submit_node_job(
        services, kind=kind, node_id=replica.node_id, model_id=model_id, request=request
    )
    with services.db.transaction() as db:
        replicas.move(db, replica.id, state, job_id=job_id)
