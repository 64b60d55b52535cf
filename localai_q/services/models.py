"""Models: registered, shown, changed, removed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from localai_q import gguf, names
from localai_q.cluster import parts, sources
from localai_q.cluster.fleet import Fleet
from localai_q.cluster.models import NOT_FOR_ALL, OF_ONE_FILE, Document, Facts, File, Model, ModelConfig, fitted
from localai_q.cluster.placement import ruled_out
from localai_q.cluster.routing import Snapshot
from localai_q.cluster.states import ReplicaState
from localai_q.documents import checked
from localai_q.errors import Conflict, InvalidValue, ModelNotFound, Unavailable
from localai_q.gallery import catalog
from localai_q.services import galleries, jobs, snapshots, uploads, waiting
from localai_q.services import replicas as replica_services
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from localai_q.store import marks, models, nodes, quantizations, replicas, wheels
from localai_q.store.engine import clock

STORE = "store:"
DEFAULT_MODEL = "default_model"  # the mark of a database that has had it: who removes it is not given it again


def ensure_default(services: Services) -> None:
    """Register the gallery's default model once, in a registry that has none, unless a setting forbids it."""
    if services.settings.no_model:
        return
    entry = catalog.default_model()
    with services.db.transaction() as db:
        if marks.first_time(db, DEFAULT_MODEL) and not models.every(db):
            models.add(db, entry.name, entry.config, is_default=True)


def add(services: Services, name: str, config: ModelConfig) -> dict[str, Any]:
    """Register a model.

    Raises:
        Conflict: the name is taken.
        NotFound: there is no such backend.
        InvalidValue: it names a file that was not uploaded or is damaged, or no file for a backend that needs one; or its
            backend cannot serve it so.
    """
    return add_all(services, {name: config})[0]


def add_all(services: Services, configs: Mapping[str, ModelConfig]) -> list[dict[str, Any]]:
    """Register several models, or none of them. Raises: as `add`."""
    made = {name: _checked(services, config, given=config.model_fields_set) for name, config in configs.items()}
    facts = {name: _facts(services, config) for name, config in made.items()}
    added = []
    with services.db.transaction() as db:
        for name, config in made.items():
            model = models.add(db, name, config, facts=facts[name])
            if model is None:
                raise Conflict(f"There is a model '{name}' already. Remove it first: localai-q models remove {name}")
            added.append({"id": model.id, "name": model.name})
    services.redis.publish(names.WAKE_CHANNEL, added[0]["id"])
    return added


def edit(services: Services, name: str, changes: Mapping[str, Any], *, force: bool = False) -> dict[str, Any]:
    """Change fields of a model's configuration. All others stay, or are as somebody else changes them at the same time.

    Where this makes another replica, the model gets a new revision: what is accepted after this has returned is answered
    by that, and replicas of the old one finish what they hold and end. Returns the model as `listed` shows it.

    Args:
        force: even if it is loaded and no node could have it so.

    Raises:
        ModelNotFound: there is none of that name.
        UnknownParameter, InvalidValue, NotFound: a model like that could not be added either.
        Conflict: it would be gone for good.
    """
    return _change(services, name, lambda config: _merged(config, changes), given=changes.keys(), force=force)


def put(services: Services, document: Document, *, force: bool = False) -> tuple[dict[str, Any], bool]:
    """Let there be a model that is as the document says; what that does not say is as for a new model. What is known of
    its files stays known. Returns the model as `listed` shows it, and whether it is new.

    Raises: as `add` and `edit`.
    """
    with services.db.transaction() as db:
        known = models.by_name(db, document.name)
    if not known:
        with suppress(Conflict):  # by somebody who has added it a moment ago
            add(services, document.name, document.config)
            return shown(services, document.name), True
    given = document.model_fields_set
    return _change(services, document.name, document.config.like, given=given, force=force), False


