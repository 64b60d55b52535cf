"""JSON bodies of the cluster's own API: checked by a pydantic model, refused in OpenAI's shape."""

from __future__ import annotations

from typing import Any, TypeVar

import flask
from pydantic import BaseModel, ValidationError
from werkzeug.exceptions import RequestEntityTooLarge

from api.strictjson import load_object
from localai_q.errors import InvalidValue, MissingParameter, UnknownParameter

Body = TypeVar("Body", bound=BaseModel)


class Request(flask.Request):
    """A request whose body is whole, or an error."""

    def get_data(self, *args: Any, **kwargs: Any) -> Any:
        """The body. Werkzeug cuts one that did not announce its length at the limit, without a word."""
        data = super().get_data(*args, **kwargs)
        most = self.max_content_length
        if self.content_length is None and most is not None and len(data) >= most:
            raise RequestEntityTooLarge
        return data


def parse(model: type[Body], data: bytes) -> Body:
    """The body as this model.

    Raises:
        InvalidJSON, MissingParameter, UnknownParameter, InvalidValue: it is not; the error names the field.
    """
    body = load_object(data or b"{}")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        match problem["type"]:
            case "missing":
                raise MissingParameter(f"Missing required parameter: '{name}'.", param=name) from error
            case "extra_forbidden":
                raise UnknownParameter(f"Unknown parameter: '{name}'.", param=name) from error
        message = problem["msg"].removeprefix("Value error, ")
        raise InvalidValue(f"Invalid value for '{name}': {message}.", param=name) from error
