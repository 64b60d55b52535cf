"""Backends and operations, with LocalAI's paths. Each endpoint is a use case of `localai_q.services` behind a path."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, request
from pydantic import BaseModel, ConfigDict, Field

from api.admin.models import as_on_a_page
from api.admin.routes import limit_of
from api.bodies import parse
from api.strictjson import load_object
from api.web import caller, web
from localai_q.cluster.backends import Op
from localai_q.documents import checked
from localai_q.gallery.catalog import External, Wanted
from localai_q.services import backends, galleries, jobs, nodes, operations, wheels

routes = Blueprint("backends", __name__)

MOST_NODES = 1000


class OnNode(BaseModel):
    """What to install, upgrade or delete on a node."""

    model_config = ConfigDict(extra="forbid")

    backend: Wanted


class Narrowed(BaseModel):
    """Which nodes a request is for: all of these, that have these labels."""

    model_config = ConfigDict(extra="forbid")

    nodes: list[str] = Field(default_factory=list, max_length=MOST_NODES)  # ids or names; none: all
    selector: dict[str, str] = Field(default_factory=dict, max_length=64)


class Apply(Narrowed):
    """What to install on all nodes."""

    id: Wanted


class Given(Narrowed, External):
    """A backend that the cluster does not know yet."""


@routes.get("/api/nodes/<node>/backends")
def of_node(node: str) -> list[dict[str, Any]]:
    return backends.of_node(nodes.named(web().services, node))


@routes.post("/api/nodes/<node>/backends/install", defaults={"op": Op.INSTALL})
@routes.post("/api/nodes/<node>/backends/upgrade", defaults={"op": Op.UPGRADE})
@routes.post("/api/nodes/<node>/backends/delete", defaults={"op": Op.DELETE})
def change_on_node(node: str, op: Op) -> tuple[dict[str, Any], int]:
    """The job's id; `GET /api/jobs/<id>` shows it."""
    services, content = web().services, _said()
    there = nodes.named(services, node)
    if op is Op.INSTALL and "uri" in content:
        given = checked(External, content)
        name, job_id = given.name, backends.install_external_on(services, there, given)
    else:
        name = checked(OnNode, content).backend
        job_id = backends.change(services, there, op, name)
    return {"jobID": job_id, "message": f"{op} of {name} on {node}"}, 202


@routes.get("/api/backends")
@routes.get("/backends")
def list_backends() -> list[dict[str, Any]]:
    """What is installed, on which nodes, and whether their versions differ."""
    return backends.listed(web().services)


@routes.get("/backends/available")
@routes.get("/backends/known")
def list_available() -> list[dict[str, Any]]:
    return backends.available(web().services)


@routes.get("/backends/galleries")
def list_galleries() -> list[dict[str, Any]]:
    return galleries.shown(web().services)


@routes.get("/backends/upgrades")
@routes.get("/api/backends/upgrades")
def list_upgrades() -> dict[str, Any]:
    """By name, the backends of which some node has another version than the one that is to be had."""
    return backends.upgrades(web().services)


@routes.post("/backends/upgrades/check")
@routes.post("/api/backends/upgrades/check")
def check_upgrades() -> dict[str, Any]:
    """The same after the galleries were read anew, as it is done every six hours."""
    return backends.check_upgrades(web().services)


@routes.post("/backends/apply")
def apply() -> tuple[dict[str, Any], int]:
    """Install on every node that can run it; those that are away install it when they are back."""
    return _applied(), 202


@routes.post("/api/backends/install-external")
def install_external() -> tuple[dict[str, Any], int]:
    """The same with the answer that LocalAI gives to this."""
    return _as_job(_applied()), 202


@routes.post("/backends/upgrade/<wanted>", defaults={"op": Op.UPGRADE})
@routes.post("/backends/delete/<wanted>", defaults={"op": Op.DELETE})
def change_everywhere(op: Op, wanted: str) -> tuple[dict[str, Any], int]:
    """On every node that has it."""
    return _changed(op, wanted), 202


