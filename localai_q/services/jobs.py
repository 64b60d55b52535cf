"""Jobs of every kind: shown, cancelled, ended once, and never lost."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from localai_q import names
from localai_q.bus import journal, presence
from localai_q.bus.leases import CONTROL, LiveState, Submission
from localai_q.cluster.events import End, Event, Progress, decode
from localai_q.cluster.jobs import DEATHS, DOWNLOADS, GENERATIONS, GRACE, NODE_JOBS, Job, Keep, is_pause
from localai_q.cluster.requests import GenerationRequest
from localai_q.cluster.states import JobState
from localai_q.errors import (
    Cancelled,
    Conflict,
    DeadlineExceeded,
    GenerationFailed,
    LocalAIError,
    ModelNotFound,
    NotFound,
    Paused,
    Unavailable,
    to_record,
)
from localai_q.services import joblogs
from localai_q.services.wiring import Services
from localai_q.store import jobs, models, nodes, replicas
from localai_q.store.engine import clock
from localai_q.store.keys import ApiKey

log = logging.getLogger(__name__)

UNCLAIMED = 2.0  # seconds a job may wait with a silent doorbell before it is rung again
LOST = 5.0  # seconds after which a job that Redis does not know has been lost by it
REBUILT = 100  # attempts for each second of its age that a job gets which Redis lost: more than any old owner can hold
CANCELLED = {"asked": "cancelling", "ended": "cancelled"}
EVER = 365 * 24 * 3600.0
SHORTEST = 0.001  # seconds to a deadline that has passed, for 0 means that there is none
ANY_LENGTH = 1 << 40  # of a line, for jobs that were accepted already and for those of nodes


def submit_node_job(
    services: Services, *, kind: str, node_id: str, model_id: str | None, request: dict[str, Any]
) -> str:
    """Have a node do something long; the same thing for the same node is one job while it is open."""
    line = names.node_jobs_queue(node_id)
    with services.db.transaction() as db:
        nodes.lock(db, node_id)  # others may ask for the same at the same time
        existing = jobs.find_open(db, kind=kind, line=line, request=request)
        if existing:
            return existing
        job = Job(id=names.new_id(), kind=kind, state=JobState.OPEN, line=line, model_id=model_id, node_id=node_id,
                  request=request, keep=Keep.BACKGROUND)  # fmt: skip
        jobs.add(db, job)
    enter_line(services, job)
    return job.id


def show(services: Services, job_id: str, asker: ApiKey) -> dict[str, Any]:
    """One job with its live state, to who asked for it and to admins.

    Raises:
        NotFound: there is none of that id.
    """
    return shown(services, [existing(services, job_id, asker)])[0]


def listed(
    services: Services, *, states: Collection[str], kinds: Collection[str], limit: int, node_id: str = ""
) -> list[dict[str, Any]]:
    """Jobs, the newest first, with their live state."""
    with services.db.transaction() as db:
        found = jobs.listed(db, states=states, kinds=kinds, node_id=node_id, limit=limit)
    return shown(services, found)


def log_of(services: Services, job_id: str, asker: ApiKey) -> str:
    """What a job of a node has said, as text.

    Raises:
        NotFound: there is none of that id that `asker` may see.
    """
    return joblogs.read(services, existing(services, job_id, asker))


def cancel(services: Services, job_id: str, asker: ApiKey) -> str:
    """Cancel a job: "cancelled", "cancelling" while its owner is told, or the state in which it ended before.

    Postgres need not be there for a job that Redis knows.

    Raises:
        NotFound: there is none of that id that `asker` may see.
    """
    kept = services.leases.kept(job_id)
    if kept and (asker.role == "admin" or kept.key_id == asker.id):
        end = End(state=JobState.CANCELLED, error=to_record(Cancelled()))
        if became := services.leases.abort(job_id, kept.line, end):
            return CANCELLED[became]
        ended = journal.latest(services.redis, [job_id]).get(job_id)
        if isinstance(ended, End):
            if not is_pause(ended.error):
                return ended.state
            apply_ends(services)  # a pause that nobody has written yet could not be ended
    job = existing(services, job_id, asker)
    if job.is_paused:
        with services.db.transaction() as db:
            jobs.end_pause(db, job.id, to_record(Cancelled()))
    if job.state is not JobState.OPEN:
        return job.state
    became = abort(services, job, Cancelled(), state=JobState.CANCELLED)
    return CANCELLED[became] if became else existing(services, job_id, asker).state


def pause(services: Services, job_id: str, asker: ApiKey) -> None:
    """Have a node stop a download and keep what has come of it, until it is tried again. What needs it waits for that.

    Raises:
        NotFound: there is none of that id that `asker` may see.
        Conflict: it is no download, or has ended.
    """
    job = existing(services, job_id, asker)
    if job.kind not in DOWNLOADS:
        raise Conflict(f"Job '{job_id}' is a {job.kind}: only a download can be paused ({', '.join(DOWNLOADS)}).")
    if job.state is not JobState.OPEN or not abort(services, job, Paused(), state=JobState.CANCELLED):
        raise Conflict(f"Job '{job_id}' has ended: there is nothing to pause.")


def forget(services: Services, job_id: str, asker: ApiKey) -> None:
    """Delete what is known of a job of a node that has ended.

    Raises:
        NotFound: there is none of that id that `asker` may see.
        Conflict: it has not ended, or something waits to learn of its end.
    """
    job = existing(services, job_id, asker)
    with services.db.transaction() as db:
        if not jobs.forget(db, ids=[job.id], kinds=NODE_JOBS):
            raise Conflict(f"Job '{job_id}' is {job.state} and cannot be dismissed: cancel it first.")


def prune(services: Services, *, older_than: float, states: Collection[str], kinds: Collection[str]) -> int:
    """Delete what is known of jobs that ended more than so many seconds ago; how many. What is paused stays."""
    with services.db.transaction() as db:
        return jobs.forget(db, states=states, kinds=kinds, older_than=older_than)


def abort(
    services: Services, job: Job, error: LocalAIError | None, *, state: JobState = JobState.FAILED, force: bool = False
) -> str | None:
    """End an open job, or ask its owner to: "ended", "asked", or None when it had ended.

    A job that Redis has lost is brought back first, for its owner may be about to restore it, and must be refused.
    `error`: None of one that is done.
    """
    end = End(state=state, error=to_record(error) if error else None)
    became = services.leases.abort(job.id, job.line, end, force=force, pause=isinstance(error, Paused))
    if became or job.id in _unwritten(services):
        return became
    live = services.leases.live([job.id]).get(job.id)
    if live is None and not _bring_back(services, job):
        return None
    return services.leases.abort(job.id, job.line, end, force=True)


def end_at_once(services: Services, db: Any, found: Iterable[Job], error: LocalAIError) -> None:
    """End open jobs as part of a transaction, whoever works on them: what they are for is gone."""
    end = End(state=JobState.FAILED, error=to_record(error))
    ended = [job for job in found if jobs.end(db, job.id, end, attempt=job.attempt)]
    for job in ended:
        services.leases.abort(job.id, job.line, end, force=True)


def apply_ends(services: Services) -> int:
    """Write the ends that owners have left in Redis into Postgres, each once. How many were written."""
    kinds: list[str] = []
    for owner, ends in _ends(services).items():
        kinds += _apply(services, owner, ends)
        used = set(filter(None, services.leases.holders(list(ends)).values()))
        with services.db.transaction() as db:  # of its own: who removes a model locks replicas before jobs
            replicas.use(db, used)
        joblogs.keep(services, list(ends))
        services.leases.forget_ends(owner, list(ends))
    if not set(kinds).isdisjoint(NODE_JOBS):
        services.redis.publish(names.WAKE_CHANNEL, "")  # a replica waits for its next stage
    return len(kinds)


def _apply(services: Services, owner: str, ends: Mapping[str, str]) -> list[str]:
    """Write these ends in one transaction; if one cannot be written, each in its own, so that it holds up no other."""
    try:
        with services.db.transaction() as db:
            kinds = [_apply_end(db, owner, job_id, record) for job_id, record in ends.items()]
    except Unavailable:
        raise
    except Exception:
        if len(ends) > 1:
            return [kind for job_id, record in ends.items() for kind in _apply(services, owner, {job_id: record})]
        log.exception("an end by %s cannot be written down", owner)
        unreadable = End(
            state=JobState.FAILED, error=to_record(GenerationFailed("The end of this job cannot be read."))
        )
        with services.db.transaction() as db:
            kinds = [jobs.end(db, job_id, unreadable, attempt=0) for job_id in ends]
    return [kind for kind in kinds if kind]


def _apply_end(db: Any, owner: str, job_id: str, record: str) -> str | None:
    attempt, _, text = record.partition(" ")
    event = decode(text)
    if not isinstance(event, End):
        raise ValueError(f"the end of job {job_id} is no end: {text[:100]!r}")
    return jobs.end(db, job_id, event, attempt=int(attempt), node_id=None if owner == CONTROL else owner)


def recover(services: Services) -> None:
    """Repair what a crash left behind: late jobs, expired leases, silent doorbells, jobs that Redis lost.

    End, too, what has lost its sense: jobs of a model that was removed, and jobs that nobody waits for any more.
    After an outage owners have one lease to show themselves before what they held counts as theirs no more.
    """
    with services.db.transaction() as db:
        open_jobs = jobs.open_jobs(db, older_than=UNCLAIMED)
        now = clock(db)
        known = {model.id for model in models.every(db)}
    watched = presence.watched_for(services.redis)
    owners_had_time = watched >= services.settings.lease
    late = [job for job in open_jobs if job.deadline and job.deadline < now]
    for job in late:
        abort(services, job, DeadlineExceeded(), force=True)
    current = [job for job in open_jobs if job not in late]
    if owners_had_time:
        for line in sorted({job.line for job in open_jobs}):
            _take_up_again(services, services.leases.requeue_expired(line), line, "its lease has run out")
    stranded = [job for job in current if job.kind in GENERATIONS and job.model_id not in known]
    _end_stranded(services, stranded)
    current = [job for job in current if job not in stranded]
    for line in sorted({job.line for job in current}):
        _ring_again(services, line)
    _cancel_orphans(services, current)
    if watched >= services.settings.load_stall:
        _end_untaken(services, current)
    if owners_had_time:
        _rebuild(services, [job for job in current if job.created < now - LOST])


def _end_stranded(services: Services, stranded: Sequence[Job]) -> None:
    """End jobs of models that are no more, unless somebody still works on them: what runs may end."""
    live = services.leases.live([job.id for job in stranded])
    unwritten = _unwritten(services) if stranded else set()
    for job in stranded:
        if job.id not in unwritten and (job.id not in live or live[job.id].state == "waiting"):
            abort(services, job, ModelNotFound("The model of this request was removed."))
            services.redis.delete(job.line)


def _end_untaken(services: Services, open_jobs: Sequence[Job]) -> None:
    """End what a node has not begun for long though it works on nothing else: whoever does its jobs is not there."""
    patience = services.settings.load_stall
    of_nodes = {job.id: job for job in open_jobs if job.kind in NODE_JOBS}
    for line in sorted({job.line for job in of_nodes.values()}):
        waiting = services.leases.waiting(line, older_than=patience)
        if waiting and not services.leases.held(line):
            for job in [of_nodes[job_id] for job_id in waiting if job_id in of_nodes]:
                abort(services, job, Unavailable(f"its node has not begun it for {patience:.0f} s"))


def _cancel_orphans(services: Services, open_jobs: Sequence[Job]) -> None:
    """Cancel generations that nobody reads and nobody has come back for in time."""
    live = services.leases.live([job.id for job in open_jobs if job.kind in GENERATIONS])
    gone = presence.gone(services.redis, {watcher for state in live.values() for watcher in state.watchers})
    now = presence.now(services.redis)
    for job in open_jobs:
        state = live.get(job.id)
        if state and state.keep is not Keep.BACKGROUND and _is_orphaned(state, gone, now):
            log.warning("nobody waits for job %s any more", job.id, extra={"action": "orphan"})
            nobody = Cancelled("The job was cancelled: nobody waited for it any more.")
            abort(services, job, nobody, state=JobState.CANCELLED)


def _is_orphaned(state: LiveState, gone: Collection[str], now: float) -> bool:
    """Whether all that waited for a job died, or left longer than `GRACE` ago.

    A job that Redis lost and got back names nobody who waits or has left; it is let be.
    """
    if state.watchers:
        return set(gone).issuperset(state.watchers)
    return state.left is not None and now - state.left >= GRACE


def bereave(services: Services, owner: str, line: str, why: str) -> None:
    """An owner is known to be dead: what it held goes back into its line at once, without waiting for the leases."""
    _take_up_again(services, services.leases.requeue_of(owner, line), line, why)
    take_over_doorbells(services, owner, line)


def take_over_doorbells(services: Services, replica_id: str, line: str) -> None:
    """A replica takes no doorbells any more: all that serve its model are rung for those that lie on its own queue."""
    services.redis.delete(*names.keys_of_queue(names.replica_queue(replica_id)))
    _ring_again(services, line, older_than=0.0)


def _take_up_again(services: Services, deaths: Mapping[str, int], line: str, why: str) -> None:
    """Ring for jobs whose owner has died; `deaths` says the how manieth. One that kills its owners fails instead."""
    for job_id, count in deaths.items():
        log.warning("the owner of job %s has died: %s", job_id, why, extra={"action": "requeue"})
        if count >= DEATHS and line.startswith("model."):
            poison = GenerationFailed(f"{count} replicas died while they worked on this request. The last: {why}")
            services.leases.abort(job_id, line, End(state=JobState.FAILED, error=to_record(poison)), force=True)
        else:
            _ring(services, job_id, line)


def _ring_again(services: Services, line: str, *, older_than: float = UNCLAIMED) -> None:
    """Ring for those who have waited so long, if the queue holds fewer doorbells than jobs wait."""
    waiting = services.leases.waiting(line, older_than=older_than)
    missing = len(waiting) - int(services.redis.llen(line))
    for job_id in waiting[: max(missing, 0)]:
        _ring(services, job_id, line)


def _rebuild(services: Services, open_jobs: Sequence[Job]) -> None:
    """Bring back what Redis no longer knows. A reader that was shown text which nobody has any more finds that out."""
    known = services.leases.live([job.id for job in open_jobs])
    unwritten = _unwritten(services)
    for job in open_jobs:
        if job.id not in known and job.id not in unwritten and _bring_back(services, job):
            log.warning("Redis lost job %s, and no owner restored it", job.id, extra={"action": "rebuild"})


def _bring_back(services: Services, job: Job) -> bool:
    """Put a job that Redis has lost into its line, above any attempt that an owner may hold. False if it has ended."""
    with services.db.transaction() as db:
        request, now, revision = jobs.request(db, job.id), clock(db), models.revision(db, job.model_id)
    if request is None:
        return False
    attempt = REBUILT * (1 + int(now - job.created))
    timeout = max(job.deadline - now, SHORTEST) if job.deadline else 0.0
    enter_line(services, replace(job, request=request), timeout=timeout, attempt=attempt, revision=revision)
    return True


def _unwritten(services: Services) -> set[str]:
    """Jobs that have ended and whose rows do not say so yet."""
    return {job_id for ends in _ends(services).values() for job_id in ends}


def _ends(services: Services) -> dict[str, dict[str, str]]:
    with services.db.transaction() as db:
        known = [node.id for node in nodes.every(db)]
    return services.leases.ends(known)


def enter_line(services: Services, job: Job, *, timeout: float = 0.0, attempt: int = 0, revision: int = 0) -> None:
    """Put an open job into its line in Redis, and tell those who serve that."""
    lives = (timeout or EVER) + services.settings.journal_ttl
    request = job.request or {}
    outline = GenerationRequest.from_json(request).outline().to_json() if job.kind in GENERATIONS else {}
    submission = Submission(job_id=job.id, line=job.line, request=request, timeout=timeout, lives=lives,
                            stream=job.stream, attempt=attempt, key_id=job.key_id or "", outline=outline,
                            keep=job.keep, created=job.created, revision=revision)  # fmt: skip
    services.leases.submit(submission, longest_line=ANY_LENGTH)
    _ring(services, job.id, job.line)


def _ring(services: Services, job_id: str, line: str) -> None:
    """Tell those who serve a line of a job in it. Of a load its node is told, by whoever moves its replica."""
    if not line.startswith("replica."):
        task = names.RUN_JOB if line.startswith("node.") else names.RUN_GENERATION
        services.doorbells.ring(task, job_id, queue=line)


def existing(services: Services, job_id: str, asker: ApiKey) -> Job:
    """The job of this id, if `asker` may see it.

    Raises:
        NotFound: there is none.
    """
    with services.db.transaction() as db:
        job = jobs.by_id(db, job_id)
    if job is None or (asker.role != "admin" and job.key_id != asker.id):
        raise NotFound(f"There is no job '{job_id}'. An admin sees all of them with 'localai-q jobs list'.")
    return job


def shown(services: Services, found: Sequence[Job]) -> list[dict[str, Any]]:
    """Jobs as people see them, with their live state."""
    open_ids = [job.id for job in found if job.state is JobState.OPEN]
    live = services.leases.live(open_ids)
    progress = journal.latest(services.redis, [job.id for job in found if job.id in live and job.kind in NODE_JOBS])
    with services.db.transaction() as db:
        node_names = {node.id: node.name for node in nodes.every(db)}
        model_names = {model.id: model.name for model in models.every(db)}
    records = []
    for job in found:
        now = live.get(job.id)
        node_id = (now.node_id if now and now.state == "leased" else None) or job.node_id
        records.append({
            "id": job.id,
            "kind": job.kind,
            "state": job.state,
            "live": now.state if now else None,
            "subject": job.subject or None,
            "node": node_names.get(node_id or "", node_id),
            "node_id": node_id,
            "model": model_names.get(job.model_id or "", job.model_id),
            "attempt": now.attempt if now else job.attempt,
            "progress": _progress(progress.get(job.id)),
            "error": job.error,
            "result": job.result,
            "usage": {"prompt_tokens": job.usage.prompt, "completion_tokens": job.usage.completion,
                      "cached_tokens": job.usage.cached} if job.kind in GENERATIONS else None,
            "timings": job.timings,
            "created": job.created,
            "ended": job.ended,
            "deadline": job.deadline,
        })  # fmt: skip
    return records


def percentages(services: Services, job_ids: Sequence[str]) -> dict[str, float]:
    """How far jobs of nodes are, of 100, as far as that is known."""
    latest = journal.latest(services.redis, list(job_ids))
    return {job_id: percentage(event) for job_id, event in latest.items() if isinstance(event, Progress)}


def progress_of(services: Services, job_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What jobs of nodes have last said of their progress, of those that have said something."""
    latest = journal.latest(services.redis, list(job_ids))
    return {job_id: shown for job_id, event in latest.items() if (shown := _progress(event))}


def percentage(progress: Progress) -> float:
    """How far a job is, of 100."""
    return round(min(100.0 * progress.done / progress.total, 100.0), 1) if progress.total else 0.0


def _progress(event: Event | None) -> dict[str, Any] | None:
    if not isinstance(event, Progress):
        return None
    return {"stage": event.stage, "done": event.done, "total": event.total, "unit": event.unit, "note": event.note}