def _merged(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    if changes.get("source", config.source) != config.source:  # what is true of one file is not of another
        changes = {**OF_ONE_FILE, **changes}
    return checked(ModelConfig, {**config.model_dump(), **changes})


def _change(
    services: Services, name: str, change: Callable[[ModelConfig], ModelConfig], *, given: Collection[str], force: bool
) -> dict[str, Any]:
    while True:
        before = named(services, name)
        after = _changed(services, before, _checked(services, change(before.config), given=given))
        with services.db.transaction() as db:
            if not force:
                _keep_possible(services, db, after)
            if models.change(db, before, after):
                break
    _forget_files(services, before.config)
    services.redis.publish(names.WAKE_CHANNEL, after.id)
    return shown(services, name)


def shown(services: Services, name: str) -> dict[str, Any]:
    """A model as `listed` shows it; `ModelNotFound` if there is none of that name."""
    model_id = named(services, name).id
    return next(record for record in listed(services) if record["id"] == model_id)


def document(services: Services, name: str) -> dict[str, Any]:
    """A model as people write it down: its name, and what of it is not as of a new model.

    Raises:
        ModelNotFound: there is none of that name.
    """
    model = named(services, name)
    return {"name": model.name, **model.config.model_dump(mode="json", exclude_defaults=True)}


def _keep_possible(services: Services, db: Any, model: Model) -> None:
    """Refuse to make of a model that is loaded one that no node could have."""
    if not replicas.every(db, model_id=model.id, states=[ReplicaState.READY]):
        return
    known = [model if each.id == model.id else each for each in models.every(db)]
    fleet = Fleet(models=known, nodes=nodes.every(db), replicas=replicas.every(db),
                  builds=galleries.builds(services), now=clock(db))  # fmt: skip
    if found := ruled_out(fleet, model):
        reasons = "; ".join(f"{node}: {reason}" for node, reason in found.items())
        raise Conflict(
            f"The model '{model.name}' is loaded, and no node could have it so: {reasons}. Nothing was changed. Send this "
            "with ?force=true to have it changed all the same."
        )


def _changed(services: Services, model: Model, config: ModelConfig) -> Model:
    same = [file.source for file in config.own] == [file.source for file in model.config.own]
    facts = model.facts if same else _facts(services, config)
    revision = model.revision + (not config.makes_same_replica(model.config))
    return model.model_copy(update={"config": config, "facts": facts, "revision": revision})


def named(services: Services, name: str) -> Model:
    """The model of that name.

    Raises:
        ModelNotFound: there is none.
    """
    with services.db.transaction() as db:
        model = models.by_name(db, name)
    if model is None:
        raise ModelNotFound(f"There is no model '{name}'. 'localai-q models list' shows them.")
    return model


def listed(services: Services) -> list[dict[str, Any]]:
    """Every model with its replicas and, as long as Redis can tell, how far it is on its way up."""
    snapshot = snapshots.take(services)
    node_names, every = snapshot.node_names, snapshot.replicas
    return [
        {
            "id": model.id,
            "name": model.name,
            "revision": model.revision,
            "default": model.is_default,
            "created": model.created,
            "unmet": model.unmet.shown() if model.unmet else None,
            **model.config.model_dump(mode="json"),
            **_status(services, snapshot, model),
            "replicas": [
                {"id": r.id, "node": node_names.get(r.node_id, r.node_id), "number": r.number, "state": r.state,
                 "revision": r.revision, "slots": r.slots, "reason": r.reason, "memory": asdict(r.reserved)}
                for r in every if r.model_id == model.id
            ],
        }
        for model in snapshot.models.values()
    ]  # fmt: skip


def _status(services: Services, snapshot: Snapshot, model: Model) -> dict[str, Any]:
    try:
        return waiting.status(services, snapshot, model)
    except Unavailable:
        return {"loading": None, "failure": None}


def remove(services: Services, name: str) -> None:
    """Remove a model: its replicas end, those who wait for it are told.

    Raises:
        ModelNotFound: there is none of that name.
    """
    with services.db.transaction() as db:
        model = models.by_name(db, name)
        if model is None:
            raise ModelNotFound(f"There is no model '{name}'. 'localai-q models list' shows them.")
        own = replicas.every(db, model_id=model.id)
        models.remove(db, model.id)
        removed = ModelNotFound(f"The model '{name}' was removed.")
        shared = {replica.job_id for replica in replicas.every(db)}  # models can share a stage, e.g. of their backend
        stages = [job_rows.by_id(db, r.job_id) for r in own if r.job_id and r.job_id not in shared]
        fetches = [job for job in job_rows.open_fetches(db, model.id) if job.id not in shared]
        jobs.end_at_once(services, db, {job.id: job for job in (*stages, *fetches) if job}.values(), removed)
    for replica in own:
        if replica.state is not ReplicaState.FAILED:
            services.doorbells.ring(names.STOP_REPLICA, replica.id, queue=names.node_queue(replica.node_id))
    replica_services.fail_waiting(services, model.id, removed)
    services.redis.delete(names.model_queue(model.id), names.pressure_key(model.id))
    for replica in own:
        services.redis.delete(*names.keys_of_queue(names.replica_queue(replica.id)))
    _forget_files(services, model.config)


def _checked(services: Services, config: ModelConfig, *, given: Collection[str]) -> ModelConfig:
    """The configuration as nodes can load it; what none could load is refused."""
    entry = galleries.backend(services, config.backend)
    config = config.model_copy(update={"backend": entry.name})  # which nodes know it by
    if missing := [name for name in config.needs if name not in entry.takes]:
        takes = ", ".join(entry.takes) or "none of them"
        raise InvalidValue(f"The backend '{entry.name}' does not take '{missing[0]}'; of {', '.join(NOT_FOR_ALL)} it takes "
                           f"{takes}. Leave it out, or name another backend.", param=missing[0])  # fmt: skip
    if not config.source and config.backend != "echo":
        raise InvalidValue(f"The backend '{config.backend}' needs a file: give 'source'.", param="source")
    if not config.source and config.mirrors:
        sources.parse(config.source, config.mirrors)
    check_names(config)
    for number, file in enumerate(config.files):
        check_file(services, file, config.mirrors_of(number))
    return fitted(config, capabilities=entry.capabilities, most_slots=entry.most_slots, given=given)


def check_names(config: ModelConfig) -> None:
    """Refuse with `InvalidValue` what is named as one of several files where that cannot be meant."""
    parts.every(config.source)
    for mirror in config.mirrors:
        parts.every(mirror, field="mirrors")
    if config.parts and not all(map(parts.part, config.mirrors)):
        raise InvalidValue("A mirror of a model in several files must be that of the first, and be called like it: "
                           "…-00001-of-00003.gguf.", param="mirrors")  # fmt: skip
    further = [
        ("mmproj", config.mmproj),
        ("draft_model", config.draft_model),
        *(("loras", lora) for lora in config.loras),
    ]
    for field, file in further:
        if file and (found := parts.part(file.source)):
            raise InvalidValue(f"{file.source} is one of {found.count} files, and only a model's own can be in several: merge "
                               "them with llama.cpp's 'llama-gguf-split --merge'.", param=field)  # fmt: skip


def check_file(services: Services, file: File, mirrors: Sequence[str]) -> None:
    """Refuse a file that no node could get."""
    source = sources.parse(file.source, mirrors)
    if isinstance(source, sources.Stored) and not uploads.path_of(services, source.sha256).exists():
        raise InvalidValue(
            f"The file {file.source} has not been uploaded: PUT it to /api/files/<sha256> first.", param="source"
        )
    if not file.sha256 and not isinstance(source, sources.TELLS_SHA256):
        raise InvalidValue(f"The model's file {file.source} needs its SHA-256, so that every node has the same one.",
                           param="sha256")  # fmt: skip


def _forget_files(services: Services, config: ModelConfig) -> None:
    """Delete uploaded files of a model that is or was so, unless something needs them."""
    forget_stored(services, {file.source.removeprefix(STORE) for file in config.files if file.source.startswith(STORE)})


def forget_unnamed(services: Services) -> None:
    """Delete uploaded files that nothing has named for LOCALAI_Q_UPLOAD_TTL seconds since they came."""
    forget_stored(services, uploads.kept_since(services, services.settings.upload_ttl))


def forget_stored(services: Services, files: Set[str]) -> None:
    """Delete these files of the API's store, by SHA-256, that no model and no quantization needs, and that are no wheels."""
    if not files:
        return
    with services.db.transaction() as db:
        needed = {file.source.removeprefix(STORE) for model in models.every(db) for file in model.config.files}
        needed |= quantizations.files(db) | wheels.contents(db)
    for sha256 in files - needed:
        uploads.forget(services, sha256)


def _facts(services: Services, config: ModelConfig) -> Facts | None:
    """What the headers of uploaded files say; None of files that are elsewhere or in another format."""
    if not config.own or not all(file.source.startswith(STORE) for file in config.own):
        return None
    first, *others = [uploads.path_of(services, file.source.removeprefix(STORE)) for file in config.own]
    return gguf.read_facts(first, *others) if gguf.is_gguf(first) else None
