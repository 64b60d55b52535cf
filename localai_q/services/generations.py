"""A request for tokens becomes a job: accepted, in line, with its doorbell rung."""

from __future__ import annotations

import time
from dataclasses import dataclass

from localai_q import names
from localai_q.bus.connection import broker_errors
from localai_q.bus.leases import Submission
from localai_q.cluster.events import End
from localai_q.cluster.jobs import Job
from localai_q.cluster.requests import GenerationRequest
from localai_q.cluster.routing import route
from localai_q.cluster.states import JobState
from localai_q.errors import LocalAIError, Unavailable, to_record
from localai_q.services.snapshots import Snapshots
from localai_q.services.wiring import Services
from localai_q.store import jobs


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A job that stands in its line."""

    job_id: str
    line: str
    deadline: float  # seconds since the epoch
    place: int  # in the line, from 1


def submit(
    services: Services, snapshots: Snapshots, request: GenerationRequest, *, key_id: str, job_id: str, watcher: str
) -> Accepted:
    """Accept a request: its row first, then its place in the line, then the doorbell.

    Raises:
        ModelNotFound, UnsupportedByModel, ModelUnavailable, Busy, Unavailable: it was not accepted.
    """
    model, snapshot = snapshots.model(request.model)
    way = route(model, snapshot.replicas, request.kind, time.time())
    timeout = services.settings.request_timeout
    deadline = time.time() + timeout
    body = request.to_json()
    job = Job(id=job_id, kind=request.kind, state=JobState.OPEN, line=way.queue, model_id=model.id, key_id=key_id,
              request=body, stream=request.stream, deadline=deadline)  # fmt: skip
    with services.db.transaction() as db:
        jobs.add(db, job)
    submission = Submission(job_id=job_id, line=way.queue, request=body, watcher=watcher, deadline=deadline,
                            lives=timeout + services.settings.journal_ttl, stream=request.stream)  # fmt: skip
    try:
        with broker_errors():
            place = services.leases.submit(submission, longest_line=services.settings.max_waiting)
            services.doorbells.ring(names.RUN_GENERATION, job_id, queue=way.queue)
            if way.needs_load:
                services.redis.publish(names.WAKE_CHANNEL, model.id)
    except LocalAIError as error:
        refuse(services, job, error)
        raise
    return Accepted(job_id=job_id, line=way.queue, deadline=deadline, place=place)


def refuse(services: Services, job: Job, error: LocalAIError) -> None:
    """End a job that could not be put in line, so that nothing runs for a caller who was told no."""
    end = End(state=JobState.FAILED, error=to_record(error))
    try:
        services.leases.abort(job.id, job.line, end, force=True)
    except Unavailable:
        # It may stand in Redis: the row stays open, so that recovery takes it out of there.
        with services.db.transaction() as db:
            jobs.make_late(db, job.id)
        return
    with services.db.transaction() as db:
        jobs.end(db, job.id, end, attempt=0)
