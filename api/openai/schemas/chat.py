"""The body of a chat: its fields, what contradicts what, and the request that it makes.

It owns the fields that only chats have and whatever takes two fields to judge. It leaves single messages, tools and
formats to the modules of these names, and to the models' backends what only they can know: the length of a context.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from api.openai.schemas.complaints import unsupported, wrong_value
from api.openai.schemas.fields import at_most, only
from api.openai.schemas.formats import ResponseFormat, SchemaFormat
from api.openai.schemas.messages import ChatMessage
from api.openai.schemas.sampling import Generation
from api.openai.schemas.tools import NamedChoice, ToolChoice, Tools
from localai_q.cluster.requests import GenerationRequest, Kind
from localai_q.cluster.sampling import Positive


def check_tier(tier: str) -> str:
    if tier not in ("auto", "default"):
        raise unsupported(f"'{tier}' is not served by this cluster: there is one tier; leave it out.")
    return tier


ServiceTier = Annotated[Literal["auto", "default", "flex", "scale", "priority", "fast"], AfterValidator(check_tier)]
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    at_most(16),
]
Modalities = Annotated[list[str], Field(fail_fast=True), only(["text"], "answers are text; leave it out")]
Verbosity = Annotated[
    Literal["low", "medium", "high"],
    only("medium", "local models have no such setting; leave it out and say it in a message"),
]


class ChatCompletionRequest(Generation):
    """The body of `POST /v1/chat/completions`."""

    kind: ClassVar[Kind] = "chat"

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: Positive | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None

    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_format: Literal["none", "auto", "deepseek", "deepseek-legacy"] | None = None

    metadata: Metadata | None = None
    store: Annotated[bool, only(False, "answers are not stored; leave it out")] | None = None
    service_tier: ServiceTier | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    modalities: Modalities | None = None
    verbosity: Verbosity | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for name, message in self._contradictions():
            raise wrong_value(message, at=name)
        if self.logprobs and self.tools:
            raise unsupported(
                "'logprobs' together with 'tools' is not served by this cluster; leave one of them out.", at="logprobs"
            )
        return self

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            yield (
                "max_tokens",
                "'max_tokens' and 'max_completion_tokens' are two names of one limit; send only 'max_completion_tokens'.",
            )
        if self.top_logprobs is not None and not self.logprobs:
            yield "top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true."
        yield from self._tool_contradictions()
        if self.grammar is not None and self._format():
            yield "grammar", "'grammar' and a JSON 'response_format' exclude each other; send one of them."
        kwargs = self.chat_template_kwargs or {}
        if not isinstance(kwargs.get("enable_thinking", True), bool):
            yield "chat_template_kwargs", "Invalid 'chat_template_kwargs.enable_thinking': it must be true or false."
        for name in self._template_arguments().keys() & kwargs.keys():
            yield (
                "reasoning_effort",
                f"'reasoning_effort' sets 'chat_template_kwargs.{name}', which is given too; send one of them.",
            )

    def _tool_contradictions(self) -> Iterator[tuple[str, str]]:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            yield "tools", "Invalid 'tools': two functions have the same name. Give each its own."
        if self.tools and self.grammar is not None and self.tool_choice != "none":
            yield "grammar", "'grammar' and 'tools' exclude each other; send one of them, or 'tool_choice': 'none'."
        if not self.tools and (isinstance(self.tool_choice, NamedChoice) or self.tool_choice == "required"):
            yield "tool_choice", "Invalid value for 'tool_choice': it is only allowed when 'tools' are specified."
        elif isinstance(self.tool_choice, NamedChoice) and self.tool_choice.function.name not in names:
            yield (
                "tool_choice.function.name",
                f"Tool choice '{self.tool_choice.function.name}' not found in 'tools' parameter.",
            )

    def _template_arguments(self) -> dict[str, Any]:
        """What `reasoning_effort` means to a chat template: llama.cpp hands these names to it."""
        if self.reasoning_effort is None:
            return {}
        return (
            {"enable_thinking": False}
            if self.reasoning_effort == "none"
            else {"reasoning_effort": self.reasoning_effort}
        )

    def request(self) -> GenerationRequest:
        """The request that this body makes."""
        body = self.sampling(
            "messages", "logprobs", "top_logprobs", "max_completion_tokens", "reasoning_effort", "response_format",
            "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs",
        )  # fmt: skip
        body["messages"] = [message.for_engine() for message in self.messages]
        if self.max_completion_tokens is not None:
            body["max_tokens"] = self.max_completion_tokens
        if kwargs := {**(self.chat_template_kwargs or {}), **self._template_arguments()}:
            body["chat_template_kwargs"] = kwargs
        if self.logprobs:
            # The engine gives none at all for 0, and 20 when the number is left out.
            body |= {"logprobs": True, "top_logprobs": max(1, self.top_logprobs or 0)}
        body |= {**self._format(), **self._tools()}
        alternatives = (self.top_logprobs or 0) if self.logprobs else None
        return GenerationRequest(kind="chat", body=body, logprobs=alternatives, **self.envelope())

    def _format(self) -> dict[str, Any]:
        if isinstance(self.response_format, SchemaFormat):
            asked = self.response_format.json_schema
            schema = {"name": asked.name, "schema": asked.schema_ or {}}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        if self.response_format is not None and self.response_format.type == "json_object":
            return {"response_format": {"type": "json_object"}}
        return {}

    def _tools(self) -> dict[str, Any]:
        if not self.tools:
            return {}
        tools, choice = self.tools, self.tool_choice
        if isinstance(choice, NamedChoice):
            # Engines know the three words only; "must call" of one single tool says the same.
            tools, choice = [tool for tool in tools if tool.function.name == choice.function.name], "required"
        body: dict[str, Any] = {"tools": [tool.for_engine() for tool in tools]}
        if choice is not None:
            body["tool_choice"] = choice
        if self.parallel_tool_calls is not None:
            body["parallel_tool_calls"] = self.parallel_tool_calls
        return body
