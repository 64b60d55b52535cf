"""What anyone may ask: whether the process lives, whether the cluster can serve; and a machine's wish to join."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, request
from pydantic import BaseModel, ConfigDict, Field

from api.bodies import parse
from api.node import LARGEST_REPORT, host_called
from api.web import web
from localai_q import __version__
from localai_q.cluster.hardware import Hardware
from localai_q.services import nodes, status

routes = Blueprint("public", __name__)


class Registration(BaseModel):
    """What a machine says of itself; the token shows that it may ask."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")
    token: str = Field(max_length=256)
    secret_hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    version: str = Field("", max_length=64)
    hardware: Hardware = Field(default_factory=Hardware)


@routes.get("/healthz")
def healthz() -> dict[str, str]:
    """This process answers."""
    return {"status": "ok", "version": __version__}


@routes.get("/readyz")
def readyz() -> tuple[dict[str, Any], int]:
    """Whether database, broker and control can serve."""
    found = status.readiness(web().services)
    ready = all(value == "ok" for value in found.values())
    return {"status": "ok" if ready else "unavailable", **found}, 200 if ready else 503


@routes.post("/api/node/register")
def register() -> tuple[dict[str, Any], int]:
    """A machine asks to join (LocalAI's `/api/node/register`)."""
    request.max_content_length = LARGEST_REPORT
    body = parse(Registration, request.get_data())
    told = {**body.model_dump(), "hardware": body.hardware.told()}
    return nodes.register(web().services, **told, host=host_called()), 201
