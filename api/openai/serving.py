"""From a checked request to its answer, and from a job that a client comes back for: what the client gets.

It owns the form of answers: whole, as a stream, or the promise of one. How a job is followed, and what becomes of it
when its client leaves, is the business of `api.streams`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flask import Response, g, request

from api.openai.responses import Stream, response_for, stream_for
from api.sse import DONE, HEADERS, comment, sse
from api.streams import Following
from api.web import caller, web
from localai_q import names
from localai_q.bus import journal
from localai_q.bus.journal import Entry, Place
from localai_q.bus.leases import Kept
from localai_q.cluster.events import End
from localai_q.cluster.jobs import Keep
from localai_q.cluster.requests import GenerationRequest
from localai_q.cluster.states import JobState
from localai_q.cluster.waiting import Standing
from localai_q.errors import (
    GenerationFailed,
    Gone,
    InvalidRequest,
    InvalidValue,
    ModelLoading,
    Unavailable,
    from_record,
)
from localai_q.services import generations

HOLD = 2.0  # seconds for which headers wait for a first event, so that an early failure has its own status
HOLD_FOR_NODE = 30.0  # the same while a header is to name the node and no node has claimed the job
KEEPALIVE = 10.0  # seconds between comments in a silent stream, unless there is news of a load
EVENT_ID = re.compile(r"([a-z0-9]{1,64}):([0-9]{1,9})-([0-9]{1,9})")


def answer(asked: GenerationRequest) -> Response:
    """Have the request worked on, and answer it."""
    keep = _keep(asked)
    job_id = names.new_id()
    if keep is Keep.BACKGROUND and not asked.stream:
        _submit(asked, job_id, watcher="", keep=keep)
        return _promise(job_id)
    following = Following(web().streams, job_id)
    with _closed_on_error(following):
        kept = _submit(asked, job_id, watcher=web().streams.listener.watcher, keep=keep)
        entries = following.follow(kept, asked.model).entries(fresh=True)
        if not asked.stream:
            return _whole(following, asked, entries)
        return _stream(following, stream_for(asked, job_id, kept.created), entries)


def resumed() -> Response | None:
    """The rest of the stream whose last event `Last-Event-ID` names; None without that header."""
    if "Last-Event-ID" not in request.headers:
        return None
    job_id, place = _last_event()
    return _resume(job_id, place)


def resume(job_id: str) -> Response:
    """The job's stream: all of it, or what comes behind the event that `Last-Event-ID` names."""
    if "Last-Event-ID" not in request.headers:
        return _resume(job_id, None)
    named, place = _last_event()
    if named != job_id:
        raise InvalidValue("'Last-Event-ID' names an event of another job.", param="Last-Event-ID")
    return _resume(job_id, place)


def result(job_id: str) -> Response:
    """The job's answer in one piece, once it is there."""
    kept, asked = _find(job_id)
    following = Following(web().streams, job_id).follow(kept, asked.model)
    with _closed_on_error(following):
        return _whole(following, asked, following.entries())


def _submit(asked: GenerationRequest, job_id: str, *, watcher: str, keep: Keep) -> Kept:
    process = web()
    kept = generations.submit(
        process.services, process.router, asked, key_id=caller().id, job_id=job_id, watcher=watcher, keep=keep
    )
    g.job_id = job_id
    return kept


def _keep(asked: GenerationRequest) -> Keep:
    """What the client wants to become of the job when it disconnects."""
    if asked.background or _is_set("X-LocalAI-Background"):
        return Keep.BACKGROUND
    return Keep.GRACE if _is_set("X-LocalAI-Resumable") else Keep.NOT


def _is_set(header: str) -> bool:
    value = request.headers.get(header, "0").lower()
    if value not in ("0", "1", "false", "true"):
        raise InvalidValue(f"'{header}' needs 1 or 0.", param=header)
    return value in ("1", "true")


def _last_event() -> tuple[str, Place]:
    found = EVENT_ID.fullmatch(request.headers["Last-Event-ID"])
    if not found:
        raise InvalidValue(
            "'Last-Event-ID' needs the id of an event as this API sends it: JOB:ATTEMPT-INDEX.", param="Last-Event-ID"
        )
    return found[1], (int(found[2]), int(found[3]))


def _find(job_id: str) -> tuple[Kept, GenerationRequest]:
    kept = generations.find(web().services, job_id, key_id=caller().id)
    g.job_id = job_id
    return kept, GenerationRequest.from_json(kept.outline)


def _resume(job_id: str, seen: Place | None) -> Response:
    kept, asked = _find(job_id)
    if not asked.stream:
        raise InvalidRequest(f"Job '{job_id}' does not stream. GET /api/jobs/{job_id}/result gives its answer.")
    last = _seen(job_id, seen) if seen else None
    if last and isinstance(last.event, End):
        _raise_failure(last.event, came_back=True)
        return Response(DONE, headers=HEADERS)
    following = Following(web().streams, job_id).follow(kept, asked.model)
    with _closed_on_error(following):
        chunks = stream_for(asked, job_id, kept.created)
        if seen and chunks.skip():
            return _stream(following, chunks, following.entries(after=seen))
        return _stream(following, chunks, _behind(following.entries(), chunks, seen))


