"""Quantizations: asked for, shown, stopped, taken from stage to stage, and made into models."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import PurePosixPath
from typing import IO, Any

from pydantic import ValidationError

from localai_q import names
from localai_q.cluster import parts, sources
from localai_q.cluster.backends import Op, has
from localai_q.cluster.builds import Build
from localai_q.cluster.fleet import Fleet
from localai_q.cluster.jobs import Job
from localai_q.cluster.models import File, Model, ModelConfig
from localai_q.cluster.nodes import Node
from localai_q.cluster.quantizing import (
    CAPABILITY,
    KIND,
    MOST,
    MOST_ATTEMPTS,
    SIMILARITY,
    TYPES,
    Made,
    Order,
    Part,
    Quantization,
    Source,
    Spec,
    Step,
    choose,
    default_name,
    failure,
    next_step,
    percentage,
    status,
)
from localai_q.cluster.states import JobState
from localai_q.documents import checked
from localai_q.errors import (
    Cancelled,
    Conflict,
    InvalidValue,
    NotFound,
    Unavailable,
    UnsupportedByModel,
)
from localai_q.gallery.catalog import BackendEntry, BuildEntry
from localai_q.services import galleries, models, uploads
from localai_q.services import jobs as job_services
from localai_q.services.backends import request_for
from localai_q.services.nodes import UNHEALTHY_AFTER
from localai_q.services.wiring import Services
from localai_q.store import backends as wish_rows
from localai_q.store import jobs as job_rows
from localai_q.store import models as model_rows
from localai_q.store import nodes as node_rows
from localai_q.store import quantizations as rows
from localai_q.store import replicas as replica_rows
from localai_q.store.engine import clock

log = logging.getLogger(__name__)

STARTS_ANEW = frozenset({
    "source", "mirrors", "sha256", "size", "parts", "memory", "spread_all", "min_replicas", "max_replicas", "idle_timeout", "pinned",
    "disabled", "preload",
})  # fmt: skip  # what of a model's configuration is not that of a model made of it


def backends(services: Services) -> list[dict[str, Any]]:
    """Every backend that can quantize, and on which nodes it is."""
    with services.db.transaction() as db:
        known = node_rows.every(db)
    return [
        {"name": entry.name, "version": entry.version, "description": entry.description,
         "types": list(TYPES), "nodes": [node.name for node in known if has(node, entry.name)]}
        for entry in galleries.backends(services) if CAPABILITY in entry.capabilities
    ]  # fmt: skip


def create(services: Services, order: Order) -> dict[str, Any]:
    """Have a file quantized; the quantization as `show` tells it.

    Raises:
        NotFound: there is no such model or backend.
        InvalidValue: a file cannot be fetched so.
        UnsupportedByModel: the model ranks documents, by which the result could not be compared with it.
        Conflict: there are too many.
    """
    entry = _backend(services, order.backend)
    model, source = _source(services, order)
    spec = Spec(
        source=source, quantization_type=order.quantization_type, backend=entry.name, text=order.text,
        entry=galleries.record(services, entry.name), options=order.extra_options, model=model.name if model else "",
        config=model.config if model else ModelConfig(),
    )  # fmt: skip
    _check(services, spec)
    name = order.name or default_name(order.model, order.quantization_type)
    with services.db.transaction() as db:
        if rows.count(db) >= MOST:
            raise Conflict(f"There are {MOST} quantizations: delete some of them first.")
        made = rows.add(db, name, spec)
    log.info("quantization %s: %s to %s", made, order.model, order.quantization_type, extra={"action": "quantize"})
    return show(services, made)


def show(services: Services, quantization_id: str) -> dict[str, Any]:
    """One quantization.

    Raises:
        NotFound: there is none of that id.
    """
    return _shown(services, [_existing(services, quantization_id)])[0]


def listed(services: Services) -> list[dict[str, Any]]:
    """All quantizations, the newest first."""
    with services.db.transaction() as db:
        found = rows.every(db)
    return _shown(services, found)


def stop(services: Services, quantization_id: str) -> dict[str, Any]:
    """Stop a quantization; what it has left goes. Answers like `show`; one that has ended stays so.

    Raises:
        NotFound: there is none of that id.
    """
    one = _existing(services, quantization_id)
    with services.db.transaction() as db:
        stopped = rows.end(db, one.id, JobState.CANCELLED)
    if stopped:
        if one.job_id:
            _abort(services, one.job_id)
        _forget_output(services, quantization_id)
    return show(services, quantization_id)


def retry(services: Services, quantization_id: str) -> dict[str, Any]:
    """Begin a quantization anew that has failed or was stopped, as it was asked for. Answers like `show`.

    What a node still has of it, as the source, is not fetched or made again.

    Raises:
        NotFound: there is none of that id.
        Conflict: it has not failed and was not stopped, or its node has not stopped yet.
        InvalidValue: a file cannot be fetched any more.
    """
    one = _existing(services, quantization_id)
    _check(services, one.spec)
    with services.db.transaction() as db:
        if not rows.reopen(db, one.id):
            raise Conflict(f"Quantization '{one.id}' is {status(one, '')}: only what has failed or was stopped can be "
                           "tried again.")  # fmt: skip
        if job_rows.is_quantizing(db, one.id):
            raise Conflict(f"The node of quantization '{one.id}' has not stopped it yet: try again in a moment.")
    return show(services, one.id)


def remove(services: Services, quantization_id: str) -> None:
    """Forget a quantization, and its file unless a model has that.

    Raises:
        NotFound: there is none of that id.
        Conflict: it is not done.
    """
    one = _existing(services, quantization_id)
    if one.state is JobState.OPEN:
        raise Conflict(f"Quantization '{one.id}' is not done: stop it first.")
    with services.db.transaction() as db:
        rows.remove(db, one.id)
    if one.output:
        models.forget_stored(services, {one.output})


def import_model(services: Services, quantization_id: str, name: str | None) -> dict[str, Any]:
    """Register what was made as a model: with what its source's model says of the engine, placed as any new one.

    Returns `{"name", "id"}`.

    Raises:
        NotFound: there is none of that id.
        Conflict: it is not done, or the name is taken.
    """
    one = _done(services, quantization_id)
    spec, made = one.spec, one.result or {}
    kept = spec.config.model_dump(exclude=set(STARTS_ANEW))
    if not spec.model:  # nobody has said yet what it is for
        kept["embeddings"] = SIMILARITY in made
    origin = f"{spec.quantization_type} of {spec.model or spec.source.source}"
    config = ModelConfig.model_validate({
        **kept, "source": f"{models.STORE}{one.output}", "sha256": one.output, "size": made["size"], "origin": origin,
    })  # fmt: skip
    added = models.add(services, name or one.name, config)
    with services.db.transaction() as db:
        rows.note_import(db, one.id, added["name"])
    return added


def download(services: Services, quantization_id: str, start: int) -> tuple[str, int, Iterator[bytes]]:
    """A name for the file that was made, its size, and its bytes from `start` on.

    Raises:
        NotFound: there is none of that id.
        Conflict: it is not done.
    """
    one = _done(services, quantization_id)
    size, chunks = uploads.read(services, str(one.output), start)
    return f"{PurePosixPath(one.name).name}.gguf", size, chunks


def receive(
    services: Services, node: Node, quantization_id: str, sha256: str, stream: IO[bytes], chunk: uploads.Chunk
) -> uploads.Received:
    """Take the file that a node has made, or a part of it.

    Raises:
        NotFound: the node makes no such file any more.
        InvalidValue, WrongOffset, BodyTooLarge, Unavailable: as `uploads.receive`.
    """
    uploads.path_of(services, sha256)
    before = _made_by(services, node, quantization_id)
    with services.db.transaction() as db:
        rows.note(db, before, output=sha256)  # before it comes, so that nothing is left that nobody knows of
    if before.output and before.output != sha256:
        _forget(services, before.output)
    try:
        return uploads.receive(services, sha256, stream, chunk)
    finally:
        _need_wanted(services, node, quantization_id, sha256)


def advance(services: Services) -> None:
    """Take every open quantization one step further."""
    with services.db.transaction() as db:
        found = rows.every(db, states=(JobState.OPEN,))
        stages: dict[str, Job | None] = {one.job_id: job_rows.by_id(db, one.job_id) for one in found if one.job_id}
    for one in reversed(found):
        job = stages.get(one.job_id or "")
        _take(services, next_step(one, job), one, job)


# --- steps


def _take(services: Services, step: Step, one: Quantization, job: Job | None) -> None:
    reason = str((job.error or {}).get("message") or "") if job else "its job was forgotten"
    match step:
        case Step.WAIT:
            return
        case Step.PLACE:
            _place(services, one)
        case Step.QUANTIZE:
            _quantize(services, one)
        case Step.DONE:
            _finish(services, one, (job.result if job else None) or {})
        case Step.CANCELLED:
            stop(services, one.id)
        case Step.AGAIN:
            _note_failure(services, one, reason)
        case Step.FAIL:
            _fail(services, one, reason)


def _place(services: Services, one: Quantization) -> None:
    """Find it a node, and have that install the backend; if there is none, say why."""
    fleet, working = _fleet(services)
    choice = choose(one, fleet, _builds(services, one), working)
    if choice.node_id is None:
        if choice.reasons != one.reasons:
            with services.db.transaction() as db:
                rows.note(db, one, reasons=choice.reasons)
        return
    request = request_for(Op.INSTALL, one.spec.backend, one.spec.entry)
    _begin(services, one, choice.node_id, Op.INSTALL.kind, request)


def _quantize(services: Services, one: Quantization) -> None:
    """Have its node make the file, if that has cores left for it; else it is placed anew."""
    fleet, working = _fleet(services)
    spec, node_id = one.spec, str(one.node_id)
    own = Fleet(models=fleet.models, nodes=[node for node in fleet.nodes if node.id == node_id],
                replicas=fleet.replicas, busy=fleet.busy, now=fleet.now, patience=fleet.patience)  # fmt: skip
    choice = choose(one, own, _builds(services, one), working - {node_id})
    if choice.node_id is None:
        with services.db.transaction() as db:
            rows.note(db, one, job_id=None, node_id=None, reasons=choice.reasons)
        return
    request = {"kind": KIND, "name": one.name, "quantization": one.id, "engine": spec.backend,
               "type": spec.quantization_type, "threads": choice.threads,
               "embeddings": spec.config.embeddings, "pooling": spec.pooling,
               **spec.model_dump(mode="json", include={"source", "text", "options"})}  # fmt: skip
    _begin(services, one, node_id, KIND, request)


def _begin(services: Services, one: Quantization, node_id: str, kind: str, request: dict[str, Any]) -> None:
    job_id = job_services.submit_node_job(services, kind=kind, node_id=node_id, model_id=None, request=request)
    with services.db.transaction() as db:
        noted = rows.note(db, one, node_id=node_id, job_id=job_id, reasons={})
    if not noted:  # it was stopped meanwhile
        _abort(services, job_id)


def _finish(services: Services, one: Quantization, result: dict[str, Any]) -> None:
    try:
        made = Made.told(result)
    except ValidationError as error:
        _note_failure(services, one, f"what its node says of the file is wrong at '{error.errors()[0]['loc'][0]}'")
        return
    if made.sha256 != one.output or not uploads.path_of(services, made.sha256).exists():
        _note_failure(services, one, "its file has not come to the API's store")
        return
    with services.db.transaction() as db:
        rows.end(db, one.id, JobState.DONE, result=made.model_dump())
    log.info("quantization %s is done: %s", one.id, one.name, extra={"action": "quantize"})


def _note_failure(services: Services, one: Quantization, reason: str) -> None:
    if len(one.failures) + 1 >= MOST_ATTEMPTS:
        _fail(services, one, reason)
        return
    with services.db.transaction() as db:
        failures = (*one.failures, failure(one, str(one.node_id), reason, clock(db)))
        rows.note(db, one, node_id=None, job_id=None, failures=failures)
    log.warning("quantization %s failed (%d of %d): %s", one.id, len(failures), MOST_ATTEMPTS, reason)


def _fail(services: Services, one: Quantization, reason: str) -> None:
    with services.db.transaction() as db:
        failed = rows.end(db, one.id, JobState.FAILED, error=reason)
    if failed:
        _forget_output(services, one.id)
        log.warning("quantization %s has failed: %s", one.id, reason, extra={"action": "quantize"})


def _fleet(services: Services) -> tuple[Fleet, set[str]]:
    """The cluster, and the nodes that work on a quantization."""
    with services.db.transaction() as db:
        known, where, what = model_rows.every(db), node_rows.every(db), replica_rows.every(db)
        working = {str(one.node_id) for one in rows.every(db, states=(JobState.OPEN,)) if one.job_id}
        now = clock(db)
    busy = services.leases.owners([names.model_queue(model.id) for model in known])
    patience = UNHEALTHY_AFTER * services.settings.heartbeat
    return Fleet(models=known, nodes=where, replicas=what, busy=busy, now=now, patience=patience), working


def _abort(services: Services, job_id: str) -> None:
    """Cancel the job of a stage, unless others wait for it, too, as for a backend that is installed."""
    with services.db.transaction() as db:
        job = job_rows.by_id(db, job_id)
        used = {one.job_id for one in rows.every(db, states=(JobState.OPEN,))}
        used |= {replica.job_id for replica in replica_rows.every(db)} | {wish.job_id for wish in wish_rows.every(db)}
    if job and job_id not in used:
        job_services.abort(services, job, Cancelled(), state=JobState.CANCELLED)


# --- what is asked for


def _backend(services: Services, name: str) -> BackendEntry:
    able = {entry.name: entry for entry in galleries.backends(services) if CAPABILITY in entry.capabilities}
    if not able:
        raise NotFound("No backend in the catalogue can quantize.")
    if name and name not in able:
        raise InvalidValue(f"The backend '{name}' cannot quantize; there are: {', '.join(able)}.", param="backend")
    return able[name] if name else next(iter(able.values()))


def _builds(services: Services, one: Quantization) -> dict[Build, BuildEntry]:
    """How its backend is made: as it was when it was asked for, if a gallery lists it."""
    if one.spec.entry is None:
        return galleries.backend(services, one.spec.backend).builds
    return BackendEntry.of_record(one.spec.entry).builds


def _source(services: Services, order: Order) -> tuple[Model | None, Source]:
    """The model of that name, if there is one, and its files; else the source."""
    with services.db.transaction() as db:
        model = model_rows.by_name(db, order.model)
    if model is None:
        return None, Source.of(_stored(services, _given(order)))
    if order.sha256 or order.mirrors or order.size or order.parts:
        raise InvalidValue(f"'{order.model}' is a model: its file is known.", param="sha256")
    if not model.config.source:
        raise InvalidValue(f"The model '{model.name}' has no file.", param="model")
    if model.config.rerank:
        raise UnsupportedByModel(
            f"The model '{model.name}' ranks documents, and only models that generate text or embed can be compared with "
            "what becomes of them.",
            param="model",
        )
    return model, Source.of(_stored(services, model.config))


def _given(order: Order) -> ModelConfig:
    """A model of just what is given as a source."""
    try:
        sources.parse(order.model)
        parts.every(order.model)
    except InvalidValue as error:
        raise InvalidValue(
            f"There is no model of that name, and as a source: {error.message}", param="model"
        ) from error
    sources.parse(order.model, order.mirrors)
    given = order.model_dump(include={"mirrors", "sha256", "size"})
    behind = [part.model_dump(exclude_unset=True) for part in order.parts]
    config = checked(ModelConfig, {**given, "source": order.model, "parts": behind})
    models.check_names(config)
    return config


def _stored(services: Services, config: ModelConfig) -> ModelConfig:
    """The same with what the API's store knows of those of its files that were uploaded.

    Raises:
        InvalidValue: one of these is said to have another SHA-256 than it is named by.
    """

    def known(file: File) -> dict[str, Any]:
        source = sources.parse(file.source)
        if not isinstance(source, sources.Stored):
            return file.model_dump()
        if file.sha256 not in (None, source.sha256):
            raise InvalidValue(f"{file.source} is named by its SHA-256, which is not {file.sha256}.", param="sha256")
        with suppress(FileNotFoundError):
            size = uploads.path_of(services, source.sha256).stat().st_size
            return {**file.model_dump(), "sha256": source.sha256, "size": size}
        return file.model_dump()

    return config.knowing([known(file) for file in config.own])


def _check(services: Services, spec: Spec) -> None:
    """Refuse files that no node could fetch."""
    own = [("model", file) for file in spec.source.files]
    for param, file in (*own, ("text", spec.text), ("imatrix", spec.options.imatrix)):
        try:
            if file:
                models.check_file(services, file, file.mirrors if isinstance(file, Part) else ())
        except InvalidValue as error:
            raise InvalidValue(error.message, param=param) from error


# --- what is there


def _existing(services: Services, quantization_id: str) -> Quantization:
    with services.db.transaction() as db:
        one = rows.by_id(db, quantization_id)
    if one is None:
        raise NotFound(f"There is no quantization '{quantization_id}'. 'localai-q quantize list' shows them.")
    return one


def _done(services: Services, quantization_id: str) -> Quantization:
    one = _existing(services, quantization_id)
    if one.state is not JobState.DONE:
        raise Conflict(f"Quantization '{one.id}' is {status(one, '')}: there is no file yet.")
    return one


def _made_by(services: Services, node: Node, quantization_id: str) -> Quantization:
    with services.db.transaction() as db:
        one = rows.by_id(db, quantization_id)
    if one is None or one.state is not JobState.OPEN or one.node_id != node.id:
        raise NotFound(f"Node '{node.name}' does not work on quantization '{quantization_id}' any more.")
    return one


def _need_wanted(services: Services, node: Node, quantization_id: str, sha256: str) -> None:
    """Delete what has come of a file for a quantization that was stopped meanwhile, and say so."""
    try:
        _made_by(services, node, quantization_id)
    except NotFound:
        _forget(services, sha256)
        raise


def _forget_output(services: Services, quantization_id: str) -> None:
    """Delete what has come of a quantization that came to nothing."""
    with services.db.transaction() as db:
        one = rows.by_id(db, quantization_id)
        if one and one.output:
            rows.forget_output(db, one.id)
    if one and one.output:
        _forget(services, one.output)


def _forget(services: Services, sha256: str) -> None:
    """Delete what has come of a file, unless something needs that."""
    models.forget_stored(services, {sha256})
    with suppress(NotFound, Conflict, Unavailable):  # what comes at this moment is refused at its end, or swept
        uploads.give_up(services, sha256)


def _shown(services: Services, found: list[Quantization]) -> list[dict[str, Any]]:
    open_jobs = [one.job_id for one in found if one.job_id]
    progress = job_services.progress_of(services, open_jobs)
    with services.db.transaction() as db:
        node_names = {node.id: node.name for node in node_rows.every(db)}
    return [_record(one, progress.get(one.job_id or "", {}), node_names) for one in found]


def _record(one: Quantization, progress: Mapping[str, Any], node_names: Mapping[str, str]) -> dict[str, Any]:
    """LocalAI's names, and what is known besides."""
    spec = one.spec
    stage = str(progress.get("stage") or "")
    return {
        "id": one.id,
        "name": one.name,
        "model": spec.model or spec.source.source,
        "backend": spec.backend,
        "quantization_type": spec.quantization_type,
        "status": status(one, stage),
        "state": one.state,
        "message": one.error or _message(one, progress),
        "progress_percent": percentage(one, progress),
        "stage": stage or None,
        "progress": dict(progress) or None,
        "node": node_names.get(one.node_id or "", one.node_id),
        "job": one.job_id,
        "source": spec.source.model_dump(mode="json"),
        "extra_options": spec.options.model_dump(mode="json", exclude_defaults=True),
        "output_file": f"{models.STORE}{one.output}" if one.state is JobState.DONE else None,
        "result": one.result,
        "reasons": one.reasons,
        "failures": [{"node": node_names.get(each.node_id, each.node_id), "reason": each.reason}
                     for each in one.failures],
        "import_model_name": one.imported or None,
        "created": one.created,
        "ended": one.ended,
    }  # fmt: skip


def _message(one: Quantization, progress: Mapping[str, Any]) -> str:
    if one.state is not JobState.OPEN:
        return ""
    if one.job_id:
        return str(progress.get("note") or "")
    if one.reasons:
        return "waits: " + "; ".join(f"{node}: {reason}" for node, reason in one.reasons.items())
    return "waits for a node"
