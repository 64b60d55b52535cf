"""Turns an engine's chunks into replies. Owns the counting, the finish reason and the meaning of engine errors; pure.

An engine splits no character between chunks, and one chunk may stand for several tokens: counts are the engine's own.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

import backend_pb2
import grpc
from serving import Refusal

FINISH_REASONS = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "function_call": "tool_calls"}


def refusal(error: dict[str, Any]) -> Refusal:
    """The status of an error that the engine reports as `{"code", "message", "type"}`."""
    message = str(error.get("message") or "the engine failed without a reason")
    kind = error.get("type")
    if kind == "exceed_context_size_error" or "is too large to process" in message:
        return Refusal(grpc.StatusCode.OUT_OF_RANGE, message)
    if kind == "not_supported_error":
        return Refusal(grpc.StatusCode.UNIMPLEMENTED, message)
    if error.get("code") == 400:
        return Refusal(grpc.StatusCode.INVALID_ARGUMENT, message)
    return Refusal(grpc.StatusCode.INTERNAL, message)


class Replies:
    """The replies to one request. Feed it every chunk in order; `last` ends it."""

    def __init__(self, kind: str, forced_tool: bool = False) -> None:
        self._chat = kind == "chat"
        self._forced_tool = forced_tool
        self._text = ""
        self._reason = ""
        self._tokens = 0
        self._prompt = 0
        self._cached = 0
        self._prompt_ms = 0.0
        self._answer_ms = 0.0

    @property
    def finished(self) -> bool:
        """Whether the engine gave a finish reason, or nothing more is wanted of it."""
        return bool(self._reason)

    def reply(self, chunk: dict[str, Any]) -> backend_pb2.Reply | None:
        """The reply to one chunk; None when it holds nothing to send.

        Raises:
            Refusal: the chunk is an error.
        """
        if "error" in chunk:
            raise refusal(chunk["error"])
        self._count(chunk)
        choices = chunk.get("choices")
        if not choices:
            return None
        choice = choices[0]
        if reason := choice.get("finish_reason"):
            self._reason = self._reason or FINISH_REASONS.get(reason, "stop")
        if self._forced_tool:
            return self._collect(choice["delta"].get("content") or "")
        return self._piece(choice)

    def last(self) -> backend_pb2.Reply:
        """The reply that ends the answer.

        Raises:
            Refusal: INTERNAL, the engine ended without a finish reason.
        """
        if not self._reason:
            raise Refusal(grpc.StatusCode.INTERNAL, "the engine ended the answer without a reason")
        return backend_pb2.Reply(
            finish_reason=self._reason,
            tokens=self._tokens,
            prompt_tokens=self._prompt,
            cached_tokens=self._cached,
            timing_prompt_processing=self._prompt_ms,
            timing_token_generation=self._answer_ms,
        )

    def _count(self, chunk: dict[str, Any]) -> None:
        if timings := chunk.get("timings"):
            self._tokens = timings["predicted_n"]
            self._cached = timings["cache_n"]
            self._prompt = timings["prompt_n"] + self._cached
            self._prompt_ms = timings["prompt_ms"]
            self._answer_ms = timings["predicted_ms"]
        if usage := chunk.get("usage"):
            self._tokens = usage["completion_tokens"]
            self._prompt = usage["prompt_tokens"]

    def _piece(self, choice: dict[str, Any]) -> backend_pb2.Reply | None:
        delta = choice.get("delta") or {}
        text = (delta.get("content") if self._chat else choice.get("text")) or ""
        reasoning = delta.get("reasoning_content") or ""
        calls = delta.get("tool_calls")
        logprobs = (choice.get("logprobs") or {}).get("content")
        if not (text or reasoning or calls or logprobs):
            return None
        reply = backend_pb2.Reply(message=text.encode("utf-8", "replace"), tokens=self._tokens)
        if self._chat:
            reply.chat_deltas.add(
                content=text, reasoning_content=reasoning, tool_calls=[_tool_delta(call) for call in calls or ()]
            )
        if logprobs:
            reply.logprobs = json.dumps({"content": logprobs}, ensure_ascii=False).encode("utf-8", "replace")
        return reply

    def _collect(self, text: str) -> backend_pb2.Reply | None:
        """The one call, once its JSON is whole: a model may go on with white space until its limit."""
        if self._reason == "tool_calls":
            return None
        self._text += text
        if not self._text.rstrip().endswith("}"):
            return None
        try:
            call = json.loads(self._text)
        except ValueError:
            return None
        self._reason = "tool_calls"
        delta = backend_pb2.ToolCallDelta(
            index=0, id=f"call_{secrets.token_hex(12)}", name=call["name"], arguments=json.dumps(call["arguments"])
        )
        return backend_pb2.Reply(tokens=self._tokens, chat_deltas=[backend_pb2.ChatDelta(tool_calls=[delta])])


def whole(pieces: list[backend_pb2.Reply]) -> backend_pb2.Reply:
    """All replies to a request as one."""
    reply = backend_pb2.Reply()
    reply.CopyFrom(pieces[-1])
    reply.message = b"".join(piece.message for piece in pieces)
    logprobs = [item for piece in pieces if piece.logprobs for item in json.loads(piece.logprobs)["content"]]
    if logprobs:
        reply.logprobs = json.dumps({"content": logprobs}, ensure_ascii=False).encode()
    deltas = [delta for piece in pieces for delta in piece.chat_deltas]
    if deltas:
        reply.chat_deltas.add(
            content="".join(delta.content for delta in deltas),
            reasoning_content="".join(delta.reasoning_content for delta in deltas),
            tool_calls=_joined_calls(deltas),
        )
    return reply


def _joined_calls(deltas: list[backend_pb2.ChatDelta]) -> list[backend_pb2.ToolCallDelta]:
    calls: dict[int, backend_pb2.ToolCallDelta] = {}
    for delta in deltas:
        for part in delta.tool_calls:
            call = calls.setdefault(part.index, backend_pb2.ToolCallDelta(index=part.index))
            call.id = call.id or part.id
            call.name += part.name
            call.arguments += part.arguments
    return list(calls.values())


def _tool_delta(call: dict[str, Any]) -> backend_pb2.ToolCallDelta:
    function = call.get("function") or {}
    return backend_pb2.ToolCallDelta(
        index=call.get("index", 0),
        id=call.get("id") or "",
        name=function.get("name") or "",
        arguments=function.get("arguments") or "",
    )