def _seen(job_id: str, place: Place) -> Entry:
    """The entry that the client says it saw last.

    Raises:
        InvalidValue: there never was one.
        Gone: Redis has lost it, and others stand in its stead.
        Unavailable: Redis has lost it, and whoever works on the job will restore it.
    """
    process = web()
    entry = journal.at(process.services.redis, job_id, place)
    if entry:
        return entry
    live = process.services.leases.live([job_id]).get(job_id)
    if live is None or live.state == "ended" or live.attempt < place[0]:
        raise InvalidValue(f"The stream of job '{job_id}' has no such event.", param="Last-Event-ID")
    if live.attempt > place[0]:
        raise Gone(journal.LOST)
    raise Unavailable(f"The stream of job '{job_id}' has no such event at the moment. Try again soon.")


def _behind(entries: Iterator[Entry | None], chunks: Stream, seen: Place | None) -> Iterator[Entry | None]:
    """The entries that the client has not seen. Those before them have their effect on how these are written."""
    for entry in entries:
        if entry and seen and entry.index <= seen[1]:
            chunks.feed(entry.event)
        else:
            yield entry


@contextmanager
def _closed_on_error(following: Following) -> Iterator[None]:
    """Close the following if no answer comes of it."""
    try:
        yield
    except BaseException:
        following.close()
        raise


def _promise(job_id: str) -> Response:
    """The answer to a request that is worked on in the background."""
    where = f"/api/jobs/{job_id}/result"
    body = {"id": job_id, "object": "job", "state": "open", "result": where}
    return Response(json.dumps(body), status=202, mimetype="application/json", headers={"Location": where})


def _whole(following: Following, asked: GenerationRequest, entries: Iterator[Entry | None]) -> Response:
    """The answer in one piece. What an attempt emitted that was given up is thrown away with it."""
    assert following.kept is not None
    attempt = 0
    body = response_for(asked, following.job_id, following.kept.created)
    for entry in entries:
        if entry is None:
            _check_patience(following)
            continue
        if isinstance(entry.event, End):
            _raise_failure(entry.event, came_back=not following.fresh)
        elif entry.attempt != attempt and not asked.stream:
            attempt = entry.attempt
            body = response_for(asked, following.job_id, following.kept.created)
        body.feed(entry.event)
    headers = _headers(following)
    following.close()
    return Response(json.dumps(body.body(), ensure_ascii=False), mimetype="application/json", headers=headers)


def _check_patience(following: Following) -> None:
    """Raise if the model's load takes longer than a client without a stream is to wait without a word."""
    most = web().services.settings.load_wait
    load = following.standing.load if following.standing else None
    if load and most and time.monotonic() - following.started > most:
        raise ModelLoading.of(load.body())


def _stream(following: Following, chunks: Stream, entries: Iterator[Entry | None]) -> Response:
    """The answer as server-sent events."""
    first: list[Entry | None] = []
    while not first or (first[-1] is None and _holds_headers(following)):
        first.append(next(entries))
    if first[-1] and isinstance(first[-1].event, End):
        _raise_failure(first[-1].event, came_back=not following.fresh)
    words = Words()

    def frame(entry: Entry | None, silent: float) -> bytes:
        if entry is None:
            return words.news(following.standing, silent)
        return _entry_frames(following, entry, chunks.feed(entry.event))

    frames = following.frames(itertools.chain(first[-1:], entries), frame)
    response = Response(frames, headers={**HEADERS, **_headers(following)})
    response.call_on_close(following.close)  # the frames' own end does not run if their first was never asked for
    return response


class Words:
    """What a silent stream's comments have said."""

    def __init__(self) -> None:
        self._last = ""

    def news(self, standing: Standing | None, silent: float) -> bytes:
        """A comment, if it is time for one, or if a load has got on; else nothing."""
        words = str(standing or "waiting")
        new = words != self._last and standing is not None and standing.load is not None
        if not new and silent < KEEPALIVE:
            return b""
        self._last = words
        return comment(words)


def _entry_frames(following: Following, entry: Entry, chunk: str | None) -> bytes:
    """An entry as its event, whose id is the entry's place; nothing for an entry that says nothing to a client."""
    event_id = f"{following.job_id}:{entry.id}"
    if isinstance(entry.event, End) and entry.event.state != JobState.DONE:
        return sse(json.dumps(from_record(entry.event.error or {}).body()), event_id)
    frames = sse(chunk, event_id) if chunk else b""
    return frames + DONE if isinstance(entry.event, End) else frames


def _raise_failure(end: End, *, came_back: bool) -> None:
    """Raise the error that a job has ended with. Who came back for it is not told to do so again."""
    if end.state != JobState.DONE:
        error = from_record(end.error or {})
        raise GenerationFailed(error.message) if came_back and error.retry_after else error


def _headers(following: Following) -> dict[str, str]:
    """The headers that tell about the job."""
    found = {}
    if node := _exposed_node(following):
        found["X-LocalAI-Node"] = web().snapshots.now().node_names.get(node, node)
    if standing := following.standing:
        found["X-LocalAI-Queue-Position"] = str(standing.place)
        if standing.seconds is not None:
            found["X-LocalAI-Expected-Wait"] = str(math.ceil(standing.seconds))
    return found


def _holds_headers(following: Following) -> bool:
    """Whether headers wait on, although there is no event yet."""
    silent = time.monotonic() - following.started
    exposes = web().services.settings.expose_node
    return silent < HOLD or (exposes and silent < HOLD_FOR_NODE and not _exposed_node(following))


def _exposed_node(following: Following) -> str | None:
    """The id of the node that works on the job, if clients are told."""
    process = web()
    if not process.services.settings.expose_node:
        return None
    try:
        live = process.services.leases.live([following.job_id]).get(following.job_id)
    except Unavailable:
        return None  # an answer is worth more than who gave it
    return live.node_id if live else None
