"""From a checked request to its answer: submits the job, follows its journal, and shapes what the client gets."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator

from flask import Response, request

from api.disconnects import watch
from api.openai.responses import response_for, stream_for
from api.sse import DONE, HEADERS, comment, sse
from api.web import Web, caller, web
from localai_q import names
from localai_q.bus.journal import Entry
from localai_q.cluster.events import Delta, End, Vector
from localai_q.cluster.requests import GenerationRequest
from localai_q.cluster.states import JobState
from localai_q.errors import Cancelled, DeadlineExceeded, LocalAIError, from_record
from localai_q.services import generations, jobs

log = logging.getLogger(__name__)

HOLD = 2.0  # seconds for which headers wait for a first event, so that an early failure has its own status
HOLD_FOR_NODE = 30.0  # the same while a header is to name the node and no node has claimed the job
KEEPALIVE = 10.0  # seconds between comments in a silent stream
LATE = 5.0  # seconds past its deadline at which a job that nobody ends is given up


def answer(asked: GenerationRequest) -> Response:
    """Have the request worked on, and answer it."""
    following = Following(web(), asked)
    try:
        return _stream(following) if asked.stream else _whole(following)
    except BaseException:
        following.close()
        raise


class Following:
    """One accepted job, followed for one client."""

    def __init__(self, process: Web, asked: GenerationRequest) -> None:
        self.asked = asked
        self.job_id = names.new_id()
        self.started = time.monotonic()
        self.created = int(time.time())
        self.gone = False
        self.ended = False
        self._web = process
        self._reader = process.listener.open(self.job_id)
        self._unwatch = watch(request.environ, self._client_gone)
        try:
            self.accepted = generations.submit(
                process.services,
                process.snapshots,
                asked,
                key_id=caller().id,
                job_id=self.job_id,
                watcher=process.listener.watcher,
            )
        except BaseException:
            self.ended = True  # it was not accepted, so there is nothing to cancel
            self.close()
            raise

    def entries(self) -> Iterator[Entry | None]:
        """The journal's entries up to the end; None after each second without one.

        Raises:
            Cancelled: the client has gone.
            DeadlineExceeded: nobody has ended the job in time.
        """
        first = True
        for entry in self._reader.entries():
            if self.gone:
                raise Cancelled
            if entry is None and time.time() > self.accepted.deadline + LATE:
                raise DeadlineExceeded
            if entry and first and isinstance(entry.event, Delta | Vector):
                first = False
                self._web.metrics.first_token.labels(self.asked.model).observe(time.monotonic() - self.started)
            if entry and isinstance(entry.event, End):
                self._note_end(entry.event)
            yield entry

    def close(self) -> None:
        """Stop following; a job that has not ended is cancelled, for nobody waits for it any more."""
        self._unwatch()
        self._reader.close()
        if not self.ended:
            self.ended = True
            try:
                jobs.cancel(self._web.services, self.job_id)
            except LocalAIError as error:
                log.warning("job %s could not be cancelled: %s", self.job_id, error.message)

    def headers(self) -> dict[str, str]:
        """The headers that tell about the job."""
        found = {"X-LocalAI-Job": self.job_id}
        if node := self._exposed_node():
            found["X-LocalAI-Node"] = self._web.snapshots.now().node_names.get(node, node)
        return found

    def holds_headers(self) -> bool:
        """Whether headers wait on, although there is no event yet."""
        silent = time.monotonic() - self.started
        exposes = self._web.services.settings.expose_node
        return silent < HOLD or (exposes and silent < HOLD_FOR_NODE and not self._exposed_node())

    def _exposed_node(self) -> str | None:
        """The id of the node that works on the job, if clients are told."""
        if not self._web.services.settings.expose_node:
            return None
        live = self._web.services.leases.live([self.job_id]).get(self.job_id)
        return live.node_id if live else None

    def _client_gone(self) -> None:
        self.gone = True
        self._reader.wake()

    def _note_end(self, end: End) -> None:
        self.ended = True
        metrics = self._web.metrics
        metrics.duration.labels(self.asked.model).observe(time.monotonic() - self.started)
        metrics.tokens.labels(self.asked.model, "prompt").inc(end.usage.prompt)
        metrics.tokens.labels(self.asked.model, "completion").inc(end.usage.completion)


def _whole(following: Following) -> Response:
    """The answer in one piece. What an attempt emitted that was given up is thrown away with it."""
    attempt = 0
    body = response_for(following.asked, following.job_id, following.created)
    for entry in following.entries():
        if entry is None:
            continue
        if isinstance(entry.event, End):
            _raise_failure(entry.event)
        elif entry.attempt != attempt:
            attempt = entry.attempt
            body = response_for(following.asked, following.job_id, following.created)
        body.feed(entry.event)
    headers = following.headers()
    following.close()
    return Response(json.dumps(body.body(), ensure_ascii=False), mimetype="application/json", headers=headers)


def _stream(following: Following) -> Response:
    """The answer as server-sent events."""
    entries = following.entries()
    first: list[Entry | None] = []
    while not first or (first[-1] is None and following.holds_headers()):
        first.append(next(entries))
    if first[-1] and isinstance(first[-1].event, End):
        _raise_failure(first[-1].event)
    response = Response(_frames(following, first[-1], entries), headers={**HEADERS, **following.headers()})
    response.call_on_close(following.close)  # the frames' own end does not run if their first was never asked for
    return response


def _frames(following: Following, first: Entry | None, rest: Iterator[Entry | None]) -> Iterator[bytes]:
    chunks = stream_for(following.asked, following.job_id, following.created)
    said = time.monotonic() if first else float("-inf")  # whoever waits for a first event is told so at once
    try:
        entry: Entry | None = first
        while True:
            if entry is not None:
                frames = _entry_frames(following, entry, chunks.feed(entry.event))
                if frames:
                    said = time.monotonic()
                    yield frames
                if isinstance(entry.event, End):
                    return
            elif time.monotonic() - said >= KEEPALIVE:
                said = time.monotonic()
                yield comment("waiting")
            entry = next(rest)
    except LocalAIError as error:
        if not isinstance(error, Cancelled):
            yield sse(json.dumps(error.body()))
    finally:
        following.close()


def _entry_frames(following: Following, entry: Entry, chunks: list[str]) -> bytes:
    """One entry's events. Only the last carries the id, which stands for the whole entry."""
    if isinstance(entry.event, End) and entry.event.state != JobState.DONE:
        return sse(json.dumps(from_record(entry.event.error or {}).body()))
    frames = b"".join(sse(chunk) for chunk in chunks[:-1])
    if chunks:
        frames += sse(chunks[-1], f"{following.job_id}:{entry.id}")
    return frames + DONE if isinstance(entry.event, End) else frames


def _raise_failure(end: End) -> None:
    if end.state != JobState.DONE:
        raise from_record(end.error or {})