@routes.post("/api/backends/install/<wanted>", defaults={"op": Op.INSTALL})
@routes.post("/api/backends/upgrade/<wanted>", defaults={"op": Op.UPGRADE})
@routes.post("/api/backends/delete/<wanted>", defaults={"op": Op.DELETE})
def change_for_ui(op: Op, wanted: str) -> tuple[dict[str, Any], int]:
    """The same, and an install as `apply` does, with the answer that LocalAI gives to these."""
    return _as_job(_changed(op, wanted)), 202


@routes.post("/api/backends/system/delete/<wanted>")
def delete_for_ui(wanted: str) -> tuple[dict[str, Any], int]:
    """As `delete`: the path that LocalAI's pages have for what is installed."""
    return change_for_ui(Op.DELETE, wanted)


@routes.get("/backends/jobs")
def list_operations() -> dict[str, Any]:
    return {operation["uuid"]: operation for operation in backends.operations(web().services)}


@routes.get("/backends/jobs/<id:operation_id>")
def show_operation(operation_id: str) -> dict[str, Any]:
    return backends.operation(web().services, operation_id)


@routes.get("/api/backends/job/<id:operation_id>")
def show_operation_on_a_page(operation_id: str) -> dict[str, Any]:
    return as_on_a_page(backends.operation(web().services, operation_id))


@routes.delete("/backends/jobs/<id:operation_id>")
def give_up(operation_id: str) -> dict[str, Any]:
    """Take back what is not done yet."""
    return backends.give_up(web().services, operation_id)


@routes.get("/api/wheels")
def list_wheels() -> dict[str, Any]:
    """What builders have compiled for others."""
    return {"wheels": wheels.listed(web().services)}


@routes.delete("/api/wheels/<id:digest>")
def remove_wheel(digest: str) -> dict[str, Any]:
    wheels.remove(web().services, digest)
    return {"id": digest, "removed": True}


@routes.get("/api/operations")
def list_open_operations() -> dict[str, Any]:
    """What nodes are doing, in LocalAI's form."""
    return {"operations": operations.current(web().services)}


@routes.get("/api/operations/history")
def list_ended_operations() -> dict[str, Any]:
    """What nodes have done, the newest first; `limit` bounds."""
    return {"operations": operations.history(web().services, limit=limit_of(request.args.get("limit", "100")))}


@routes.post("/api/operations/<id:operation_id>/cancel")
def cancel_operation(operation_id: str) -> dict[str, Any]:
    """By the id of a job, or of a request for many nodes."""
    operations.cancel(web().services, operation_id, caller())
    return {"success": True, "message": "Operation cancelled"}


@routes.post("/api/operations/<id:job_id>/pause")
def pause_operation(job_id: str) -> dict[str, Any]:
    """A download; `POST /api/jobs/<id>/retry` goes on with it."""
    jobs.pause(web().services, job_id, caller())
    return {"success": True, "message": "Operation paused"}


@routes.post("/api/operations/<id:operation_id>/dismiss")
def dismiss_operation(operation_id: str) -> dict[str, Any]:
    """Forget what has ended."""
    operations.dismiss(web().services, operation_id, caller())
    return {"success": True, "message": "Operation dismissed"}


@routes.delete("/api/operations/history")
def forget_ended_operations() -> dict[str, Any]:
    return {"success": True, "removed": operations.forget_history(web().services)}


def _applied() -> dict[str, Any]:
    content = _said()
    if "uri" in content:
        given = checked(Given, content)
        return backends.install_external(web().services, given, only=given.nodes, selector=given.selector)
    body = checked(Apply, content)
    return backends.change_everywhere(web().services, Op.INSTALL, body.id, only=body.nodes, selector=body.selector)


def _changed(op: Op, wanted: str) -> dict[str, Any]:
    body = parse(Narrowed, request.get_data())
    return backends.change_everywhere(web().services, op, wanted, only=body.nodes, selector=body.selector)


def _said() -> dict[str, Any]:
    """The fields of the body that say something: LocalAI's forms send empty ones along."""
    return {name: value for name, value in load_object(request.get_data() or b"{}").items() if value != ""}


def _as_job(operation: dict[str, Any]) -> dict[str, Any]:
    return {"jobID": operation["uuid"], "message": operation["message"]}
