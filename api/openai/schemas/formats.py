"""The form that a chat's answer must have: the values of `response_format`.

It owns which formats there are. What excludes a format, and how the engine is told of it, is the affair of `chat`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from api.openai.schemas.complaints import TAG, missing, not_among, wrong_type
from api.openai.schemas.fields import FunctionName, Strict

_FORMATS = ("text", "json_object", "json_schema")


class PlainFormat(Strict):
    type: Literal["text", "json_object"]


class JSONSchema(Strict):
    name: FunctionName
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JSONSchema


def check_format(value: Any) -> Any:
    """Refuse a response format by its `type`, before its fields are looked at."""
    if not isinstance(value, dict):
        raise wrong_type("an object", value)
    if "type" not in value:
        raise missing("type")
    if value["type"] not in _FORMATS:
        raise not_among(_FORMATS, value["type"], at="type")
    return value


def format_tag(value: Any) -> str:
    return f"{TAG}schema" if value["type"] == "json_schema" else f"{TAG}plain"


ResponseFormat = Annotated[
    Annotated[PlainFormat, Tag(f"{TAG}plain")] | Annotated[SchemaFormat, Tag(f"{TAG}schema")],
    Discriminator(format_tag),
    BeforeValidator(check_format),
]
