"""What happens to a job of any kind, as server-sent events: its progress and its end. What a model says is none of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from flask import Response, request

from api.openai.serving import EVENT_ID, KEEPALIVE
from api.sse import HEADERS, RETRY, comment, sse
from api.streams import Following
from api.web import caller, web
from localai_q.bus.journal import Entry, Place
from localai_q.cluster.events import End, Progress
from localai_q.cluster.states import JobState
from localai_q.errors import InvalidValue
from localai_q.services import jobs

LONGEST = 24 * 3600.0  # seconds for which a job without a deadline is followed


def follow(job_id: str) -> Response:
    """The events of a job, to who asked for it and to admins; behind the one that `Last-Event-ID` names, if it is given.

    Raises:
        NotFound: there is no such job.
        InvalidValue: `Last-Event-ID` is no id of an event of this job.
    """
    after = _last_event(job_id)
    process = web()
    shown = jobs.show(process.services, job_id, caller())
    kept = process.services.leases.kept(job_id)
    if kept is None:  # it ended long ago, or Redis has lost it, and is given it back soon
        return Response(RETRY if shown["state"] == JobState.OPEN else sse(json.dumps(_end(shown))), headers=HEADERS)
    following = Following(process.streams, job_id).follow(
        replace(kept, left=kept.left if shown["deadline"] else LONGEST), shown["model"] or ""
    )

    def frame(entry: Entry | None, silent: float) -> bytes:
        made = _frame(job_id, entry) if entry else b""
        return comment("waiting") if not made and silent > KEEPALIVE else made

    response = Response(following.frames(following.entries(after=after), frame), headers=HEADERS)
    response.call_on_close(following.close)
    return response


def _last_event(job_id: str) -> Place:
    given = request.headers.get("Last-Event-ID")
    if given is None:
        return (0, 0)
    found = EVENT_ID.fullmatch(given)
    if not found or found[1] != job_id:
        raise InvalidValue("'Last-Event-ID' needs the id of an event of this job.", param="Last-Event-ID")
    return int(found[2]), int(found[3])


def _frame(job_id: str, entry: Entry) -> bytes:
    match entry.event:
        case Progress():
            said = {"type": "progress", **asdict(entry.event)}
        case End():
            said = _end(asdict(entry.event))
        case _:
            return b""
    return sse(json.dumps(said), f"{job_id}:{entry.id}")


def _end(told: dict[str, Any]) -> dict[str, Any]:
    return {"type": "end", "state": told["state"], "error": told["error"], "result": told["result"]}
