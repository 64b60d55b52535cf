"""The one way from a body's bytes to a request, and which parameters it honours.

Every parameter of OpenAI's API is honoured (a field of a model that reaches the engine), accepted without effect, or
refused by name; any other is refused as unknown. This module owns these refusals for the fields of a body itself. It
leaves to `api.strictjson` what is JSON, to the models what their fields may hold, and to `complaints` the words.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError

from api.openai.schemas.chat import ChatCompletionRequest
from api.openai.schemas.complaints import complaint_of
from api.openai.schemas.completion import CompletionRequest
from api.openai.schemas.embedding import EmbeddingRequest
from api.openai.schemas.fields import Strict
from api.openai.schemas.tables import ACCEPTED_WITHOUT_EFFECT, UNSUPPORTED
from api.strictjson import load_object
from localai_q.cluster.requests import GenerationRequest, Kind
from localai_q.errors import UnknownParameter, UnsupportedParameter

Body = TypeVar("Body", ChatCompletionRequest, CompletionRequest, EmbeddingRequest)


def parse_chat(data: bytes) -> GenerationRequest:
    """The request in the body of `POST /v1/chat/completions`.

    Raises:
        InvalidRequest: one of its kinds, whose `param` names the field.
    """
    return _validated(ChatCompletionRequest, data).request()


def parse_completion(data: bytes) -> GenerationRequest:
    """The request in the body of `POST /v1/completions`; errors as of `parse_chat`."""
    return _validated(CompletionRequest, data).request()


def parse_embedding(data: bytes) -> GenerationRequest:
    """The request in the body of `POST /v1/embeddings`; errors as of `parse_chat`."""
    return _validated(EmbeddingRequest, data).request()


def _validated(model: type[Body], data: bytes) -> Body:
    body = load_object(data)
    for name, value in body.items():
        _refuse_by_name(model, name, value)
    # OpenAI's clients send null for "not set"; a required field that is null is missing.
    given = {name: value for name, value in body.items() if value is not None}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise complaint_of(error) from None


def _refuse_by_name(model: type[Body], name: str, value: Any) -> None:
    if name in model.model_fields:
        return
    reason = UNSUPPORTED[model.kind].get(name)
    if reason is None:
        raise UnknownParameter(f"Unknown parameter: '{name}'.", param=name)
    if value is not None:
        raise UnsupportedParameter(
            f"Unsupported parameter: '{name}' is not served by this cluster: {reason}.", param=name
        )


def honoured(kind: Kind) -> list[str]:
    """The names of the parameters that have an effect on the answer, for the docs and their test."""
    models: dict[Kind, type[Strict]] = {
        "chat": ChatCompletionRequest,
        "completion": CompletionRequest,
        "embedding": EmbeddingRequest,
    }
    return [name for name in models[kind].model_fields if name not in ACCEPTED_WITHOUT_EFFECT[kind]]
