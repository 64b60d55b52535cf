"""How far a model is that must be loaded, for whoever was told to come back."""

from __future__ import annotations

from typing import Any

from flask import Blueprint

from api.web import web
from localai_q.services import waiting

routes = Blueprint("loads", __name__)


@routes.get("/api/models/<path:name>/load-status")
def load_status(name: str) -> dict[str, Any]:
    """LocalAI's `loading` object of a model that is on its way up, and its last failure; null where there is none."""
    process = web()
    model, snapshot = process.snapshots.model(name)
    return {"model": name, **waiting.status(process.services, snapshot, model)}
