"""The logs of jobs: made of what a job's journal has, and kept beside its row when it has ended."""

from __future__ import annotations

from collections.abc import Collection

from localai_q.bus import journal
from localai_q.cluster.joblog import text_of
from localai_q.cluster.jobs import NODE_JOBS, Job
from localai_q.errors import NotFound
from localai_q.services.wiring import Services
from localai_q.store import jobs

MOST_ENTRIES = 20_000  # of a journal that are looked at: the newest


def keep(services: Services, job_ids: Collection[str]) -> None:
    """Keep the logs of those of these jobs that are of nodes; their journals end with them."""
    with services.db.transaction() as db:
        own = jobs.of_nodes(db, job_ids)
    if not own:
        return
    logs = {job_id: text for job_id in own if (text := _from_journal(services, job_id))}
    with services.db.transaction() as db:
        jobs.keep_logs(db, logs)


def read(services: Services, job: Job) -> str:
    """What a job has said: so far, or until its end.

    Raises:
        NotFound: it is a generation, which has no log.
    """
    if job.kind not in NODE_JOBS:
        raise NotFound(f"Job '{job.id}' is a request to a model, which has no log.")
    with services.db.transaction() as db:
        kept = jobs.log_of(db, job.id)
    return _from_journal(services, job.id) if kept is None else kept


def _from_journal(services: Services, job_id: str) -> str:
    entries = journal.tail(services.redis, job_id, MOST_ENTRIES)
    return text_of((entry.attempt, entry.event) for entry in entries)
