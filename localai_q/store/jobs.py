"""Queries on jobs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    and_,
    case,
    cast,
    delete,
    exists,
    func,
    insert,
    literal,
    null,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as upsert

from localai_q.cluster.events import End, Usage
from localai_q.cluster.jobs import GENERATIONS, NODE_JOBS, Job, Keep
from localai_q.cluster.states import COMING_UP, JOB_MOVES, JobState, sources
from localai_q.errors import ModelNotFound, Paused
from localai_q.store.tables import backend_wishes, job_logs, jobs, models, quantizations, replicas

OF_NODE = jobs.c.kind.in_(NODE_JOBS)
SUBJECT = func.coalesce(jobs.c.request["backend"].astext, jobs.c.request["name"].astext, "")
LISTED = [  # never what people asked
    *[column for column in jobs.c if column.name != "request"],
    case((OF_NODE, SUBJECT), else_="").label("subject"),
]


def add(db: Connection, job: Job, *, timeout: float | None = None) -> int:
    """Enter an open job with its request, which must end within `timeout` seconds.

    Returns:
        The revision that its model has at this moment; 0 without a model.

    Raises:
        ModelNotFound: it is a generation whose model is no more.
    """
    revision = select(models.c.revision).where(models.c.id == job.model_id).scalar_subquery()
    values = {
        "id": job.id,
        "kind": job.kind,
        "state": job.state,
        "line": job.line,
        "model_id": job.model_id,
        "node_id": job.node_id,
        "key_id": job.key_id,
        "request": job.request,
        "stream": job.stream,
        "keep": job.keep,
    }
    given = [literal(value, jobs.c[name].type) for name, value in values.items()]
    deadline = null() if timeout is None else func.now() + func.make_interval(0, 0, 0, 0, 0, 0, timeout)
    row = select(*given, deadline).where(revision.is_not(None) if job.kind in GENERATIONS else true())
    entered: int | None = db.execute(
        insert(jobs).from_select([*values, "deadline"], row).returning(func.coalesce(revision, 0))
    ).scalar_one_or_none()
    if entered is None:
        raise ModelNotFound("The model of this request was removed.")
    return entered


def by_id(db: Connection, job_id: str) -> Job | None:
    row = db.execute(select(*LISTED).where(jobs.c.id == job_id)).one_or_none()
    return _job(row) if row else None


def listed(
    db: Connection, *, states: Collection[str] = (), kinds: Collection[str] = (), node_id: str = "", limit: int = 100
) -> list[Job]:
    """Jobs without their requests, the newest first."""
    query = select(*LISTED).order_by(jobs.c.created_at.desc(), jobs.c.id).limit(limit)
    if states:
        query = query.where(jobs.c.state.in_(list(states)))
    if kinds:
        query = query.where(jobs.c.kind.in_(list(kinds)))
    if node_id:
        query = query.where(jobs.c.node_id == node_id)
    return [_job(row) for row in db.execute(query)]


def open_jobs(db: Connection, *, older_than: float = 0.0) -> list[Job]:
    """Open jobs without their requests that were accepted more than so many seconds ago, the oldest first."""
    limit = func.now() - func.make_interval(0, 0, 0, 0, 0, 0, older_than)
    query = select(*LISTED).where(jobs.c.state == JobState.OPEN, jobs.c.created_at < limit).order_by(jobs.c.created_at)
    return [_job(row) for row in db.execute(query.limit(10_000))]


def open_in(db: Connection, line: str) -> list[Job]:
    """The open jobs of a line, without their requests."""
    return [_job(row) for row in db.execute(select(*LISTED).where(jobs.c.state == JobState.OPEN, jobs.c.line == line))]


def open_on(db: Connection, node_id: str) -> list[Job]:
    """The open jobs that this node must do, without their requests."""
    query = select(*LISTED).where(jobs.c.state == JobState.OPEN, jobs.c.node_id == node_id, OF_NODE)
    return [_job(row) for row in db.execute(query)]


def request(db: Connection, job_id: str) -> dict[str, Any] | None:
    """What was asked; None once the job has ended."""
    query = select(jobs.c.request).where(jobs.c.id == job_id, jobs.c.state == JobState.OPEN)
    found: dict[str, Any] | None = db.execute(query).scalar_one_or_none()
    return found


def kept_request(db: Connection, job_id: str) -> dict[str, Any] | None:
    """What a node was to do, also once that has ended; None of a generation."""
    query = select(jobs.c.request).where(jobs.c.id == job_id, OF_NODE)
    found: dict[str, Any] | None = db.execute(query).scalar_one_or_none()
    return found


def make_late(db: Connection, job_id: str) -> None:
    """Let the deadline of an open job have passed, so that recovery ends it."""
    db.execute(update(jobs).where(jobs.c.id == job_id, jobs.c.state == JobState.OPEN).values(deadline=func.now()))


def find_open(db: Connection, *, kind: str, line: str, request: dict[str, Any]) -> str | None:
    """The open job that is just this one."""
    query = select(jobs.c.id).where(jobs.c.state == JobState.OPEN, jobs.c.kind == kind, jobs.c.line == line)
    found: str | None = db.execute(query.where(jobs.c.request == request).limit(1)).scalar_one_or_none()
    return found


def is_quantizing(db: Connection, quantization_id: str) -> bool:
    """Whether a job that makes the file of this quantization has not ended."""
    made_for = jobs.c.request["quantization"].astext == quantization_id
    return bool(db.execute(select(exists().where(jobs.c.state == JobState.OPEN, made_for))).scalar_one())


def newest(db: Connection, *, kind: str, line: str, limit: int) -> list[Job]:
    """Jobs of a kind in a line without their requests, the newest first."""
    query = select(*LISTED).where(jobs.c.kind == kind, jobs.c.line == line)
    return [_job(row) for row in db.execute(query.order_by(jobs.c.created_at.desc()).limit(limit))]


def fetches(db: Connection, *, model_id: str, source: str, limit: int) -> list[Job]:
    """The fetches of a model's files whose own is had from this source, the newest first."""
    query = select(jobs, literal("").label("subject")).where(jobs.c.kind == "fetch_model")
    query = query.where(jobs.c.model_id == model_id, jobs.c.request["source"].astext == source)
    return [_job(row) for row in db.execute(query.order_by(jobs.c.created_at.desc()).limit(limit))]


