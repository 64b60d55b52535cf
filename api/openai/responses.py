"""What clients get back: the events of a job as OpenAI's objects, whole or as the chunks of a stream.

It owns the shapes of answers. It leaves frames to `api.sse`, and errors, keep-alives, the end of a failed job and
everything about waiting to the endpoints: an `End` that is no success adds nothing here. Chunks are JSON texts, not
dicts: one is made per token and stream.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii
from typing import Any, Protocol

from localai_q.cluster.events import Delta, End, Event, Finish, Usage, Vector
from localai_q.cluster.requests import GenerationRequest

JSON = dict[str, Any]


class Stream(Protocol):
    """Turns the events of one job, in order and from the first, into the chunks of its stream, one for each."""

    def feed(self, event: Event) -> str | None:
        """The JSON text to send for this event: one for one; None where it says nothing to a client."""

    def skip(self) -> bool:
        """Go on behind chunks that were sent before, without their events; False if those must be fed first."""


class Response(Protocol):
    """Gathers the events of one job, in order, into its answer."""

    def feed(self, event: Event) -> None:
        """Take in one event."""

    def body(self) -> JSON:
        """The answer as of now; complete after the job's `End`."""


def stream_for(request: GenerationRequest, job_id: str, created: int) -> Stream:
    """The stream of a chat or a completion; `created` in seconds since 1970.

    Raises:
        ValueError: embeddings have no stream.
    """
    kinds: dict[str, Callable[[GenerationRequest, str, int], Stream]] = {
        "chat": ChatStream,
        "completion": CompletionStream,
    }
    if request.kind not in kinds:
        raise ValueError(f"a request of kind {request.kind} has no stream")
    return kinds[request.kind](request, job_id, created)


def response_for(request: GenerationRequest, job_id: str, created: int) -> Response:
    """The whole answer to a request of any kind; `created` in seconds since 1970."""
    kinds: dict[str, Callable[[GenerationRequest, str, int], Response]] = {
        "chat": ChatResponse,
        "completion": CompletionResponse,
        "embedding": EmbeddingResponse,
    }
    return kinds[request.kind](request, job_id, created)


