"""A document from outside as a pydantic model, or one error that names the field. Owns the words of that error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from localai_q.errors import InvalidRequest, InvalidValue, MissingParameter, UnknownParameter

Document = TypeVar("Document", bound=BaseModel)


def checked(model: type[Document], content: Mapping[str, Any]) -> Document:
    """The content as this model.

    Raises:
        MissingParameter, UnknownParameter, InvalidValue: it is not; the error names the field.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> InvalidRequest:
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "missing":
            return MissingParameter(f"Missing required parameter: '{name}'.", param=name)
        case "extra_forbidden":
            return UnknownParameter(f"Unknown parameter: '{name}'.", param=name)
    message = problem["msg"].removeprefix("Value error, ")
    return InvalidValue(f"Invalid value for '{name}': {message}.", param=name)