def open_fetches(db: Connection, model_id: str) -> list[Job]:
    """The fetches of a model's files that have not ended."""
    query = select(jobs, literal("").label("subject")).where(jobs.c.kind == "fetch_model", jobs.c.model_id == model_id)
    return [_job(row) for row in db.execute(query.where(jobs.c.state == JobState.OPEN))]


def end(db: Connection, job_id: str, end: End, *, attempt: int, node_id: str | None = None) -> str | None:
    """Write a job's end, once, and return its kind; None if it has an end already. What a person has asked is erased."""
    target = JobState(end.state)
    values: dict[str, Any] = {
        "state": target,
        "attempt": attempt,
        "request": case((OF_NODE, jobs.c.request), else_=null()),
        "error": end.error,
        "result": end.result,
        "prompt_tokens": end.usage.prompt,
        "completion_tokens": end.usage.completion,
        "cached_tokens": end.usage.cached,
        "timings": end.timings,
        "ended_at": func.now(),
    }
    if node_id:
        values["node_id"] = node_id
    allowed = sources(JOB_MOVES, target)
    statement = update(jobs).where(jobs.c.id == job_id, jobs.c.state.in_(allowed)).values(values).returning(jobs.c.kind)
    kind: str | None = db.execute(statement).scalar_one_or_none()
    return kind


def counts(db: Connection) -> dict[tuple[str, str], int]:
    """How many jobs there are by kind and state."""
    rows = db.execute(select(jobs.c.kind, jobs.c.state, func.count()).group_by(jobs.c.kind, jobs.c.state))
    return {(kind, state): count for kind, state, count in rows}


