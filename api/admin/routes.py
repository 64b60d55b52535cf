"""The admin endpoints. Each is a use case of `localai_q.services` behind a path."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import asdict
from typing import Annotated, Any, Literal

from flask import Blueprint, Response, request
from pydantic import BaseModel, ConfigDict, Field

from api import files
from api.bodies import parse
from api.metrics import CONTENT_TYPE
from api.strictjson import load_object
from api.web import web
from localai_q.cluster.amounts import Amount
from localai_q.cluster.jobs import GENERATIONS, NODE_JOBS
from localai_q.cluster.labels import Labels
from localai_q.cluster.models import Document
from localai_q.cluster.nodes import MOST_SLOTS
from localai_q.cluster.states import JobState
from localai_q.documents import checked
from localai_q.errors import Conflict, InvalidValue
from localai_q.services import cleaning, fleet, imports, jobs, keys, models, nodes, scheduling, uploads

routes = Blueprint("admin", __name__)

MOST_LISTED = 1000
MOST_IMPORTED = 500

PlaceOnNode = Annotated[str, Field(pattern=r"^/[^\x00-\x1f\x7f]*$", max_length=1000)]

JobKind = Literal[(*GENERATIONS, *NODE_JOBS)]  # type: ignore[valid-type]


class Budget(BaseModel):
    """How much of a node's memory models may take."""

    model_config = ConfigDict(extra="forbid", strict=True)

    value: Amount = Field(max_length=32)


class Slots(BaseModel):
    """How many replicas of one model a node may have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    value: int = Field(ge=1, le=MOST_SLOTS)


class Scan(BaseModel):
    """Where a node is to look for files."""

    model_config = ConfigDict(extra="forbid")

    folder: PlaceOnNode | Literal[""] = ""  # empty: all folders that its setting names


class Import(BaseModel):
    """Files of a node."""

    model_config = ConfigDict(extra="forbid")

    files: list[PlaceOnNode] = Field(min_length=1, max_length=MOST_IMPORTED)


class Prune(BaseModel):
    """Which jobs are to be forgotten: all that ended so long ago, in these states, of these kinds."""

    model_config = ConfigDict(extra="forbid")

    older_than: float = Field(ge=0, le=1e9)  # seconds
    states: list[Literal["done", "failed", "cancelled"]] = Field(default_factory=list, max_length=3)
    kinds: list[JobKind] = Field(default_factory=list, max_length=32)


class NewKey(BaseModel):
    """A key to make."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=100)
    role: Literal["admin", "user"] = "user"


@routes.get("/metrics")
def metrics() -> Response:
    """Prometheus' text format."""
    process = web()
    text = process.metrics.render(multiprocess=process.services.settings.web_workers > 1)
    return Response(text, content_type=CONTENT_TYPE)


@routes.get("/api/nodes")
def list_nodes() -> dict[str, Any]:
    return {"nodes": fleet.listed(web().services)}


@routes.get("/api/nodes/models")
def list_loaded_models() -> dict[str, Any]:
    """Which node has which model."""
    return {"models": fleet.loaded_models(web().services)}


@routes.get("/api/nodes/scheduling")
def list_rules() -> dict[str, Any]:
    return {"scheduling": scheduling.listed(web().services)}


@routes.post("/api/nodes/scheduling")
def put_rule() -> dict[str, Any]:
    """The body is the whole rule. With `force=true` even if no node could have the model so."""
    return scheduling.put(web().services, load_object(request.get_data()), force=_flag("force"))


@routes.get("/api/nodes/scheduling/<path:model>", merge_slashes=False, strict_slashes=True)
def show_rule(model: str) -> dict[str, Any]:
    return scheduling.show(web().services, model)


@routes.delete("/api/nodes/scheduling/<path:model>", merge_slashes=False, strict_slashes=True)
def reset_rule(model: str) -> dict[str, Any]:
    scheduling.reset(web().services, model)
    return {"model_name": model, "reset": True}


@routes.get("/api/nodes/<node>")
def show_node(node: str) -> dict[str, Any]:
    """By id or by name, as everywhere below."""
    return fleet.show(web().services, node)


@routes.delete("/api/nodes/<node>")
def remove_node(node: str) -> dict[str, Any]:
    """Only one that is not at work, unless `force=true`."""
    return nodes.remove(web().services, node, force=_flag("force"))


