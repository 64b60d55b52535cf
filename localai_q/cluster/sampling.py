"""How the engine chooses tokens: the parameters that a request may give and a model may have of its own, and their
ranges. Pure.

It owns the rules for both. What a mistake in a request is called is the affair of `api.openai.schemas`, and which request
gets what of its model that of `localai_q.cluster.defaults`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

INT32_MAX = 2**31 - 1
MAX_STOPS = 16

NonEmpty = Annotated[str, StringConstraints(min_length=1)]
Positive = Annotated[int, Field(ge=1, le=INT32_MAX)]
Natural = Annotated[int, Field(ge=0, le=INT32_MAX)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
AtLeast0 = Annotated[float, Field(ge=0, le=1e6)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Stops = Annotated[list[NonEmpty], Field(max_length=MAX_STOPS, fail_fast=True)]
Sampler = Literal[
    "penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature", "infill", "adaptive_p"
]


class Sampling(BaseModel):
    """The parameters that chats and completions share: OpenAI's, then llama.cpp's."""

    frequency_penalty: Penalty | None = None
    max_tokens: Positive | None = None
    presence_penalty: Penalty | None = None
    seed: Seed | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Fraction | None = None

    cache_prompt: bool | None = None
    dry_allowed_length: Natural | None = None
    dry_base: Annotated[float, Field(ge=1, le=1e6)] | None = None
    dry_multiplier: AtLeast0 | None = None
    dry_penalty_last_n: Natural | None = None
    dry_sequence_breakers: Annotated[list[NonEmpty], Field(min_length=1, fail_fast=True)] | None = None
    dynatemp_exponent: AtLeast0 | None = None
    dynatemp_range: AtLeast0 | None = None
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


class Parameters(Sampling):
    """What a model has of its own, for requests that do not say it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    stop: Annotated[Stops, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] | None = None
