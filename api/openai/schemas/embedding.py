"""The body of a request for embeddings: its fields, and the request that it makes.

It owns how many texts there may be. It leaves their forms to `inputs`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import model_validator

from api.openai.schemas.complaints import wrong_value
from api.openai.schemas.fields import Strict
from api.openai.schemas.inputs import Inputs, check_inputs
from localai_q.cluster.requests import GenerationRequest, Kind
from localai_q.cluster.sampling import NonEmpty

MAX_INPUTS = 2048  # texts to embed in one request, as at OpenAI


class EmbeddingRequest(Strict):
    """The body of `POST /v1/embeddings`."""

    kind: ClassVar[Kind] = "embedding"

    model: NonEmpty
    input: Annotated[Inputs, check_inputs("input")]
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None

    background: bool | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if len(self.input) > MAX_INPUTS:
            raise wrong_value(
                f"Invalid 'input': array too long. Expected at most {MAX_INPUTS} inputs, but got {len(self.input)}.",
                at="input",
            )
        for index, text in enumerate(self.input):
            if not text:
                raise wrong_value(f"Invalid 'input[{index}]': input cannot be an empty string.", at="input")
        return self

    def request(self) -> GenerationRequest:
        """The request that this body makes."""
        return GenerationRequest(
            kind="embedding",
            model=self.model,
            inputs=self.input,
            encoding_format=self.encoding_format or "float",
            background=bool(self.background),
        )
