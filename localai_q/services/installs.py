"""Models by name: what galleries list becomes a model of the cluster, LocalAI's documents do, and the files of models that
say `preload` come to a node before anybody asks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from rich.filesize import decimal

from localai_q.bus import journal
from localai_q.cluster import parts, sources
from localai_q.cluster.backends import MOST_ATTEMPTS
from localai_q.cluster.events import Progress
from localai_q.cluster.fleet import Board, Fleet
from localai_q.cluster.importing import Preferences, choose, repository
from localai_q.cluster.jobs import Job
from localai_q.cluster.localai_yaml import UNSAID, Imported, merged, source_of, translate
from localai_q.cluster.memory import need
from localai_q.cluster.models import Document, Model
from localai_q.cluster.placement import best
from localai_q.cluster.preloads import Standing, standing
from localai_q.cluster.states import JobState
from localai_q.documents import checked, read_yaml
from localai_q.errors import Conflict, InvalidRequest, InvalidValue, NotFound
from localai_q.gallery.catalog import ForeignEntry, ModelEntry
from localai_q.services import galleries, hub, models, replicas
from localai_q.services import jobs as job_services
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from localai_q.store import models as model_rows
from localai_q.store import nodes as node_rows
from localai_q.store import replicas as replica_rows
from localai_q.store.engine import clock

log = logging.getLogger(__name__)

FETCH = "fetch_model"
MOST_DOCUMENTS = 100  # of one import

Record = dict[str, Any]


def available(services: Services) -> list[Record]:
    """Every model that galleries list, in LocalAI's form, and whether there is one of its name here."""
    with services.db.transaction() as db:
        there = {model.name for model in model_rows.every(db)}
    return [
        {"name": entry.name, "description": entry.description, "license": entry.license, "tags": list(entry.tags),
         "gallery": {"name": gallery}, "id": f"{gallery}@{entry.name}", "installed": entry.name in there}
        for gallery, entry in galleries.models(services)
    ]  # fmt: skip


def install(
    services: Services, *, wanted: str = "", url: str = "", name: str = "", overrides: Mapping[str, Any] | None = None,
    files: list[Record] | None = None, preload: bool = True,
) -> Record:  # fmt: skip
    """Add a model that a gallery lists, or that a URL describes, and have its files fetched.

    Args:
        wanted: `name`, or `gallery@name`.
        url: instead, of a document of LocalAI's.
        name: another name for it.
        overrides: what is to be otherwise: fields of its document; of LocalAI's where it is one of theirs.
        files: further `download_files` of a document of LocalAI's.

    Returns:
        `{"uuid", "status", "warnings"}`; `installation` shows how far it is by that id.

    Raises:
        NotFound: no gallery lists it.
        Conflict: there is a model of that name.
        InvalidRequest, Unavailable: it cannot be taken, or had.
    """
    if bool(wanted) == bool(url):
        raise InvalidValue("Say what to install: either 'id' or 'url'.", param="id")
    entry = galleries.model(services, wanted) if wanted else ForeignEntry(name=name or "model", url=url)
    if isinstance(entry, ModelEntry):
        if files:
            raise InvalidValue("'files' go with models in LocalAI's form; this one has its own.", param="files")
        changed = merged(
            entry.document.model_dump(exclude_unset=True), {**(overrides or {}), **({"name": name} if name else {})}
        )
        found = Imported(document=checked(Document, changed))
    else:
        found = _foreign(services, entry, overrides or {}, files or [], name=name or (entry.name if wanted else ""))
    return _added(services, found, preload=preload)


def _foreign(
    services: Services, entry: ForeignEntry, overrides: Mapping[str, Any], files: list[Record], *, name: str
) -> Imported:
    """The model of a gallery's entry in LocalAI's form: what it is made of, and over it what it and the caller say."""
    base = _base_of(services, entry.url) if entry.url else {}
    whole = merged(merged(merged(base, entry.config_file), entry.overrides), overrides)
    given = whole.get("download_files")
    whole["download_files"] = [*(given if isinstance(given, list) else []), *entry.files, *files]
    if name:
        whole["name"] = name
    return translate(whole, galleries.named(services))


