"""The tools of a chat: which functions may be called, which one must be, and which ones were.

It owns the forms of `tools`, `tool_choice` and an assistant's `tool_calls`. Whether a choice fits the tools beside it
is the affair of `chat`, which sees both.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from api.openai.schemas.complaints import TAG, not_among, unsupported, wrong_type
from api.openai.schemas.fields import FunctionName, Strict, list_or_str

MAX_TOOLS = 128

_CHOICES = ("none", "auto", "required")


def check_tool_type(tool: Any) -> Any:
    """Refuse OpenAI's custom tools by name."""
    if isinstance(tool, dict) and tool.get("type") == "custom":
        raise unsupported("Custom tools are not served by this cluster; use a tool of type 'function'.", at="type")
    return tool


class Function(Strict):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def for_engine(self) -> dict[str, Any]:
        # OpenAI: without parameters, a function takes none.
        return {"parameters": {"type": "object", "properties": {}}, **self.given()}


class Tool(Strict):
    type: Literal["function"]
    function: Function

    def for_engine(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.for_engine()}


Tools = Annotated[
    list[Annotated[Tool, BeforeValidator(check_tool_type)]], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)
]


class CalledFunction(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"]
    function: CalledFunction


ToolCalls = Annotated[list[Annotated[ToolCall, BeforeValidator(check_tool_type)]], Field(min_length=1, fail_fast=True)]


class ChosenFunction(Strict):
    name: FunctionName


class NamedChoice(Strict):
    type: Literal["function"]
    function: ChosenFunction


def check_tool_choice(choice: Any) -> Any:
    """Refuse the forms of a tool choice that are not served, by name."""
    if isinstance(choice, str):
        if choice not in _CHOICES:
            raise not_among(_CHOICES, choice)
        return choice
    if not isinstance(choice, dict):
        raise wrong_type("one of a string or an object", choice)
    if choice.get("type") in ("allowed_tools", "custom"):
        raise unsupported(
            f"A tool choice of type '{choice['type']}' is not served by this cluster; send only the tools that may be "
            "called, or name one function.",
            at="type",
        )
    return choice


ToolChoice = Annotated[
    Annotated[str, Tag(f"{TAG}str")] | Annotated[NamedChoice, Tag(f"{TAG}list")],
    Discriminator(list_or_str),
    BeforeValidator(check_tool_choice),
]
