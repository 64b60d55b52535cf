"""JSON bodies of the cluster's own API: checked by a pydantic model, refused in OpenAI's shape."""

from __future__ import annotations

from typing import Any

import flask
from werkzeug.exceptions import RequestEntityTooLarge

from api.strictjson import load_object
from localai_q.documents import Document, checked


class Request(flask.Request):
    """A request whose body is whole, or an error."""

    def get_data(self, *args: Any, **kwargs: Any) -> Any:
        """The body. Werkzeug cuts one that did not announce its length at the limit, without a word."""
        data = super().get_data(*args, **kwargs)
        most = self.max_content_length
        if self.content_length is None and most is not None and len(data) >= most:
            raise RequestEntityTooLarge
        return data


def parse(model: type[Document], data: bytes) -> Document:
    """The body as this model.

    Raises:
        InvalidJSON, MissingParameter, UnknownParameter, InvalidValue: it is not; the error names the field.
    """
    return checked(model, load_object(data or b"{}"))
