"""Models with LocalAI's paths: galleries, installs, imports. Each endpoint is a use case of `localai_q.services` behind a
path. The cluster's own paths of models stand in `api.admin.routes`.
"""

from __future__ import annotations

from typing import Any

from flask import Blueprint, request
from pydantic import BaseModel, ConfigDict, Field

from api.bodies import parse
from api.web import web
from localai_q.cluster.importing import Preferences
from localai_q.services import galleries, installs

routes = Blueprint("models", __name__)

WHOLE = {"merge_slashes": False, "strict_slashes": True}  # slashes are part of a name


class Apply(BaseModel):
    """What to install: a model of a gallery, or what a URL describes."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field("", max_length=200)  # name, or gallery@name
    url: str = Field("", max_length=2000)
    config_url: str = Field("", max_length=2000)  # another name of `url`
    name: str = Field("", max_length=128)
    overrides: dict[str, Any] = Field(default_factory=dict)
    files: list[dict[str, Any]] = Field(default_factory=list, max_length=100)
    preload: bool = True


class FromUri(BaseModel):
    """Where a model is."""

    model_config = ConfigDict(extra="forbid")

    uri: str = Field(min_length=1, max_length=2000)
    name: str = Field("", max_length=128)
    sha256: str | None = None
    preload: bool = True
    preferences: Preferences | None = None


@routes.get("/models/available")
def list_available() -> list[dict[str, Any]]:
    return installs.available(web().services)


@routes.get("/models/galleries")
def list_galleries() -> list[dict[str, Any]]:
    return galleries.shown_models(web().services)


@routes.post("/models/apply")
def apply() -> dict[str, Any]:
    body = parse(Apply, request.get_data())
    return _installed(body.id, body)


@routes.post("/api/models/install/<path:wanted>", **WHOLE)
def install(wanted: str) -> dict[str, Any]:
    """By name, or by `gallery@name`; the body may have what `POST /models/apply` takes besides."""
    made = _installed(wanted, parse(Apply, request.get_data()))
    return {**made, "jobID": made["uuid"], "message": f"install of {made['name']}"}


@routes.get("/models/jobs")
def list_installations() -> dict[str, Any]:
    return {each["uuid"]: each for each in installs.installations(web().services)}


@routes.get("/models/jobs/<id:model_id>")
def show_installation(model_id: str) -> dict[str, Any]:
    return installs.installation(web().services, model_id)


@routes.get("/api/models/job/<id:model_id>")
def show_installation_on_a_page(model_id: str) -> dict[str, Any]:
    return as_on_a_page(installs.installation(web().services, model_id))


@routes.post("/models/import")
def import_documents() -> tuple[dict[str, Any], int]:
    """The body is YAML or JSON in LocalAI's form."""
    added = installs.import_documents(web().services, request.get_data())
    return {"success": True, "message": f"Added {', '.join(each['name'] for each in added)}", "models": added}, 201


@routes.post("/models/import-uri")
def import_uri() -> dict[str, Any]:
    body = parse(FromUri, request.get_data())
    return installs.import_uri(web().services, body.uri, name=body.name, sha256=body.sha256,
                               preload=body.preload, preferences=body.preferences)  # fmt: skip


@routes.post("/models/edit/<path:name>", **WHOLE)
def edit(name: str) -> dict[str, Any]:
    """The body is the whole model, as YAML or JSON in LocalAI's form."""
    changed = installs.edit(web().services, name, request.get_data())
    return {"success": True, "message": f"Model '{name}' was changed", **changed}


@routes.post("/models/delete/<path:name>", **WHOLE)
@routes.post("/api/models/delete/<path:name>", **WHOLE)
def delete(name: str) -> dict[str, Any]:
    return installs.remove(web().services, name)


@routes.post("/models/reload")
def reload() -> dict[str, Any]:
    """There are no files of models to read again: what was changed holds everywhere at once."""
    return {"success": True, "message": "Models stand in the database: there is nothing to read again"}


@routes.put("/models/toggle-state/<path:name>/<action>", merge_slashes=False)
def toggle_state(name: str, action: str) -> dict[str, Any]:
    return installs.switched(web().services, name, "disabled", action, {"enable": False, "disable": True})


@routes.put("/models/toggle-pinned/<path:name>/<action>", merge_slashes=False)
def toggle_pinned(name: str, action: str) -> dict[str, Any]:
    return installs.switched(web().services, name, "pinned", action, {"pin": True, "unpin": False})


@routes.get("/api/models/vram-estimate/<path:name>", **WHOLE)
def estimate(name: str) -> dict[str, Any]:
    return installs.estimate(web().services, name)


def as_on_a_page(status: dict[str, Any]) -> dict[str, Any]:
    """How far something is, with the further words that LocalAI's web pages look for."""
    return {
        **status,
        "galleryElementName": status["gallery_element_name"],
        "completed": status["processed"] and not status["error"] and not status["cancelled"],
    }


def _installed(wanted: str, body: Apply) -> dict[str, Any]:
    return installs.install(web().services, wanted=wanted, url=body.url or body.config_url, name=body.name,
                            overrides=body.overrides, files=body.files, preload=body.preload)  # fmt: skip
