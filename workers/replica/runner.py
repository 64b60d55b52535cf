"""One job on this replica: claim it, have the backend do it, write what comes, end it. Owns the road of a job here."""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import replace
from functools import partial
from typing import Any

import grpc

from localai_q import names
from localai_q.bus.doorbells import Doorbells
from localai_q.bus.leases import Refusal
from localai_q.cluster.events import Delta, End, Finish, Usage, Vector
from localai_q.cluster.jobs import DEATHS
from localai_q.cluster.recovery import Said, continued, exhausted, said_so_far
from localai_q.cluster.requests import GenerationRequest
from localai_q.cluster.states import JobState
from localai_q.errors import (
    Cancelled,
    ContextTooLong,
    DeadlineExceeded,
    GenerationFailed,
    InvalidValue,
    LocalAIError,
    UnsupportedByModel,
    to_record,
)
from workers.claims import Claims, Held, journal_full
from workers.replica.backend import Backend
from workers.replica.options import embedding_options, predict_options
from workers.replica.pace import Pace

log = logging.getLogger(__name__)

DYING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # what calls of a backend end with that ends
LAST_TAKEN = 0.25  # seconds after which a worker that must end takes no doorbell any more, so that others get it
LAST_WORDS = 1.0  # seconds in which the end of a backend is noticed after its connection broke

REFUSALS: dict[grpc.StatusCode, type[LocalAIError]] = {
    grpc.StatusCode.OUT_OF_RANGE: ContextTooLong,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidValue,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedByModel,
}


class Lost(Exception):
    """The work must stop without an end of ours: the lease is lost, or the job goes back into its line."""


class Runner:
    """Runs jobs on one backend."""

    def __init__(self, claims: Claims, backend: Backend, doorbells: Doorbells, *, identity: str, line: str) -> None:
        self._claims = claims
        self._doorbells = doorbells
        self._backend = backend
        self._identity = identity
        self._line = line
        self._pace = Pace()
        self.draining = False

    def run(self, job_id: str) -> None:
        """Do the job, if it is to be had."""
        if self._backend.dead.is_set() or self.draining:
            self._leave_to_others(job_id)
            return
        held = self._claims.claim(job_id, self._line)
        if isinstance(held, Refusal):
            log.info("job %s is not to be had: %s", job_id, held.why)
            if held.why == "newer":  # this replica is about to be stopped, for its model was changed
                self._leave_to_others(job_id)
            return
        started = time.time()
        timer = _deadline_timer(held)
        try:
            usage, timings = self._do(held)
            held.finish(End(state=JobState.DONE, usage=usage, timings={**timings, "total": time.time() - started}))
        except Lost:
            self._claims.drop(held)
        except Cancelled:
            held.finish(replace(held.asked(), timings={"total": time.time() - started}))
        except LocalAIError as error:
            held.finish(End(state=JobState.FAILED, error=to_record(error), timings={"total": time.time() - started}))
        except Exception as error:
            log.exception("job %s failed", job_id)
            held.finish(End(state=JobState.FAILED, error=to_record(GenerationFailed(f"The replica failed: {error!r}"))))
        finally:
            if timer:
                timer.cancel()

    def figures(self) -> dict[str, float]:
        """What the node reports of this replica: `in_flight` jobs, and `tokens_per_second` of one answer."""
        return {"in_flight": self._claims.count(), "tokens_per_second": self._pace.tokens_per_second}

    def give_back_all(self) -> None:
        """Give every running job back to its line, because this process must end."""
        self._claims.cancel_all("drain")

    def _do(self, held: Held) -> tuple[Usage, dict[str, float]]:
        lease = held.lease
        if lease.deaths >= DEATHS:
            raise GenerationFailed(
                f"{lease.deaths} replicas died while they worked on this request; it is not tried again."
            )
        request = GenerationRequest.from_json(lease.request)
        if request.kind == "embedding":
            return self._embed(held, request)
        shown = said_so_far(held.emitted()) if lease.stream else {}
        usage, timings = Usage(), {"prompt": 0.0, "generation": 0.0}
        counted: set[int] = set()  # prompts; that of several choices is counted once, as OpenAI does
        for choice, body in enumerate(request.bodies()):
            used, times = self._choose(held, request.kind, choice, body, shown.get(choice, Said()))
            prompt = choice // request.n
            usage += replace(used, prompt=0, cached=0) if prompt in counted else used
            if used.prompt:
                counted.add(prompt)
            timings = {name: timings[name] + times[name] for name in timings}
        return usage, timings

    def _choose(
        self, held: Held, kind: str, choice: int, body: dict[str, Any], said: Said
    ) -> tuple[Usage, dict[str, float]]:
        """One choice; what an earlier attempt has shown of it is neither lost nor said again."""
        if said == Said():
            return self._generate(held, kind, choice, body)
        before = Usage(completion=said.tokens)
        if said.finished or exhausted(body, said):
            if not said.finished:
                held.emit(Finish(choice=choice, reason="length"))
            return before, _times(None)
        used, times = self._generate(held, kind, choice, continued(kind, body, said))
        return replace(used, prompt=max(used.prompt - said.tokens, 0)) + before, times

    def _generate(self, held: Held, kind: str, choice: int, body: dict[str, Any]) -> tuple[Usage, dict[str, float]]:
        options = predict_options(self._identity, kind, body, held.lease.job_id)
        call = self._backend.stream(options)
        held.on_cancel(partial(self._backend.cancel, call))
        seen, last = 0, None
        try:
            for reply in call:
                event = _delta(reply, choice, seen)
                if event:
                    held.emit(event)
                seen, last = max(seen, reply.tokens), reply
        except grpc.RpcError as error:
            raise self._why(held, error) from error
        self._check(held)
        held.emit(Finish(choice=choice, reason=(last.finish_reason if last is not None else "") or "stop"))
        times = _times(last)
        self._pace.note(seen, times["generation"])
        return _usage(last, seen), times

    def _embed(self, held: Held, request: GenerationRequest) -> tuple[Usage, dict[str, float]]:
        used = 0
        for index, body in enumerate(request.bodies()):
            call = self._backend.embed(embedding_options(self._identity, body["input"], held.lease.job_id))
            held.on_cancel(partial(self._backend.cancel, call))
            try:
                result = call.result()
            except grpc.RpcError as error:
                raise self._why(held, error) from error
            except grpc.FutureCancelledError as error:
                self._check(held)
                raise GenerationFailed("The backend cancelled the request.") from error
            self._check(held)
            held.emit(Vector(index=index, values=tuple(result.embeddings)))
            used += result.prompt_tokens or result.tokens
        return Usage(prompt=used), {}

    def _check(self, held: Held) -> None:
        """Raise if the job must not go on."""
        if not held.cancelled.is_set():
            return
        match held.why:
            case "cancelled":
                raise Cancelled
            case "late":
                raise DeadlineExceeded
            case "journal":
                raise journal_full()
            case "drain":
                self._give_back(held, died=False)
        raise Lost

    def _give_back(self, held: Held, *, died: bool) -> None:
        """Put the job back into its line, and ring for whoever serves it besides this replica."""
        held.release(died=died)
        self._ring(held.lease.job_id)

    def _leave_to_others(self, job_id: str) -> None:
        time.sleep(LAST_TAKEN)
        self._ring(job_id)

    def _ring(self, job_id: str) -> None:
        try:
            self._doorbells.ring(names.RUN_GENERATION, job_id, queue=self._line)
        except LocalAIError as error:
            log.warning("nobody could be told of job %s, control will: %s", job_id, error.message)

    def _why(self, held: Held, error: grpc.RpcError) -> Exception:
        """What a failed call means for the job."""
        try:
            self._check(held)
        except (LocalAIError, Lost) as reason:
            return reason
        code, words = error.code(), error.details() or ""
        if code in REFUSALS:
            return REFUSALS[code](words)
        if code in DYING and self._backend.dead.wait(LAST_WORDS):
            return self._of_death(held)
        return GenerationFailed(f"The backend failed: {words or code.name}")

    def _of_death(self, held: Held) -> Exception:
        """Another replica goes on, unless this is the second that dies of the job."""
        if self._backend.was_stuck:
            self._give_back(held, died=False)
            return Lost()
        if held.lease.deaths + 1 >= DEATHS:
            return GenerationFailed(f"The backend died: {self._backend.death}")
        self._give_back(held, died=True)
        return Lost()


