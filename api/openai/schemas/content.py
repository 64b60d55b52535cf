"""The content of a message: a text, or an array of parts.

It owns which parts are served, and how a text reaches the engine. Who says it is the affair of `messages`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from api.openai.schemas.complaints import TAG, missing, not_among, unsupported, wrong_type
from api.openai.schemas.fields import Strict, list_or_str


class TextPart(Strict):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str


def check_part(*served: str) -> BeforeValidator:
    """Refuse a part of a message's content by its `type`, before its fields are looked at."""

    def check(part: Any) -> Any:
        if not isinstance(part, dict):
            raise wrong_type("an object", part)
        if "type" not in part:
            raise missing("type")
        kind = part["type"]
        if kind in ("image_url", "input_audio", "file") and isinstance(kind, str):
            raise unsupported(f"Content parts of type '{kind}' are not served by this cluster; send text.", at="type")
        if kind not in served:
            raise not_among(served, kind, at="type")
        return part

    return BeforeValidator(check)


def part_tag(part: Any) -> str:
    return f"{TAG}{part['type']}"


def require_list_or_str(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise wrong_type("one of a string or an array of objects", value)
    return value


TextParts = Annotated[list[Annotated[TextPart, check_part("text")]], Field(min_length=1, fail_fast=True)]
AssistantPart = Annotated[
    Annotated[TextPart, Tag(f"{TAG}text")] | Annotated[RefusalPart, Tag(f"{TAG}refusal")],
    Discriminator(part_tag),
    check_part("text", "refusal"),
]
AssistantParts = Annotated[list[AssistantPart], Field(min_length=1, fail_fast=True)]
Content = Annotated[
    Annotated[str, Tag(f"{TAG}str")] | Annotated[TextParts, Tag(f"{TAG}list")],
    Discriminator(list_or_str),
    BeforeValidator(require_list_or_str),
]
AssistantContent = Annotated[
    Annotated[str, Tag(f"{TAG}str")] | Annotated[AssistantParts, Tag(f"{TAG}list")],
    Discriminator(list_or_str),
    BeforeValidator(require_list_or_str),
]


def content_for_engine(content: str | list[TextPart]) -> str | list[dict[str, str]]:
    """One text as a string, several as parts: how they are joined is the chat template's affair."""
    if isinstance(content, str):
        return content
    if len(content) == 1:
        return content[0].text
    return [{"type": "text", "text": part.text} for part in content]