def _base_of(services: Services, url: str) -> Record:
    """The document that a URL has; one of a gallery's has it as a text in a field of its own."""
    content = _one(read_yaml(galleries.read_text(_web(url), services.settings)))
    inner = content.get("config_file")
    if not isinstance(inner, str):
        return content
    files = content.get("files")
    return {**_one(read_yaml(inner)), **({"download_files": files} if files else {})}


def _web(url: str) -> str:
    if galleries.GITHUB.fullmatch(url):
        return url
    if not url.startswith(("http://", "https://")):
        raise InvalidValue(f"{url[:200]!r} is no URL of the form https://host/path.", param="url")
    sources.parse(url)
    return url


def _one(documents: list[Any]) -> Record:
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise InvalidValue("A model is one document with fields; this is none.")
    return documents[0]


def import_documents(services: Services, text: bytes) -> list[Record]:
    """Add models that stand in a text in LocalAI's form; each as `{"name", "id", "warnings"}`. All of them, or none.

    Raises: as `install`.
    """
    found = [each for document in read_yaml(text) for each in (document if isinstance(document, list) else [document])]
    if not found or len(found) > MOST_DOCUMENTS or not all(isinstance(each, dict) for each in found):
        raise InvalidValue(f"The body needs to be one model, or up to {MOST_DOCUMENTS}, in the form of LocalAI's YAML.")
    backends = galleries.named(services)
    taken = [translate(each, backends) for each in found]
    configs = {each.document.name: each.document.config for each in taken}
    if len(configs) < len(taken):
        raise Conflict("Two of these models have the same name.")
    added = models.add_all(services, configs)
    return [{**record, "warnings": each.warnings} for record, each in zip(added, taken, strict=True)]


def edit(services: Services, name: str, text: bytes) -> Record:
    """Let a model be as a document in LocalAI's form says; what that form has no word for stays.

    Returns `{"name", "config_revision", "pending_cleanup", "warnings"}`; `pending_cleanup` are the replicas of older
    revisions that have not gone, each as `{"id", "node", "state", "revision"}`.

    Raises: as `install`; ModelNotFound: there is none of that name.
    """
    found = translate({"name": name, **_one(read_yaml(text))}, galleries.named(services))
    if found.document.name != name:
        raise Conflict(f"A model keeps its name: this one is '{name}', not '{found.document.name}'.")
    known = models.named(services, name).config
    kept = {field: getattr(known, field) for field in UNSAID}
    shown, _ = models.put(services, found.document.model_copy(update=kept))
    older = [each for each in shown["replicas"] if each["revision"] < shown["revision"] and each["state"] != "failed"]
    left = [{field: each[field] for field in ("id", "node", "state", "revision")} for each in older]
    return {"name": name, "config_revision": shown["revision"], "pending_cleanup": left, "warnings": found.warnings}


def import_uri(
    services: Services, uri: str, *, name: str = "", sha256: str | None = None, preload: bool = True,
    preferences: Preferences | None = None,
) -> Record:  # fmt: skip
    """Add a model by where its file is, by where its document is, or by a repository of Hugging Face. Returns what
    `install` does.

    Args:
        sha256: of the file, where its source does not tell it.

    Raises: as `install`; InvalidValue: it is not clear which file of a repository is meant.
    """
    wanted = preferences or Preferences()
    try:
        return _import_uri(services, uri, wanted, name=name, sha256=sha256, preload=preload)
    except InvalidRequest as error:
        said = Preferences.model_fields.keys() & wanted.model_fields_set - ({"name"} if name else set())
        fields = dict.fromkeys(("source", "url", "quantizations"), "uri") | {
            field: f"preferences.{field}" for field in said
        }
        error.param = fields.get(error.param or "", error.param)
        raise