@routes.post("/api/nodes/<node>/approve")
def approve_node(node: str) -> dict[str, Any]:
    return nodes.approve(web().services, node)


@routes.post("/api/nodes/<node>/drain")
def drain_node(node: str) -> dict[str, Any]:
    return nodes.drain(web().services, nodes.named(web().services, node))


@routes.post("/api/nodes/<node>/resume")
def resume_node(node: str) -> dict[str, Any]:
    return nodes.resume(web().services, nodes.named(web().services, node))


@routes.post("/api/nodes/<node>/rotate")
def rotate_secret(node: str) -> dict[str, Any]:
    """Have the node make itself a new secret."""
    return nodes.ask_to_rotate(web().services, node)


@routes.get("/api/nodes/<node>/labels")
def node_labels(node: str) -> dict[str, Any]:
    return fleet.labels(web().services, node)


@routes.put("/api/nodes/<node>/labels")
def replace_labels(node: str) -> dict[str, Any]:
    """The body is the labels that the node is to have been given."""
    return fleet.give_labels(web().services, node, parse(Labels, request.get_data()).root, keep=False)


@routes.patch("/api/nodes/<node>/labels")
def add_labels(node: str) -> dict[str, Any]:
    return fleet.give_labels(web().services, node, parse(Labels, request.get_data()).root, keep=True)


@routes.delete("/api/nodes/<node>/labels")
def remove_labels(node: str) -> dict[str, Any]:
    return fleet.give_labels(web().services, node, {}, keep=False)


@routes.delete("/api/nodes/<node>/labels/<path:key>")
def remove_label(node: str, key: str) -> dict[str, Any]:
    return fleet.take_label(web().services, node, key)


@routes.put("/api/nodes/<node>/vram-budget")
def set_budget(node: str) -> dict[str, Any]:
    """An admin's word, which goes before the node's own and stays."""
    return fleet.limit(web().services, node, "vram_budget", parse(Budget, request.get_data()).value)


@routes.delete("/api/nodes/<node>/vram-budget")
def remove_budget(node: str) -> dict[str, Any]:
    return fleet.limit(web().services, node, "vram_budget", "")


@routes.put("/api/nodes/<node>/max-replicas-per-model")
def set_slots(node: str) -> dict[str, Any]:
    """An admin's word, which goes before the node's own and stays."""
    return fleet.limit(web().services, node, "max_replicas_per_model", parse(Slots, request.get_data()).value)


@routes.delete("/api/nodes/<node>/max-replicas-per-model")
def remove_slots(node: str) -> dict[str, Any]:
    return fleet.limit(web().services, node, "max_replicas_per_model", None)


@routes.post("/api/nodes/<node>/models/clean")
def clean_node(node: str) -> tuple[dict[str, Any], int]:
    """With `dry_run=true` nothing is removed."""
    return cleaning.clean(web().services, nodes.named(web().services, node), dry_run=_flag("dry_run")), 202


@routes.post("/api/nodes/<node>/files/scan")
def scan_files(node: str) -> tuple[dict[str, Any], int]:
    """The result of the job lists the GGUF files of a folder that the node's own setting allows."""
    folder = parse(Scan, request.get_data()).folder
    return {"job": imports.scan(web().services, nodes.named(web().services, node), folder)}, 202


@routes.post("/api/nodes/<node>/files/import")
def import_files(node: str) -> tuple[dict[str, Any], int]:
    """The result of the job says what each file is; models can be made of them then."""
    files = parse(Import, request.get_data()).files
    return {"job": imports.bring(web().services, nodes.named(web().services, node), files)}, 202


@routes.get("/api/jobs")
def list_jobs() -> dict[str, Any]:
    """`state` and `kind` narrow (comma-separated), and `node`, an id or a name; `limit` bounds."""
    limit = limit_of(request.args.get("limit", "100"))
    states, kinds = _listed("state", tuple(JobState)), _listed("kind", (*GENERATIONS, *NODE_JOBS))
    node = request.args.get("node", "")
    node_id = nodes.named(web().services, node).id if node else ""
    return {"jobs": jobs.listed(web().services, states=states, kinds=kinds, node_id=node_id, limit=limit)}


@routes.post("/api/jobs/prune")
def prune_jobs() -> dict[str, Any]:
    """Forget jobs that ended long ago."""
    body = parse(Prune, request.get_data())
    removed = jobs.prune(web().services, older_than=body.older_than, states=body.states, kinds=body.kinds)
    return {"removed": removed}


