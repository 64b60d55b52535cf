"""A request for tokens becomes a job: accepted, in line, with its doorbell rung; found again by who comes back for it.

What becomes of a job that nobody reads is said here where its reader leaves, and in `localai_q.services.jobs` where its
reader's process has died.
"""

from __future__ import annotations

import time
from dataclasses import replace

from localai_q import names
from localai_q.bus.connection import broker_errors
from localai_q.bus.leases import Kept, Submission
from localai_q.cluster.events import End
from localai_q.cluster.jobs import GENERATIONS, Job, Keep
from localai_q.cluster.requests import GenerationRequest
from localai_q.cluster.states import JobState
from localai_q.errors import Cancelled, Gone, LocalAIError, ModelNotFound, NotFound, Unavailable, to_record
from localai_q.services.router import Router, Trip
from localai_q.services.wiring import Services
from localai_q.store import jobs


def submit(
    services: Services,
    router: Router,
    request: GenerationRequest,
    *,
    key_id: str,
    job_id: str,
    watcher: str,
    keep: Keep,
) -> Kept:
    """Accept a request: its row first, then its place in the line, then the doorbell.

    Args:
        watcher: the web process that waits for the job's events; empty for none.
        keep: what becomes of the job when nobody waits for it any more.

    Raises:
        ModelNotFound, ModelDisabled, UnsupportedByModel, ModelUnavailable, Busy, Unavailable: it was not accepted.
    """
    trip = router.route(request, job_id)
    try:
        return _accept(services, router, trip, key_id=key_id, watcher=watcher, keep=keep)
    except ModelNotFound:  # it was removed a moment ago: another one may have its name
        trip = router.route(request, job_id, younger_than=0.0)
        return _accept(services, router, trip, key_id=key_id, watcher=watcher, keep=keep)


def _accept(services: Services, router: Router, trip: Trip, *, key_id: str, watcher: str, keep: Keep) -> Kept:
    job_id, request, way = trip.job_id, trip.request, trip.way
    timeout = services.settings.request_timeout
    created = time.time()
    outline = request.outline().to_json()
    body = request.to_json()
    job = Job(id=job_id, kind=request.kind, state=JobState.OPEN, line=way.queue, model_id=trip.model.id, key_id=key_id,
              request=body, stream=request.stream, keep=keep)  # fmt: skip
    submission = Submission(job_id=job_id, line=way.queue, request=body, watcher=watcher, timeout=timeout,
                            lives=timeout + services.settings.journal_ttl, stream=request.stream, key_id=key_id,
                            outline=outline, keep=keep, created=created)  # fmt: skip
    try:
        with services.db.statement() as db:
            # The router may not know of a change of the model that was answered already.
            revision = jobs.add(db, job, timeout=timeout)
        _enter(services, trip, replace(submission, revision=revision), job)
    except LocalAIError:
        router.ended(job_id, way.queue)
        raise
    router.sent(trip)
    return Kept(job_id=job_id, key_id=key_id, outline=outline, line=way.queue, created=int(created), left=timeout)


def _enter(services: Services, trip: Trip, submission: Submission, job: Job) -> None:
    try:
        with broker_errors():
            services.leases.submit(submission, longest_line=services.settings.max_waiting)
            services.doorbells.ring(names.RUN_GENERATION, job.id, queue=trip.way.doorbell)
            if trip.way.needs_load:
                services.redis.publish(names.WAKE_CHANNEL, trip.model.id)
    except LocalAIError as error:
        refuse(services, job, error)
        raise


def find(services: Services, job_id: str, *, key_id: str) -> Kept:
    """The job that this key comes back for.

    Raises:
        NotFound: there is none of that id that this key asked for.
        Gone: its answer is kept no longer.
        Unavailable: it is being brought back, because Redis has lost it.
    """
    kept = services.leases.kept(job_id)
    if kept is None:
        with services.db.transaction() as db:
            row = jobs.by_id(db, job_id)
        if row and row.key_id == key_id and row.kind in GENERATIONS:
            if row.state is JobState.OPEN:
                raise Unavailable("The queue (Redis) has lost this job, which is being brought back. Try again soon.")
            raise Gone(f"The answer of job '{job_id}' is kept no longer; LOCALAI_Q_JOURNAL_TTL says for how long.")
    if kept is None or not kept.outline or kept.key_id != key_id:
        raise NotFound(f"There is no job '{job_id}' that was asked for with this key.")
    return kept


def abandon(services: Services, kept: Kept) -> None:
    """Cancel a job that nobody reads any more. Postgres need not be there for it."""
    services.leases.abort(kept.job_id, kept.line, End(state=JobState.CANCELLED, error=to_record(Cancelled())))


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