def usage_body(usage: Usage) -> JSON:
    """OpenAI's `usage` of a generation."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


# --- streams --------------------------------------------------------------------------------------------------------


class ChatStream:
    """The `chat.completion.chunk`s of a chat."""

    def __init__(self, request: GenerationRequest, job_id: str, created: int) -> None:
        self._request = request
        head = {"id": f"chatcmpl-{job_id}", "object": "chat.completion.chunk", "created": created}
        self._frame = _Frame({**head, "model": request.model}, usage=request.include_usage)
        self._text = [
            self._frame.template({"index": index, "delta": {"content": _HOLE}, "logprobs": None, "finish_reason": None})
            for index in range(request.count)
        ]
        self._begun = [False] * request.count

    def feed(self, event: Event) -> str | None:
        """The JSON text to send for this event."""
        match event:
            case Delta():
                return self._delta(event)
            case Finish():
                delta = self._begin(event.choice)
                return self._frame.chunk(
                    {"index": event.choice, "delta": delta, "logprobs": None, "finish_reason": event.reason}
                )
            case End():
                return self._frame.end(event)
            case _:
                return None

    def skip(self) -> bool:
        """With one choice, what was sent has begun it."""
        self._begun = [len(self._begun) == 1] * len(self._begun)
        return self._begun == [True]

    def _delta(self, event: Delta) -> str | None:
        if self._begun[event.choice] and not (event.reasoning or event.tool_calls or event.logprobs):
            before, after = self._text[event.choice]
            return before + encode_basestring_ascii(event.text) + after if event.text else None
        delta = _said(event)
        if not delta and not event.logprobs:
            return None
        choice = {
            "index": event.choice,
            "delta": {**self._begin(event.choice, text=not event.tool_calls), **delta},
            "logprobs": _chat_logprobs(event.logprobs, self._request.logprobs),
            "finish_reason": None,
        }
        return self._frame.chunk(choice)

    def _begin(self, index: int, *, text: bool = True) -> JSON:
        """What the first chunk of a choice says besides: whose words follow."""
        if self._begun[index]:
            return {}
        self._begun[index] = True
        return {"role": "assistant", "content": "" if text else None}


class CompletionStream:
    """The chunks of a text completion, which have the shape of its answer."""

    def __init__(self, request: GenerationRequest, job_id: str, created: int) -> None:
        self._request = request
        head = {"id": f"cmpl-{job_id}", "object": "text_completion", "created": created, "model": request.model}
        self._frame = _Frame(head, usage=request.include_usage)
        self._text = [self._frame.template(_completion_choice(index, _HOLE)) for index in range(request.count)]
        self._begun = [False] * request.count
        self._length = [0] * request.count  # characters sent, where the next token's `text_offset` begins

    def feed(self, event: Event) -> str | None:
        """The JSON text to send for this event."""
        match event:
            case Delta():
                return self._delta(event)
            case Finish():
                prompt = self._begin(event.choice)
                return self._frame.chunk(_completion_choice(event.choice, prompt, reason=event.reason))
            case End():
                return self._frame.end(event)
            case _:
                return None

    def skip(self) -> bool:
        """With one choice, what was sent has begun it; how long it is matters to log probabilities only."""
        self._begun = [len(self._begun) == 1 and self._request.logprobs is None] * len(self._begun)
        return self._begun == [True]

    def _delta(self, event: Delta) -> str | None:
        text = self._begin(event.choice) + event.text
        start = self._length[event.choice]
        self._length[event.choice] += len(text)
        if event.logprobs:
            logprobs = _legacy_logprobs(event.logprobs, self._request.logprobs, start)
            return self._frame.chunk(_completion_choice(event.choice, text, logprobs))
        before, after = self._text[event.choice]
        return before + encode_basestring_ascii(text) + after if text else None

    def _begin(self, index: int) -> str:
        """What stands before the text of a choice."""
        if self._begun[index]:
            return ""
        self._begun[index] = True
        return _echoed(self._request, index)


_HOLE = "\0hole\0"


class _Frame:
    """What is the same in all chunks of a stream, written once."""

    def __init__(self, head: JSON, *, usage: bool) -> None:
        self._usage = usage
        self._before = _dumps(head)[:-1] + ',"choices":['
        self._after = '],"usage":null}' if usage else "]}"

    def template(self, choice: JSON) -> tuple[str, str]:
        """A chunk in two halves, to be joined around the JSON string that stands for `_HOLE`."""
        before, after = self.chunk(choice).split(_dumps(_HOLE))
        return before, after

    def chunk(self, choice: JSON) -> str:
        return self._before + _dumps(choice) + self._after

    def end(self, event: End) -> str | None:
        """The last chunk of a stream that succeeded, when usage was asked for."""
        if not self._usage or event.state != "done":
            return None
        return self._before + '],"usage":' + _dumps(usage_body(event.usage)) + "}"


# --- whole answers --------------------------------------------------------------------------------------------------


@dataclass
class _Choice:
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: dict[int, JSON] = field(default_factory=dict)
    logprobs: list[JSON] = field(default_factory=list)
    reason: str = "stop"


class _Gathering:
    """The part of an answer that chats and completions share: events folded by choice."""

    def __init__(self, request: GenerationRequest, job_id: str, created: int) -> None:
        self._request, self._job_id, self._created = request, job_id, created
        self._choices = [_Choice() for _ in range(request.count)]
        self._usage = Usage()

    def feed(self, event: Event) -> None:
        """Take in one event."""
        match event:
            case Delta():
                choice = self._choices[event.choice]
                choice.text.append(event.text)
                choice.reasoning.append(event.reasoning)
                choice.logprobs.extend(event.logprobs)
                for call in event.tool_calls:
                    _merge_call(choice.tool_calls, call)
            case Finish():
                self._choices[event.choice].reason = event.reason
            case End():
                self._usage = event.usage

    def _body(self, prefix: str, kind: str, choices: Iterable[JSON]) -> JSON:
        return {
            "id": f"{prefix}-{self._job_id}",
            "object": kind,
            "created": self._created,
            "model": self._request.model,
            "choices": list(choices),
            "usage": usage_body(self._usage),
        }


class ChatResponse(_Gathering):
    """The `chat.completion` of a chat."""

    def body(self) -> JSON:
        """The answer as of now."""
        choices = (self._choice(index, choice) for index, choice in enumerate(self._choices))
        return self._body("chatcmpl", "chat.completion", choices)

    def _choice(self, index: int, choice: _Choice) -> JSON:
        text, reasoning = "".join(choice.text), "".join(choice.reasoning)
        message: JSON = {"role": "assistant", "content": text or (None if choice.tool_calls else ""), "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if choice.tool_calls:
            message["tool_calls"] = [call for _, call in sorted(choice.tool_calls.items())]
        logprobs = _chat_logprobs(choice.logprobs, self._request.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}


class CompletionResponse(_Gathering):
    """The `text_completion` of a completion."""

    def body(self) -> JSON:
        """The answer as of now."""
        choices = (self._choice(index, choice) for index, choice in enumerate(self._choices))
        return self._body("cmpl", "text_completion", choices)

    def _choice(self, index: int, choice: _Choice) -> JSON:
        prompt = _echoed(self._request, index)
        logprobs = _legacy_logprobs(choice.logprobs, self._request.logprobs, len(prompt))
        return _completion_choice(index, prompt + "".join(choice.text), logprobs, choice.reason)


class EmbeddingResponse:
    """The `list` of embeddings."""

    def __init__(self, request: GenerationRequest, job_id: str, created: int) -> None:
        self._request = request
        self._vectors: dict[int, tuple[float, ...]] = {}
        self._usage = Usage()

    def feed(self, event: Event) -> None:
        """Take in one event."""
        match event:
            case Vector():
                self._vectors[event.index] = event.values
            case End():
                self._usage = event.usage

    def body(self) -> JSON:
        """The answer as of now."""
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": self._encoded(values)}
                for index, values in sorted(self._vectors.items())
            ],
            "model": self._request.model,
            "usage": {"prompt_tokens": self._usage.prompt, "total_tokens": self._usage.prompt},
        }

    def _encoded(self, values: tuple[float, ...]) -> str | list[float]:
        if self._request.encoding_format == "base64":
            return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode("ascii")
        return list(values)


# --- pieces ---------------------------------------------------------------------------------------------------------


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _said(event: Delta) -> JSON:
    delta: JSON = {}
    if event.reasoning:
        delta["reasoning_content"] = event.reasoning
    if event.text:
        delta["content"] = event.text
    if event.tool_calls:
        delta["tool_calls"] = list(event.tool_calls)
    return delta


def _merge_call(calls: dict[int, JSON], piece: JSON) -> None:
    """Add one piece of a streamed tool call to what came before it; OpenAI numbers the calls by `index`."""
    call = calls.setdefault(
        piece.get("index", 0), {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
    )
    call["id"] = call["id"] or piece.get("id") or ""
    function = piece.get("function") or {}
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""


def _completion_choice(index: int, text: str, logprobs: JSON | None = None, reason: str | None = None) -> JSON:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _echoed(request: GenerationRequest, choice: int) -> str:
    """The prompt that stands before the text of a choice; empty unless asked for."""
    prompt = request.prompt_of(choice) if request.echo else ""
    return prompt if isinstance(prompt, str) else ""


def _chat_logprobs(items: Iterable[JSON], alternatives: int | None) -> JSON | None:
    """OpenAI's `logprobs`, with as many alternatives as were asked for: the engine gives one at least."""
    content = [] if alternatives is None else [_token(item, alternatives) for item in items]
    return {"content": content, "refusal": None} if content else None


