"""OpenAI's endpoints, each with and without `/v1`."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, request

from api.openai.schemas import parse_chat, parse_completion, parse_embedding
from api.openai.serving import answer, resumed
from api.web import web
from localai_q.cluster.models import Model


def blueprint(name: str, prefix: str | None) -> Blueprint:
    """The endpoints below a prefix."""
    routes = Blueprint(name, __name__, url_prefix=prefix)
    routes.post("/chat/completions")(chat)
    routes.post("/completions")(completions)
    routes.post("/embeddings")(embeddings)
    routes.get("/models")(models)
    routes.get("/models/<path:name>")(model)
    return routes


def chat() -> Response:
    """POST /v1/chat/completions"""
    return resumed() or answer(parse_chat(request.get_data()))


def completions() -> Response:
    """POST /v1/completions"""
    return resumed() or answer(parse_completion(request.get_data()))


def embeddings() -> Response:
    """POST /v1/embeddings"""
    return resumed() or answer(parse_embedding(request.get_data()))


def models() -> dict[str, Any]:
    """GET /v1/models: every model that may be asked, loaded or not.

    Some clients take the first: that is the default model, and never one without weights where there are others.
    """
    every = [each for each in web().snapshots.now().models.values() if not each.config.disabled]
    every.sort(key=lambda each: (not each.is_default, not each.config.source, each.name))
    return {"object": "list", "data": [_shown(each) for each in every]}


def model(name: str) -> dict[str, Any]:
    """GET /v1/models/{id}"""
    return _shown(web().snapshots.model(name)[0])


def _shown(found: Model) -> dict[str, Any]:
    return {"id": found.name, "object": "model", "created": int(found.created), "owned_by": "localai_q"}