def _deadline_timer(held: Held) -> threading.Timer | None:
    if held.lease.left is None:
        return None
    timer = threading.Timer(held.lease.left, held.cancel, ("late",))
    timer.daemon = True
    timer.start()
    return timer


def _delta(reply: Any, choice: int, seen: int) -> Delta | None:
    text, reasoning = reply.message.decode("utf-8", "replace"), ""
    tools: list[dict[str, Any]] = []
    for piece in reply.chat_deltas:
        reasoning += piece.reasoning_content
        tools += [_tool_call(call) for call in piece.tool_calls]
    if not text:
        text = "".join(piece.content for piece in reply.chat_deltas)
    logprobs = tuple(json.loads(reply.logprobs).get("content") or ()) if reply.logprobs else ()
    if not (text or reasoning or tools or logprobs):
        return None
    return Delta(choice=choice, text=text, reasoning=reasoning, tool_calls=tuple(tools), logprobs=logprobs,
                 tokens=max(reply.tokens - seen, 0))  # fmt: skip


def _tool_call(call: Any) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": call.arguments}
    made: dict[str, Any] = {"index": call.index, "function": function}
    if call.id:
        made |= {"id": call.id, "type": "function"}
    if call.name:
        function["name"] = call.name
    return made


def _usage(last: Any, seen: int) -> Usage:
    if last is None:
        return Usage()
    return Usage(prompt=last.prompt_tokens, completion=seen, cached=last.cached_tokens)


def _times(last: Any) -> dict[str, float]:
    """Seconds that the engine spent on the prompt and on the answer."""
    if last is None:
        return {"prompt": 0.0, "generation": 0.0}
    return {"prompt": last.timing_prompt_processing / 1000, "generation": last.timing_token_generation / 1000}