def _token(item: JSON, alternatives: int) -> JSON:
    top = [{name: other[name] for name in ("token", "logprob", "bytes")} for other in _top(item, alternatives)]
    return {"token": item["token"], "logprob": item["logprob"], "bytes": item.get("bytes"), "top_logprobs": top}


def _top(item: JSON, alternatives: int) -> list[JSON]:
    return [{"bytes": None, **other} for other in item.get("top_logprobs", ())[:alternatives]]


def _legacy_logprobs(items: Iterable[JSON], alternatives: int | None, start: int) -> JSON | None:
    """The `logprobs` of completions; `start` is where the first token's text begins, in characters."""
    items = list(items)
    if alternatives is None or not items:
        return None
    offsets, offset = [], start
    for item in items:
        offsets.append(offset)
        offset += len(item["token"])
    return {
        "tokens": [item["token"] for item in items],
        "token_logprobs": [item["logprob"] for item in items],
        "top_logprobs": [_alternatives(item, alternatives) for item in items] if alternatives else None,
        "text_offset": offsets,
    }


def _alternatives(item: JSON, alternatives: int) -> dict[str, float]:
    """The likeliest tokens, and the one that was sampled even when it is none of them."""
    top = {other["token"]: other["logprob"] for other in _top(item, alternatives)}
    return {**top, item["token"]: item["logprob"]}