def _import_uri(
    services: Services, uri: str, wanted: Preferences, *, name: str, sha256: str | None, preload: bool
) -> Record:
    found = repository(uri)
    left_out = wanted.left_out(from_repository=found is not None)
    name = name or wanted.name
    path = uri.partition("#")[0].partition("?")[0]
    if uri.startswith(("http://", "https://", "github:")) and path.partition("@")[0].endswith((".yaml", ".yml")):
        if sha256:
            raise InvalidValue("'sha256' goes with a model's file; a document says those of its own.", param="sha256")
        made = install(services, url=uri, name=name, overrides=wanted.fields, preload=preload)
        return {**made, "warnings": [*made["warnings"], *left_out]}
    if found:
        source = found.source(choose(found.name, hub.files_of(found, services.settings), wanted.quantizations))
    else:
        source = source_of(uri)
        sources.parse(source)
    content = {**wanted.fields, "name": name or _name_of(source), "parameters": {"model": source}}
    taken = translate(content, galleries.named(services))
    document = checked(Document, {**taken.document.model_dump(exclude_unset=True), "sha256": sha256})
    return _added(services, Imported(document=document, warnings=[*taken.warnings, *left_out]), preload=preload)


def _name_of(source: str) -> str:
    """What a model is called after its file."""
    found = sources.parse(source)
    path = found.file if isinstance(found, sources.HuggingFace) else source.partition("?")[0].rstrip("/")
    last = path.rpartition("/")[2].partition("@")[0]
    return parts.whole(last).removesuffix(".gguf")[:128]


def _added(services: Services, found: Imported, *, preload: bool) -> Record:
    document = found.document
    model_id = models.add(services, document.name, document.config.model_copy(update={"preload": preload}))["id"]
    return {"uuid": model_id, "status": f"/models/jobs/{model_id}", "name": document.name, "warnings": found.warnings}


# --- how far they are


def installation(services: Services, model_id: str) -> Record:
    """How far the files of a model are, in LocalAI's form.

    Raises:
        NotFound: there is no such model, or not any more.
    """
    with services.db.transaction() as db:
        model = model_rows.by_id(db, model_id)
    if model is None:
        raise NotFound(f"There is no installation '{model_id}': its model may have been removed.")
    return _installations(services, [model])[0]


def installations(services: Services) -> list[Record]:
    """The same of every model that says `preload`."""
    with services.db.transaction() as db:
        found = [model for model in model_rows.every(db) if model.config.preload]
    return _installations(services, found)


def _installations(services: Services, found: list[Model]) -> list[Record]:
    with services.db.transaction() as db:
        stands = _standings(db, found)
    running = [fetches[0].id for _, stand, fetches in stands if stand is Standing.COMING and fetches]
    progress = {job_id: event for job_id, event in journal.latest(services.redis, running).items()
                if isinstance(event, Progress)}  # fmt: skip
    return [_installation(model, stand, fetches, progress) for model, stand, fetches in stands]


def _installation(model: Model, stand: Standing, fetches: list[Job], progress: Mapping[str, Progress]) -> Record:
    event = progress.get(fetches[0].id) if fetches else None
    done, total = (event.done, event.total) if event else (0.0, 0.0)
    there = stand is Standing.THERE or not model.config.files
    idle = not model.config.preload and stand in (Standing.DUE, Standing.WAITING)
    cancelled = stand is Standing.GIVEN_UP and fetches[0].state is JobState.CANCELLED
    error = (fetches[0].error or {}).get("message") if fetches and not (there or cancelled) else None
    message = "completed" if there else "fetched when somebody asks for it" if idle else f"its files are {stand}"
    return {
        "uuid": model.id,
        "gallery_element_name": model.name,
        "processed": there or idle or stand is Standing.GIVEN_UP,
        "progress": 100.0 if there else job_services.percentage(event) if event else 0.0,
        "message": message,
        "error": error,
        "deletion": False,
        "cancelled": cancelled,
        "file_name": model.config.source,
        "file_size": decimal(int(total)) if total else "",
        "downloaded_size": decimal(int(done)) if done else "",
        "job": fetches[0].id if fetches else None,
    }


