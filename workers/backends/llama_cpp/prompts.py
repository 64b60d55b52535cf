"""Makes the prompt of a chat with the model's own template, and says which messages it cannot take.

Owns the reading of messages, and how an answer that was cut is continued.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import grpc
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from serving import LoadFailure, Refusal

ROLES = ("system", "developer", "user", "assistant", "tool")


class Template:
    """A chat template."""

    def __init__(self, text: str, *, first: str, last: str) -> None:
        self.has_tools = "tools" in text
        self.thinks = "enable_thinking" in text or "<think>" in text
        try:
            self._formatter = Jinja2ChatFormatter(template=text, bos_token=first, eos_token=last)
        except Exception as error:
            raise LoadFailure(f"the chat template cannot be read: {error}") from error

    def prompt(self, fields: Mapping[str, Any]) -> str:
        """The prompt of a chat. Of one that ends with a message of the assistant, so that this is continued.

        Raises:
            Refusal: INVALID_ARGUMENT or UNIMPLEMENTED, with what is wrong.
        """
        messages = _messages(fields.get("messages"))
        begun = str(messages.pop()["content"] or "") if messages[-1]["role"] == "assistant" else ""
        arguments = fields.get("chat_template_kwargs") or {}
        if not isinstance(arguments, dict):
            raise _refuse("chat_template_kwargs must be an object")
        tools = fields.get("tools") if self.has_tools else None
        try:
            return self._formatter(**{**arguments, "messages": messages, "tools": tools or None}).prompt + begun
        except Exception as error:
            raise _refuse(f"the model's chat template does not take these messages: {error}") from error


def _refuse(message: str) -> Refusal:
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, message)


def _messages(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise _refuse("messages must be a list with at least one message")
    return [_message(message) for message in given]


def _message(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict) or given.get("role") not in ROLES:
        raise _refuse(f"every message must be an object with a role: {', '.join(ROLES)}")
    content = given.get("content")
    if isinstance(content, list):
        content = "".join(_text(part) for part in content)
    if not isinstance(content, str) and not (content is None and given.get("tool_calls")):
        raise _refuse("every message needs a text as its content")
    message = {**given, "content": content}
    if given.get("tool_calls"):
        message["tool_calls"] = [_call(call) for call in given["tool_calls"]]
    return message


def _text(part: Any) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("text", ""), str):
        raise _refuse("every part of a message must be an object")
    if part.get("type") != "text":
        raise Refusal(
            grpc.StatusCode.UNIMPLEMENTED,
            f"llama-cpp reads text only, and this message has a part of type {part.get('type')!r}",
        )
    return str(part.get("text", ""))


def _call(call: Any) -> Any:
    """A call of a function with its arguments as an object, which is what templates expect."""
    try:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (TypeError, KeyError, ValueError):
        return call
