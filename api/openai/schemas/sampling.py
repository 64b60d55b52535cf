"""What chats and completions share: how tokens are chosen, when they end, and how an answer is delivered.

It owns their form for the engine. The ranges of what chooses tokens stand in `localai_q.cluster.sampling`, for models have
them, too; what one of the two bodies adds is its own.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from api.openai.schemas.complaints import TAG, wrong_type, wrong_value
from api.openai.schemas.fields import Strict, at_most, list_or_str, only
from api.openai.schemas.tables import ACCEPTED_WITHOUT_EFFECT
from localai_q.cluster.requests import SEEDS, Kind
from localai_q.cluster.sampling import NonEmpty, Sampling, Stops

MAX_CHOICES = 16  # of one prompt
MAX_BIASES = 1024  # tokens in `logit_bias`


def require_stop(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise wrong_type("one of a string or an array of strings", value)
    return value


Stop = Annotated[
    Annotated[NonEmpty, Tag(f"{TAG}str")] | Annotated[Stops, Tag(f"{TAG}list")],
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


class Generation(Strict, Sampling):
    """What chats and completions share: how tokens are chosen, and how the answer is delivered."""

    kind: ClassVar[Kind]

    model: NonEmpty
    grammar: NonEmpty | None = None
    logit_bias: LogitBias | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    background: bool | None = None

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