def _standings(db: Any, found: list[Model]) -> list[tuple[Model, Standing, list[Job]]]:
    """How it stands with each, with its fetches where its files are not there, the newest first."""
    on_nodes, now = [node.hardware.get("files") or () for node in node_rows.every(db)], clock(db)
    stands = []
    for model in found:
        fetches: list[Job] = []
        if (stand := standing(model.config, on_nodes, fetches, now)) is not Standing.THERE:
            fetches = job_rows.fetches(db, model_id=model.id, source=model.config.source, limit=MOST_ATTEMPTS)
            stand = standing(model.config, on_nodes, fetches, now)
        stands.append((model, stand, fetches))
    return stands


# --- by control


def preload(services: Services) -> None:
    """Have the files of models that say so fetched by a node on which they could be loaded."""
    with services.db.transaction() as db:
        wanted = [model for model in model_rows.every(db) if model.config.preload and model.config.files]
        stands = _standings(db, [model for model in wanted if not model.config.disabled])
    for model, stand, fetches in stands:
        if fetches and fetches[0].request and fetched_for(model, fetches[0].request):
            model = replicas.learned(services, model, fetches[0])
        if stand is Standing.DUE and (node_id := _where(services, model)):
            request = replicas.fetch_request(model)
            job_id = job_services.submit_node_job(
                services, kind=FETCH, node_id=node_id, model_id=model.id, request=request
            )
            log.info("node %s is to fetch the files of model %s: job %s", node_id, model.name, job_id,
                     extra={"action": "preload"})  # fmt: skip


def fetched_for(model: Model, request: Mapping[str, Any]) -> bool:
    """Whether a fetch was for the files that the model has."""
    further = [file.get("source") for file in request.get("further", ())]
    return [request.get("source"), *further] == [file.source for file in model.config.files]


def _where(services: Services, model: Model) -> str | None:
    """The node that a replica of the model would go to; None if there is room nowhere."""
    with services.db.transaction() as db:
        fleet = Fleet(models=model_rows.every(db), nodes=node_rows.every(db), replicas=replica_rows.every(db),
                      builds=galleries.builds(services), now=clock(db))  # fmt: skip
    verdict = next(best(Board(fleet), model), None)
    return verdict.node.id if verdict else None


def remove(services: Services, name: str) -> Record:
    """Remove a model, in LocalAI's words. What it leaves on nodes goes by itself.

    Raises:
        ModelNotFound: there is none of that name.
    """
    model = models.named(services, name)
    models.remove(services, name)
    return {"uuid": model.id, "status": "", "processed": True, "message": f"{name} was removed"}


def switched(services: Services, name: str, field: str, action: str, words: Mapping[str, bool]) -> Record:
    """A model with one of its fields set by a word.

    Raises:
        InvalidValue: that is none of the words.
        ModelNotFound: there is no model of that name.
    """
    if action not in words:
        raise InvalidValue(f"The action needs to be one of: {', '.join(words)}.", param="action")
    shown = models.edit(services, name, {field: words[action]})
    return {"success": True, "message": f"Model '{name}': {field} is {str(words[action]).lower()}", field: shown[field]}


def estimate(services: Services, name: str) -> Record:
    """What one replica of a model takes: bytes of a machine without GPUs, and of one with a GPU.

    Raises:
        ModelNotFound: there is none of that name.
        Conflict: nothing is known of its files yet.
    """
    model = models.named(services, name)
    plain, on_gpu = (need(model.config, model.facts, gpus) for gpus in (0, 1))
    if plain is None or on_gpu is None:
        raise Conflict(f"Nothing is known of the size of model '{name}' before a node has fetched its files.")
    return {"size_bytes": sum(file.size for file in model.config.files), "ram_bytes": plain.memory.ram,
            "vram_bytes": on_gpu.memory.vram, "context_size": model.config.context_size, "note": plain.note}  # fmt: skip
