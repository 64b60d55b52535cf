"""The body of a completion: its fields, what contradicts what, and the request that it makes.

It owns the fields that only completions have. It leaves the forms of a prompt to `inputs`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from api.openai.schemas.complaints import unsupported, wrong_value
from api.openai.schemas.inputs import Inputs, check_inputs
from api.openai.schemas.sampling import MAX_CHOICES, Generation
from localai_q.cluster.requests import GenerationRequest, Kind

MAX_COMPLETIONS = 128  # choices of one request: they run one after the other, as one job


class CompletionRequest(Generation):
    """The body of `POST /v1/completions`."""

    kind: ClassVar[Kind] = "completion"

    prompt: Annotated[Inputs, check_inputs("prompt")]
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported("'best_of' is only served with the value of 'n'; leave it out.", at="best_of")
        if len(self.prompt) * (self.n or 1) > MAX_COMPLETIONS:
            raise wrong_value(
                f"Invalid 'prompt': {len(self.prompt)} prompts with {self.n or 1} choices each exceed the "
                f"{MAX_COMPLETIONS} completions that one request may ask for; send several requests.",
                at="prompt",
            )
        if self.echo and self.logprobs is not None:
            raise unsupported(
                "'echo' together with 'logprobs' is not served by this cluster; leave one out.", at="echo"
            )
        if self.echo and not all(isinstance(prompt, str) for prompt in self.prompt):
            raise unsupported("'echo' of a prompt of token ids is not served by this cluster; send text.", at="echo")
        return self

    def request(self) -> GenerationRequest:
        """The request that this body makes."""
        body = self.sampling("prompt", "echo", "logprobs")
        if self.logprobs is not None:
            body["logprobs"] = max(1, self.logprobs)  # the engine gives none at all for 0
        return GenerationRequest(
            kind="completion",
            body=body,
            inputs=self.prompt,
            logprobs=self.logprobs,
            echo=bool(self.echo),
            **self.envelope(),
        )
