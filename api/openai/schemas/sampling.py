"""What chats and completions share: how tokens are chosen, when they end, and how an answer is delivered.

It owns the ranges of these parameters and their form for the engine. What one of the two bodies adds is its own.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from api.openai.schemas.complaints import TAG, wrong_type, wrong_value
from api.openai.schemas.fields import INT32_MAX, NonEmpty, Positive, Strict, at_most, list_or_str, only
from api.openai.schemas.tables import ACCEPTED_WITHOUT_EFFECT
from localai_q.cluster.requests import SEEDS, Kind

MAX_CHOICES = 16  # of one prompt
MAX_STOPS = 16
MAX_BIASES = 1024  # tokens in `logit_bias`

Natural = Annotated[int, Field(ge=0, le=INT32_MAX)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
AtLeast0 = Annotated[float, Field(ge=0, le=1e6)]
Sampler = Literal[
    "penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature", "infill", "adaptive_p"
]


def require_stop(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise wrong_type("one of a string or an array of strings", value)
    return value


Stop = Annotated[
    Annotated[NonEmpty, Tag(f"{TAG}str")]
    | Annotated[list[NonEmpty], Field(max_length=MAX_STOPS, fail_fast=True), Tag(f"{TAG}list")],
    Discriminator(list_or_str),
    BeforeValidator(require_stop),
]


def check_token_ids(bias: dict[str, float]) -> dict[str, float]:
    for token in bias:
        if not (token.isascii() and token.isdigit()):
            raise wrong_value(
                f"Invalid key in 'logit_bias': '{token[:100]}'. Keys are token ids of the model, as \"50256\"."
            )
    return bias


LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]], AfterValidator(check_token_ids), at_most(MAX_BIASES)
]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[bool, only(False, "streams are not padded; leave it out")] | None = None


class Generation(Strict):
    """The parameters that chats and completions share: OpenAI's, then llama.cpp's."""

    kind: ClassVar[Kind]

    model: NonEmpty
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    max_tokens: Positive | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    presence_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Fraction | None = None
    user: str | None = None

    background: bool | None = None
    cache_prompt: bool | None = None
    dry_allowed_length: Natural | None = None
    dry_base: Annotated[float, Field(ge=1, le=1e6)] | None = None
    dry_multiplier: AtLeast0 | None = None
    dry_penalty_last_n: Natural | None = None
    dry_sequence_breakers: Annotated[list[NonEmpty], Field(min_length=1, fail_fast=True)] | None = None
    dynatemp_exponent: AtLeast0 | None = None
    dynatemp_range: AtLeast0 | None = None
    grammar: NonEmpty | None = None
    ignore_eos: bool | None = None
    min_keep: Natural | None = None
    min_p: Fraction | None = None
    mirostat: Literal[0, 1, 2] | None = None
    mirostat_eta: AtLeast0 | None = None
    mirostat_tau: AtLeast0 | None = None
    n_keep: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    repeat_last_n: Natural | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=1e6)] | None = None
    samplers: Annotated[list[Sampler], Field(min_length=1, fail_fast=True)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    top_n_sigma: Annotated[float, Field(ge=-1, le=1e6)] | None = None
    typical_p: Fraction | None = None
    xtc_probability: Fraction | None = None
    xtc_threshold: Fraction | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise wrong_value(
                "The 'stream_options' parameter is only allowed when 'stream' is true.", at="stream_options"
            )
        return self

    def sampling(self, *leave_out: str) -> dict[str, Any]:
        """The parameters that reach the engine as they are, and `stop` and `seed` as it takes them."""
        without_effect = ACCEPTED_WITHOUT_EFFECT[self.kind]
        body = self.given("model", "n", "stream", "stream_options", "background", *without_effect, *leave_out)
        if isinstance(self.stop, str):
            body["stop"] = [self.stop]
        if self.seed is not None:
            body["seed"] = self.seed % SEEDS
        return body

    def envelope(self) -> dict[str, Any]:
        """The fields of a request that say how it is answered."""
        options = self.stream_options
        return {
            "model": self.model,
            "n": self.n or 1,
            "stream": bool(self.stream),
            "background": bool(self.background),
            "include_usage": bool(options and options.include_usage),
        }
