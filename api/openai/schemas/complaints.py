"""How a mistake in a body is worded: from what pydantic reports to one error in OpenAI's style, naming the field.

It owns the words and the `param`. Which values are mistakes is said by the modules beside it, whose validators raise
the errors made here.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from api.strictjson import name_of_type, path_of
from localai_q.errors import (
    InvalidRequest,
    InvalidType,
    InvalidValue,
    MissingParameter,
    UnknownParameter,
    UnsupportedParameter,
)

# Marks the tags of unions, which pydantic puts into the path of an error. No field of a body can begin with it:
# `strictjson` refuses the character.
TAG = "\0"

_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a decimal",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}

_ARRAYS_OF_OBJECTS = ("messages", "tools")

_BOUNDS = {
    "less_than_equal": ("above maximum value", "<=", "le"),
    "less_than": ("above maximum value", "<", "lt"),
    "greater_than_equal": ("below minimum value", ">=", "ge"),
    "greater_than": ("below minimum value", ">", "gt"),
}


def wrong_type(expected: str, given: Any, *, at: str | int | None = None) -> PydanticCustomError:
    """A value has the wrong type; `expected` in words, `at` a place below the validated value."""
    return _custom("wrong_type", expected, at, given=name_of_type(given))


def wrong_value(message: str, *, at: str | int | None = None) -> PydanticCustomError:
    """A value is out of range or contradicts another."""
    return _custom("wrong_value", message, at)


def not_among(values: tuple[str, ...], given: Any, *, at: str | int | None = None) -> PydanticCustomError:
    """A value is none of those that are served."""
    quoted = [f"'{value}'" for value in values]
    listed = quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
    return wrong_value(f"Invalid value: {str(given)[:100]!r}. Supported values are: {listed}.", at=at)


def unsupported(message: str, *, at: str | int | None = None) -> PydanticCustomError:
    """Something that OpenAI serves and this cluster does not."""
    return _custom("unsupported", message, at)


def missing(name: str) -> PydanticCustomError:
    """A required field is missing."""
    return _custom("missing_field", "", name)


def unknown(name: str) -> PydanticCustomError:
    """A field is not known."""
    return _custom("unknown_field", "", name)


def _custom(kind: str, message: str, at: str | int | None, **more: Any) -> PydanticCustomError:
    # The message stands in the context: as a template, its braces would be filled in.
    return PydanticCustomError(kind, "{message}", {"message": message, "at": at, **more})  # type: ignore[arg-type]


def complaint_of(error: ValidationError) -> InvalidRequest:
    """The first mistake that pydantic found, as the error for the client."""
    found = error.errors(include_url=False)[0]
    context = found.get("ctx", {})
    parts = tuple(part for part in found["loc"] if not (isinstance(part, str) and part.startswith(TAG)))
    if context.get("at") is not None:
        # A validator of the whole body may name a field further down in one string.
        parts = (*parts, context["at"])
    path = path_of(parts)
    match found["type"]:
        case "missing" | "missing_field":
            return MissingParameter(f"Missing required parameter: '{path}'.", param=path)
        case "extra_forbidden" | "unknown_field":
            return UnknownParameter(f"Unknown parameter: '{path}'.", param=path)
        case "unsupported":
            return UnsupportedParameter(f"Unsupported parameter: '{path}'. {context['message']}", param=path)
        case "wrong_value":
            return InvalidValue(context["message"], param=path or None)
        case "wrong_type":
            return _invalid_type(path, context["message"], context["given"])
        case kind if kind in _EXPECTED:
            expected = "an array of objects" if path in _ARRAYS_OF_OBJECTS else _EXPECTED[kind]
            return _invalid_type(path, expected, name_of_type(found["input"]))
        case _:
            return InvalidValue(_value_message(path, found), param=path)


def _invalid_type(path: str, expected: str, given: str) -> InvalidType:
    return InvalidType(f"Invalid type for '{path}': expected {expected}, but got {given} instead.", param=path)


def _value_message(path: str, found: ErrorDetails) -> str:
    context = found.get("ctx", {})
    given: Any = found["input"]
    match found["type"]:
        case kind if kind in _BOUNDS:
            what, sign, key = _BOUNDS[kind]
            noun = "decimal" if isinstance(context[key], float) else "integer"
            bound = _number(context[key])
            return (
                f"Invalid '{path}': {noun} {what}. Expected a value {sign} {bound}, but got {_number(given)} instead."
            )
        case "literal_error":
            expected = context["expected"].replace(" or ", " and ")
            return f"Invalid value: {_short(given)}. Supported values are: {expected}."
        case "too_long":
            most, got = context["max_length"], context["actual_length"] or len(given)
            return f"Invalid '{path}': too many items. Expected at most {most}, but got {got} instead."
        case "too_short":
            least = context["min_length"]
            return f"Invalid '{path}': empty array. Expected an array with minimum length {least}."
        case "string_too_short":
            return f"Invalid '{path}': empty string. Expected a string with minimum length {context['min_length']}."
        case "string_too_long":
            return f"Invalid '{path}': string too long. Expected at most {context['max_length']} characters."
        case "string_pattern_mismatch":
            pattern = context["pattern"]
            return (
                f"Invalid '{path}': string does not match pattern. "
                f"Expected a string that matches the pattern '{pattern}'."
            )
        case _:
            return f"Invalid '{path}': {found['msg']}."


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else _short(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
