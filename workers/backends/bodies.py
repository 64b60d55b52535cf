"""Turns a request into the OpenAI-shaped body that an engine takes. Pure.

Owns the reading of `OpenAIBody` and of LocalAI's standard fields, and the forced tool call: engines leave `tool_choice`
"required" unenforced, so it becomes a JSON schema here and is read back by `replies`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import backend_pb2
import grpc
from limits import limited
from serving import Refusal

KINDS = ("chat", "completion")

# What a body may not decide: several answers are several requests, every answer is streamed, and chunks read as they do.
DROPPED = ("n", "best_of", "n_cmpl", "stream", "stream_options", "verbose", "response_fields", "id_slot", "model")

TOOL_RULE = "Answer with one call of a function, as JSON with the keys name and arguments. The functions are: "


@dataclass(frozen=True)
class Body:
    """A request as the engine takes it."""

    kind: str  # chat | completion
    fields: dict[str, Any]
    forced_tool: bool = False  # the text will be a JSON object with name and arguments


def read_body(request: backend_pb2.PredictOptions, template_has_tools: bool, context_size: int) -> Body:
    """The body of a request.

    Args:
        request: what the replica sent.
        template_has_tools: whether the model's chat template shows tools by itself.
        context_size: tokens that one request may use.

    Raises:
        Refusal: INVALID_ARGUMENT, with what is wrong.
    """
    kind, fields = _given(request) if request.OpenAIBody else _built(request)
    for name in DROPPED:
        fields.pop(name, None)
    fields = limited(fields, context_size)
    if kind == "completion":
        _check_prompt(fields.get("prompt"))
        return Body(kind, fields)
    if "max_completion_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    if _forces_tool(fields):
        return Body(kind, _with_forced_tool(fields, template_has_tools), forced_tool=True)
    return Body(kind, fields)


def _refuse(message: str) -> Refusal:
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, message)


def _given(request: backend_pb2.PredictOptions) -> tuple[str, dict[str, Any]]:
    if request.OpenAIKind not in KINDS:
        raise _refuse(f"OpenAIKind is {request.OpenAIKind!r}, must be one of: {', '.join(KINDS)}")
    return request.OpenAIKind, _object("OpenAIBody", request.OpenAIBody)


def _object(name: str, text: str) -> dict[str, Any]:
    found = _json(name, text)
    if not isinstance(found, dict):
        raise _refuse(f"{name} must be a JSON object")
    return found


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _refuse(f"{name} is not JSON: {error}") from error


def _check_prompt(prompt: Any) -> None:
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, list) or not prompt or not all(type(item) is int for item in prompt):
        raise _refuse("prompt must be one string or one list of token ids")


def _built(request: backend_pb2.PredictOptions) -> tuple[str, dict[str, Any]]:
    """The body made of LocalAI's standard fields. A frontend sends them all, so a zero that means nothing is unset."""
    chat = bool(request.Messages) and (request.UseTokenizerTemplate or not request.Prompt)
    fields = _sampling(request)
    if chat:
        fields["messages"] = _messages(request)
        fields.update(_chat_fields(request))
    else:
        fields["prompt"] = request.Prompt
        if request.Logprobs > 0 or request.TopLogprobs > 0:
            fields["logprobs"] = max(request.Logprobs, request.TopLogprobs)
    return ("chat" if chat else "completion"), fields


def _sampling(request: backend_pb2.PredictOptions) -> dict[str, Any]:
    fields: dict[str, Any] = {"temperature": request.Temperature}
    positive = {
        "max_tokens": request.Tokens,
        "top_k": request.TopK,
        "top_p": request.TopP,
        "min_p": request.MinP,
        "seed": request.Seed,
        "typical_p": request.TypicalP,
        "repeat_penalty": request.Penalty,
        "repeat_last_n": request.Repeat,
        "mirostat": request.Mirostat,
        "mirostat_eta": request.MirostatETA,
        "mirostat_tau": request.MirostatTAU,
    }
    fields.update({name: value for name, value in positive.items() if value > 0})
    nonzero = {
        "presence_penalty": request.PresencePenalty,
        "frequency_penalty": request.FrequencyPenalty,
        "n_keep": request.NKeep,
        "ignore_eos": request.IgnoreEOS,
        "grammar": request.Grammar,
        "stop": list(request.StopPrompts),
    }
    fields.update({name: value for name, value in nonzero.items() if value})
    if request.LogitBias:
        fields["logit_bias"] = _json("LogitBias", request.LogitBias)
    return fields


def _chat_fields(request: backend_pb2.PredictOptions) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if request.Tools:
        fields["tools"] = _json("Tools", request.Tools)
    if request.ToolChoice:
        given = request.ToolChoice
        fields["tool_choice"] = _json("ToolChoice", given) if given.startswith(("{", '"')) else given
    if request.Logprobs > 0:
        fields.update(logprobs=True, top_logprobs=request.TopLogprobs)
    if "enable_thinking" in request.Metadata:
        fields["chat_template_kwargs"] = {"enable_thinking": request.Metadata["enable_thinking"].lower() == "true"}
    return fields


def _messages(request: backend_pb2.PredictOptions) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for given in request.Messages:
        message: dict[str, Any] = {"role": given.role, "content": given.content}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if value := getattr(given, name):
                message[name] = value
        if given.tool_calls:
            message["tool_calls"] = _json("tool_calls", given.tool_calls)
        messages.append(message)
    if request.Images:
        _show_images(messages, list(request.Images))
    return messages


def _show_images(messages: list[dict[str, Any]], images: list[str]) -> None:
    """Images come beside the messages, as base64; they belong to the last thing that the user said."""
    for message in reversed(messages):
        if message["role"] == "user":
            parts: list[dict[str, Any]] = [{"type": "text", "text": message["content"]}]
            for image in images:
                url = image if image.startswith(("data:", "http")) else f"data:image/jpeg;base64,{image}"
                parts.append({"type": "image_url", "image_url": {"url": url}})
            message["content"] = parts
            return


def _forces_tool(fields: dict[str, Any]) -> bool:
    choice = fields.get("tool_choice")
    return bool(fields.get("tools")) and (choice == "required" or isinstance(choice, dict))


def _with_forced_tool(fields: dict[str, Any], template_has_tools: bool) -> dict[str, Any]:
    """The body that can only be answered by an object with the name and arguments of one of the allowed functions."""
    functions = _allowed_functions(fields["tools"], fields["tool_choice"])
    shapes = [
        {
            "type": "object",
            "properties": {"name": {"const": one["name"]}, "arguments": one.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for one in functions
    ]
    schema = {"name": "call", "schema": shapes[0] if len(shapes) == 1 else {"anyOf": shapes}}
    changed = {**fields, "tool_choice": "none", "response_format": {"type": "json_schema", "json_schema": schema}}
    if not template_has_tools:
        rule = {"role": "system", "content": TOOL_RULE + json.dumps(functions)}
        changed["messages"] = [rule, *(fields.get("messages") or [])]
    return changed


def _allowed_functions(tools: Any, choice: Any) -> list[dict[str, Any]]:
    try:
        functions = [tool["function"] for tool in tools]
        wanted = choice["function"]["name"] if isinstance(choice, dict) else None
        allowed = [one for one in functions if wanted in (None, one["name"])]
    except (TypeError, KeyError) as error:
        raise _refuse("every tool, and a tool_choice that is an object, must name a function") from error
    if not allowed:
        raise _refuse(f"tool_choice names the function {wanted!r}, which is not among the tools")
    return allowed
