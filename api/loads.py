"""How far a model is that must be loaded, for whoever was told to come back."""

from __future__ import annotations

from typing import Any

from flask import Blueprint

from api.web import web
from localai_q.services import waiting

routes = Blueprint("loads", __name__)


@routes.get("/api/models/<path:name>/load-status")
def load_status(name: str) -> dict[str, Any]:
    """LocalAI's `loading` object of a model that is on its way up; null when it is not."""
    process = web()
    model, snapshot = process.snapshots.model(name)
    load = waiting.load(process.services, snapshot, model)
    return {"model": name, "loading": load.body() if load else None}
