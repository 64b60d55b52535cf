"""A single job, for the key that asked for it: shown, cancelled, come back to. Admins may show and cancel every job."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response

from api import events
from api.openai import serving
from api.web import caller, web
from localai_q.services import jobs, retries

routes = Blueprint("jobs", __name__, url_prefix="/api/jobs/<id:job_id>")


@routes.get("")
def show(job_id: str) -> dict[str, Any]:
    return jobs.show(web().services, job_id, caller())


@routes.delete("")
def cancel(job_id: str) -> dict[str, Any]:
    return {"id": job_id, "state": jobs.cancel(web().services, job_id, caller())}


@routes.post("/retry")
def retry(job_id: str) -> tuple[dict[str, Any], int]:
    """What a node has failed to do, as a new job."""
    return {"jobID": retries.retry(web().services, job_id, caller())}, 202


@routes.post("/pause")
def pause(job_id: str) -> dict[str, Any]:
    """A download, which `retry` goes on with."""
    jobs.pause(web().services, job_id, caller())
    return {"id": job_id, "paused": True}


@routes.get("/log")
def log(job_id: str) -> Response:
    """What a node has said of its work, so far or until its end."""
    return Response(jobs.log_of(web().services, job_id, caller()), mimetype="text/plain")


@routes.get("/events")
def follow(job_id: str) -> Response:
    """The progress and the end of a job of any kind."""
    return events.follow(job_id)


@routes.get("/stream")
def stream(job_id: str) -> Response:
    """The events of a generation that streams: all, or with `Last-Event-ID` the rest."""
    return serving.resume(job_id)


@routes.get("/result")
def result(job_id: str) -> Response:
    """The answer of a generation in one piece, once it is there."""
    return serving.result(job_id)