@routes.get("/api/models")
def list_models() -> dict[str, Any]:
    return {"models": models.listed(web().services)}


@routes.post("/api/models")
def add_model() -> tuple[dict[str, Any], int]:
    body = parse(Document, request.get_data())
    return models.add(web().services, body.name, body.config), 201


@routes.put("/api/models/<path:name>", merge_slashes=False, strict_slashes=True)
def put_model(name: str) -> tuple[dict[str, Any], int]:
    """The body is the whole model: it is added, or made so. With `force=true` even if no node could have it so."""
    body = {**load_object(request.get_data()), "name": name}
    shown, new = models.put(web().services, checked(Document, body), force=_flag("force"))
    return shown, 201 if new else 200


@routes.get("/api/models/config-json/<path:name>", merge_slashes=False, strict_slashes=True)
def show_document(name: str) -> dict[str, Any]:
    """What `PUT` takes back."""
    return models.document(web().services, name)


@routes.patch("/api/models/config-json/<path:name>", merge_slashes=False, strict_slashes=True)
@routes.patch("/api/models/<path:name>", merge_slashes=False, strict_slashes=True)
def edit_model(name: str) -> dict[str, Any]:
    """The body has the fields that change, as `POST` takes them. With `force=true` even if no node could have it so."""
    return models.edit(web().services, name, load_object(request.get_data()), force=_flag("force"))


@routes.delete("/api/models/<path:name>", merge_slashes=False, strict_slashes=True)  # slashes are part of a name
def remove_model(name: str) -> dict[str, Any]:
    models.remove(web().services, name)
    return {"name": name, "removed": True}


@routes.route("/api/files/<sha256>", methods=["HEAD"])
def has_file(sha256: str) -> Response:
    """200 if the file was uploaded, 308 and how far it is if it is on its way, 404 if not."""
    found = uploads.state(web().services, sha256)
    return Response(headers={"Content-Length": str(found.size)}) if found.whole else files.incomplete(found)


@routes.put("/api/files/<sha256>")
def put_file(sha256: str) -> Response | tuple[dict[str, Any], int]:
    """Upload a model's file: the body is the file, or with `Content-Range` the next part of it."""
    told = request.headers.get("X-Content-SHA256", sha256)
    if told != sha256:
        raise Conflict(f"'X-Content-SHA256' says {told[:64]!r}: the file has changed since its upload began.")
    services = web().services
    chunk = files.chunk(services.settings.max_upload)
    return files.received(sha256, uploads.receive(services, sha256, request.stream, chunk))


@routes.delete("/api/files/<sha256>")
def give_up_file(sha256: str) -> dict[str, Any]:
    """Remove what has come of a file that is on its way."""
    uploads.give_up(web().services, sha256)
    return {"sha256": sha256, "removed": True}


@routes.get("/api/keys")
def list_keys() -> dict[str, Any]:
    return {"keys": [asdict(key) for key in keys.listed(web().services)]}


@routes.post("/api/keys")
def create_key() -> tuple[dict[str, Any], int]:
    """The answer holds the key, this once."""
    body = parse(NewKey, request.get_data())
    record, text = keys.create(web().services, name=body.name, role=body.role)
    return {**asdict(record), "key": text}, 201


@routes.delete("/api/keys/<id:key_id>")
def revoke_key(key_id: str) -> dict[str, Any]:
    keys.revoke(web().services, key_id)
    return {"id": key_id, "revoked": True}


def _listed(name: str, allowed: Collection[str]) -> list[str]:
    found = [part for part in request.args.get(name, "").split(",") if part]
    if not set(found) <= set(allowed):
        raise InvalidValue(f"'{name}' needs one or more of {', '.join(allowed)}, with commas between them.", param=name)
    return found


def _flag(name: str) -> bool:
    given = request.args.get(name, "false")
    if given not in ("true", "false"):
        raise InvalidValue(f"'{name}' needs true or false.", param=name)
    return given == "true"


def limit_of(text: str) -> int:
    """How many are to be listed."""
    if not re.fullmatch("[0-9]{1,4}", text) or not 1 <= int(text) <= MOST_LISTED:
        raise InvalidValue(f"'limit' needs a number from 1 to {MOST_LISTED}.", param="limit")
    return int(text)
