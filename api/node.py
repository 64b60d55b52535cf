"""What nodes call, each with its own secret and for itself only."""

from __future__ import annotations

import logging
import re
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from flask import Blueprint, Response, g, request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from api import files
from api.bodies import parse
from api.web import web
from localai_q.cluster.hardware import Hardware
from localai_q.cluster.reports import MOST_REPLICAS, Report
from localai_q.cluster.states import ReplicaState
from localai_q.cluster.wheels import WheelKey
from localai_q.errors import InvalidValue
from localai_q.names import WHEEL_HEADER
from localai_q.services import cleaning, holders, nodes, quantizations, uploads, wheels

log = logging.getLogger(__name__)

routes = Blueprint("node", __name__, url_prefix="/api/node/<id:node_id>")

LARGEST_WHEEL = 2 << 30  # bytes
LARGEST_REPORT = 256 << 10  # bytes
REFUSED = (400, 401, 403, 413)


class Heartbeat(BaseModel):
    """A node's report."""

    model_config = ConfigDict(extra="forbid")

    hardware: Hardware = Field(default_factory=Hardware)
    replicas: list[Report] = Field(default_factory=list, max_length=MOST_REPLICAS)

    @model_validator(mode="after")
    def _says_one_thing_of_each(self) -> Self:
        if len({report.id for report in self.replicas}) < len(self.replicas):
            raise ValueError("a replica is in it twice")
        return self


class ReplicaReport(BaseModel):
    """What became of a replica."""

    model_config = ConfigDict(extra="forbid")

    state: Literal["ready", "failed", "gone", "loading"]
    reason: str = Field("", max_length=8000)
    hardware: Hardware = Field(default_factory=Hardware)


class NewSecret(BaseModel):
    """What a node will be known by."""

    model_config = ConfigDict(extra="forbid")

    secret_hash: str = Field(pattern=r"^[0-9a-f]{64}$")


@routes.before_request
def bound() -> None:
    """Reports are short."""
    request.max_content_length = LARGEST_REPORT


@routes.after_request
def log_refusal(response: Response) -> Response:
    """A node that is refused is one to look at: broken, outdated, or not what it says it is."""
    if response.status_code in REFUSED:
        error = (response.get_json(silent=True) or {}).get("error", {})
        log.warning("refused %s, called from %s: %s", request.path, request.remote_addr, error.get("message"))
    return response


@routes.post("/heartbeat")
def heartbeat(node_id: str) -> dict[str, Any]:
    body = parse(Heartbeat, request.get_data())
    return nodes.heartbeat(web().services, g.node, hardware=body.hardware.told(), reported=body.replicas)


@routes.get("/replicas/<id:replica_id>")
def replica(node_id: str, replica_id: str) -> dict[str, Any]:
    """What the node needs to start it."""
    return nodes.replica_spec(web().services, g.node, replica_id)


@routes.post("/replicas/<id:replica_id>")
def report(node_id: str, replica_id: str) -> dict[str, Any]:
    body = parse(ReplicaReport, request.get_data())
    state = ReplicaState(body.state)
    nodes.report_replica(web().services, g.node, replica_id, state, body.reason, body.hardware.told())
    return {}


@routes.post("/secret")
def secret(node_id: str) -> dict[str, Any]:
    """The SHA-256 of the secret that the node will use next."""
    nodes.announce_secret(web().services, g.node, parse(NewSecret, request.get_data()).secret_hash)
    return {}


@routes.get("/holders/<sha256>")
def find_holders(node_id: str, sha256: str) -> dict[str, Any]:
    """From where the node can get a file."""
    return holders.find(web().services, g.node, sha256, called=host_called())


@routes.post("/holders/<sha256>/<id:holder_id>/wrong")
def wrong(node_id: str, sha256: str, holder_id: str) -> dict[str, Any]:
    """A holder has given something else."""
    holders.blame(web().services, g.node, sha256, holder_id)
    return {}


@routes.get("/wheels/<digest>")
def find_wheel(node_id: str, digest: str) -> dict[str, Any]:
    """Whether some node has compiled that wheel for others; `backend` is what it is for."""
    return wheels.told(web().services, g.node, digest, request.args.get("backend", ""))


@routes.put("/wheels/<digest>")
def give_wheel(node_id: str, digest: str) -> Response | tuple[dict[str, Any], int]:
    """The body is a wheel that the node has compiled, or the next part of it; `sha256` is its content, a header has the
    key."""
    chunk = files.chunk(LARGEST_WHEEL)
    key = parse(WheelKey, request.headers.get(WHEEL_HEADER, "").encode())
    sha256 = request.args.get("sha256", "")
    return files.received(sha256, wheels.take(web().services, g.node, digest, key, sha256, request.stream, chunk))


@routes.post("/drain")
def drain(node_id: str) -> dict[str, Any]:
    return nodes.drain(web().services, g.node)


@routes.post("/resume")
def resume(node_id: str) -> dict[str, Any]:
    return nodes.resume(web().services, g.node)


@routes.post("/deregister")
def deregister(node_id: str) -> dict[str, Any]:
    nodes.deregister(web().services, g.node)
    return {}


@routes.put("/quantizations/<id:quantization_id>/result/<sha256>")
def receive(node_id: str, quantization_id: str, sha256: str) -> Response | tuple[dict[str, Any], int]:
    """The body is the file that the node has made, or the next part of it."""
    services = web().services
    chunk = files.chunk(services.settings.max_upload)
    found = quantizations.receive(services, g.node, quantization_id, sha256, request.stream, chunk)
    return files.received(sha256, found)


@routes.get("/unnamed")
def unnamed(node_id: str) -> dict[str, Any]:
    """The files that the node has told of and no model names."""
    return {"files": cleaning.unnamed_on(web().services, g.node)}


@routes.get("/files/<sha256>")
def file(node_id: str, sha256: str) -> Response:
    """An uploaded file, from the byte that `Range: bytes=N-` names."""
    asked = re.fullmatch(r"bytes=([0-9]{1,18})-", request.headers.get("Range", ""))
    start = int(asked[1]) if asked else 0
    size, chunks = uploads.read(web().services, sha256, start)
    headers = {"Content-Length": str(max(size - start, 0))}
    if asked:
        headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
    return Response(chunks, 206 if asked else 200, headers, mimetype="application/octet-stream")


def host_called() -> str:
    """The host by which a machine reaches this API, without port and brackets."""
    try:
        return urlsplit(f"//{request.headers.get('Host', '')}").hostname or ""
    except ValueError as error:
        raise InvalidValue("The header 'Host' names no host.", param="Host") from error
