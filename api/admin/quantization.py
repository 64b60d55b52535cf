"""Quantizations, with LocalAI's paths. Each endpoint is a use case of `localai_q.services.quantizations` behind a path."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

from flask import Blueprint, Response, request
from pydantic import BaseModel, ConfigDict

from api.bodies import parse
from api.openai.serving import KEEPALIVE
from api.sse import HEADERS, RETRY, comment, sse
from api.web import Web, web
from localai_q.cluster.models import ModelName
from localai_q.cluster.quantizing import Order
from localai_q.errors import LocalAIError
from localai_q.services import quantizations

routes = Blueprint("quantization", __name__, url_prefix="/api/quantization")

LOOK = 0.5  # seconds between two looks at a quantization that is followed
EVENTS = ("status", "progress_percent", "message")  # what is new makes an event


class Import(BaseModel):
    """The model that the result is to become."""

    model_config = ConfigDict(extra="forbid")

    name: ModelName | None = None


@routes.get("/backends")
def list_backends() -> list[dict[str, Any]]:
    return quantizations.backends(web().services)


@routes.get("/jobs")
def list_jobs() -> list[dict[str, Any]]:
    """The newest first."""
    return quantizations.listed(web().services)


@routes.post("/jobs")
def create() -> tuple[dict[str, Any], int]:
    return quantizations.create(web().services, parse(Order, request.get_data())), 201


@routes.get("/jobs/<id:quantization_id>")
def show(quantization_id: str) -> dict[str, Any]:
    return quantizations.show(web().services, quantization_id)


@routes.delete("/jobs/<id:quantization_id>")
def remove(quantization_id: str) -> dict[str, Any]:
    """With its file, unless a model has that."""
    quantizations.remove(web().services, quantization_id)
    return {"id": quantization_id, "removed": True}


@routes.post("/jobs/<id:quantization_id>/stop")
def stop(quantization_id: str) -> dict[str, Any]:
    return quantizations.stop(web().services, quantization_id)


@routes.post("/jobs/<id:quantization_id>/retry")
def retry(quantization_id: str) -> dict[str, Any]:
    """One that has failed or was stopped, under the same id."""
    return quantizations.retry(web().services, quantization_id)


@routes.post("/jobs/<id:quantization_id>/import")
def import_model(quantization_id: str) -> tuple[dict[str, Any], int]:
    """Register the result as a model."""
    made = quantizations.import_model(web().services, quantization_id, parse(Import, request.get_data()).name)
    return {"status": "completed", "message": "", "model_name": made["name"]}, 201


@routes.get("/jobs/<id:quantization_id>/progress")
def follow(quantization_id: str) -> Response:
    """What is new of it, as server-sent events, up to its end."""
    process = web()
    first = quantizations.show(process.services, quantization_id)
    return Response(_events(process, first), headers=HEADERS)


@routes.get("/jobs/<id:quantization_id>/download")
def download(quantization_id: str) -> Response:
    """The result, from the byte that `Range: bytes=N-` names."""
    asked = re.fullmatch(r"bytes=([0-9]{1,18})-", request.headers.get("Range", ""))
    start = int(asked[1]) if asked else 0
    name, size, chunks = quantizations.download(web().services, quantization_id, start)
    headers = {"Content-Length": str(max(size - start, 0)), "Content-Disposition": f'attachment; filename="{name}"'}
    if asked:
        headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
    return Response(chunks, 206 if asked else 200, headers, mimetype="application/octet-stream")


def _events(process: Web, shown: dict[str, Any]) -> Iterator[bytes]:
    told: dict[str, Any] = {}
    spoken = time.monotonic()
    while True:
        news = {name: shown[name] for name in EVENTS}
        if news != told:
            told, spoken = news, time.monotonic()
            yield sse(json.dumps(_event(shown)))
        elif time.monotonic() - spoken > KEEPALIVE:
            spoken = time.monotonic()
            yield comment("waiting")
        if shown["state"] != "open":
            return
        if process.streams.stopping:
            yield RETRY
            return
        time.sleep(LOOK)
        try:
            shown = quantizations.show(process.services, shown["id"])
        except LocalAIError as error:
            yield sse(json.dumps(error.body()))
            return


def _event(shown: dict[str, Any]) -> dict[str, Any]:
    """LocalAI's event."""
    figures = {name: value for name, value in (shown["result"] or {}).items() if isinstance(value, int | float)}
    return {"job_id": shown["id"], **{name: shown[name] for name in EVENTS}, "output_file": shown["output_file"],
            "extra_metrics": figures}  # fmt: skip