def forget(
    db: Connection, *, ids: Collection[str] = (), states: Collection[str] = (), kinds: Collection[str] = (),
    older_than: float = 0.0,
) -> int:  # fmt: skip
    """Delete jobs that ended more than so many seconds ago, narrowed as asked; how many.

    What a replica, a wish or a quantization is to learn of first stays, and what is paused, unless it is named. Where the
    last fetch of a model's files was cancelled and is forgotten, so is that the model says `preload`.
    """
    limit = func.now() - func.make_interval(0, 0, 0, 0, 0, 0, older_than)
    chosen = [jobs.c.state != JobState.OPEN, jobs.c.ended_at <= limit]
    if not ids:
        chosen.append(jobs.c.error["error"].astext.is_distinct_from(Paused.__name__))
    chosen += [~exists().where(table.c.job_id == jobs.c.id) for table in (backend_wishes, quantizations)]
    chosen.append(~exists().where(replicas.c.job_id == jobs.c.id, replicas.c.state.in_(COMING_UP)))
    for column, allowed in ((jobs.c.id, ids), (jobs.c.state, states), (jobs.c.kind, kinds)):
        if allowed:
            chosen.append(column.in_(list(allowed)))
    _end_preloads(db, and_(*chosen))
    return db.execute(delete(jobs).where(*chosen)).rowcount


def _end_preloads(db: Connection, chosen: ColumnElement[bool]) -> None:
    """Let models no more say `preload` of whose fetches the last is one of these, and was cancelled."""
    later = jobs.alias()
    of_model = (jobs.c.model_id == models.c.id, jobs.c.request["source"].astext == models.c.config["source"].astext)
    is_last = ~exists().where(later.c.kind == "fetch_model", later.c.model_id == jobs.c.model_id,
                              later.c.request["source"] == jobs.c.request["source"],
                              later.c.created_at > jobs.c.created_at)  # fmt: skip
    given_up = exists().where(
        chosen, *of_model, jobs.c.kind == "fetch_model", jobs.c.state == JobState.CANCELLED, is_last
    )
    wanted = models.c.config["preload"].as_boolean()
    off = models.c.config.concat(cast({"preload": False}, JSONB))
    db.execute(update(models).where(wanted, given_up).values(config=off))


def end_pause(db: Connection, job_id: str, error: dict[str, Any]) -> None:
    """Let a job that was paused have been cancelled with this error."""
    db.execute(update(jobs).where(jobs.c.id == job_id, jobs.c.state == JobState.CANCELLED).values(error=error))


def keep_logs(db: Connection, logs: Mapping[str, str]) -> None:
    """Keep what these jobs have said, as long as they are kept."""
    for job_id, text in logs.items():
        statement = upsert(job_logs).values(job_id=job_id, text=text)
        db.execute(statement.on_conflict_do_update(index_elements=[job_logs.c.job_id], set_={"text": text}))


def log_of(db: Connection, job_id: str) -> str | None:
    """What a job has said, once it has ended."""
    found: str | None = db.execute(select(job_logs.c.text).where(job_logs.c.job_id == job_id)).scalar_one_or_none()
    return found


def of_nodes(db: Connection, job_ids: Collection[str]) -> list[str]:
    """Those of these jobs that are of nodes."""
    return list(db.execute(select(jobs.c.id).where(jobs.c.id.in_(list(job_ids)), OF_NODE)).scalars())


def _job(row: Row[Any]) -> Job:
    values = row._mapping
    return Job(
        id=row.id,
        kind=row.kind,
        state=JobState(row.state),
        line=row.line,
        model_id=row.model_id,
        node_id=row.node_id,
        key_id=row.key_id,
        request=values.get("request"),
        subject=row.subject,
        stream=row.stream,
        keep=Keep(row.keep),
        attempt=row.attempt,
        error=row.error,
        result=row.result,
        usage=Usage(prompt=row.prompt_tokens, completion=row.completion_tokens, cached=row.cached_tokens),
        timings=row.timings,
        deadline=row.deadline.timestamp() if row.deadline else None,
        created=row.created_at.timestamp(),
        ended=row.ended_at.timestamp() if row.ended_at else None,
    )
