"""What clients may send to OpenAI's endpoints: the models of the bodies, and the one way from bytes to a request.

Every parameter of OpenAI's API is honoured (a field of a model that reaches the engine), accepted without effect
(`ACCEPTED_WITHOUT_EFFECT`), or refused by name (`UNSUPPORTED`); any other is refused as unknown. `docs/api.md` shows
the same lists. This module leaves to `api.openai.strictjson` what is JSON, to `api.openai.complaints` how a mistake is
worded, and to the models' backends what only they can know: the length of a context, the tokens of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)

from api.openai.complaints import TAG, complaint_of, missing, unknown, unsupported, wrong_type, wrong_value
from api.openai.strictjson import load_object
from localai_q.cluster.requests import SEEDS, GenerationRequest, Input, Kind
from localai_q.errors import UnknownParameter, UnsupportedParameter

MAX_CHOICES = 16  # of one prompt
MAX_COMPLETIONS = 128  # choices of one request: they run one after the other, as one job
MAX_INPUTS = 2048  # texts to embed in one request, as at OpenAI
MAX_STOPS = 16
MAX_TOOLS = 128
MAX_BIASES = 1024  # tokens in `logit_bias`
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat ends by itself

ACCEPTED_WITHOUT_EFFECT: dict[Kind, dict[str, str]] = {
    "chat": {
        "user": "any string; it names your end user",
        "metadata": "up to 16 strings; nothing is stored with an answer",
        "store": "only false: answers are not stored",
        "service_tier": "only 'auto' and 'default': there is one tier",
        "safety_identifier": "any string; it names your end user",
        "prompt_cache_key": "any string; prompts are cached by their own text",
        "prompt_cache_retention": "'in_memory' or '24h'; a prompt stays cached while the model has room",
        "prompt_cache_options": "any; prompts are always cached implicitly",
        "modalities": "only ['text']: answers are text",
        "verbosity": "only 'medium', which is OpenAI's default: local models have no such setting",
    },
    "completion": {
        "user": "any string; it names your end user",
        "best_of": "only the value of 'n', which means that every choice is returned",
    },
    "embedding": {
        "user": "any string; it names your end user",
    },
}

UNSUPPORTED: dict[Kind, dict[str, str]] = {
    "chat": {
        "audio": "this cluster does not answer in audio; leave it out",
        "function_call": "it is OpenAI's old name; use 'tool_choice'",
        "functions": "it is OpenAI's old name; use 'tools'",
        "moderation": "this cluster runs no moderation; leave it out",
        "prediction": "this cluster has no predicted outputs; leave it out",
        "web_search_options": "this cluster does not search the web; leave it out",
    },
    "completion": {
        "suffix": "this cluster does not fill in between two texts; leave it out",
    },
    "embedding": {
        "dimensions": "vectors have the size that the model gives them; leave it out",
    },
}

_INT32 = 2**31 - 1

Natural = Annotated[int, Field(ge=0, le=_INT32)]
Positive = Annotated[int, Field(ge=1, le=_INT32)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
AtLeast0 = Annotated[float, Field(ge=0, le=1e6)]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Sampler = Literal[
    "penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature", "infill", "adaptive_p"
]


def only(value: Any, why: str) -> AfterValidator:
    """Refuse every other value of a field by name, as a parameter that is not served."""

    def check(given: Any) -> Any:
        if given != value:
            raise unsupported(f"{given!r} is not served by this cluster: {why}.")
        return given

    return AfterValidator(check)


def refuse(why: str) -> AfterValidator:
    """Refuse every value of a field but null by name."""

    def check(given: Any) -> Any:
        if given is not None:
            raise unsupported(why)
        return given

    return AfterValidator(check)


def at_most(size: int) -> BeforeValidator:
    """Refuse an object with more than `size` fields before each of them is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > size:
            raise wrong_value(
                f"Invalid object: too many fields. Expected at most {size}, but got {len(value)} instead."
            )
        return value

    return BeforeValidator(check)


def list_or_str(value: Any) -> str:
    """The tag of a value that may be a string or an array."""
    return f"{TAG}str" if isinstance(value, str) else f"{TAG}list"


def require_list_or_str(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise wrong_type("one of a string or an array of objects", value)
    return value


class Strict(BaseModel):
    """A part of a body: no type is guessed, no field is dropped."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        # At the first one: pydantic would report each of a million.
        if isinstance(values, dict):
            for name in values:
                if name not in cls.names():
                    raise unknown(name)
        return values

    @classmethod
    def names(cls) -> frozenset[str]:
        """The names of the fields as clients write them."""
        return _names(cls)

    def given(self, *leave_out: str) -> dict[str, Any]:
        """The fields that have a value, by name, without those of `leave_out`."""
        names = (name for name in type(self).model_fields if name not in leave_out)
        return {name: _plain(value) for name in names if (value := getattr(self, name)) is not None}


@cache
def _names(model: type[Strict]) -> frozenset[str]:
    return frozenset(entry.alias or name for name, entry in model.model_fields.items())


def _plain(value: Any) -> Any:
    if isinstance(value, Strict):
        return value.given()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


# --- messages -------------------------------------------------------------------------------------------------------


class TextPart(Strict):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str


def check_part(*served: str) -> BeforeValidator:
    """Refuse a part of a message's content by its `type`, before its fields are looked at."""

    def check(part: Any) -> Any:
        if not isinstance(part, dict):
            raise wrong_type("an object", part)
        if "type" not in part:
            raise missing("type")
        kind = part["type"]
        if kind in ("image_url", "input_audio", "file") and isinstance(kind, str):
            raise unsupported(f"Content parts of type '{kind}' are not served by this cluster; send text.", at="type")
        if kind not in served:
            raise wrong_value(_supported(kind, served), at="type")
        return part

    return BeforeValidator(check)


def _supported(given: Any, values: tuple[str, ...]) -> str:
    quoted = [f"'{value}'" for value in values]
    listed = quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
    return f"Invalid value: {str(given)[:100]!r}. Supported values are: {listed}."


def part_tag(part: Any) -> str:
    return f"{TAG}{part['type']}"


TextParts = Annotated[list[Annotated[TextPart, check_part("text")]], Field(min_length=1, fail_fast=True)]
AssistantPart = Annotated[
    Annotated[TextPart, Tag(f"{TAG}text")] | Annotated[RefusalPart, Tag(f"{TAG}refusal")],
    Discriminator(part_tag),
    check_part("text", "refusal"),
]
AssistantParts = Annotated[list[AssistantPart], Field(min_length=1, fail_fast=True)]
Content = Annotated[
    Annotated[str, Tag(f"{TAG}str")] | Annotated[TextParts, Tag(f"{TAG}list")],
    Discriminator(list_or_str),
    BeforeValidator(require_list_or_str),
]
AssistantContent = Annotated[
    Annotated[str, Tag(f"{TAG}str")] | Annotated[AssistantParts, Tag(f"{TAG}list")],
    Discriminator(list_or_str),
    BeforeValidator(require_list_or_str),
]


def content_for_engine(content: str | list[TextPart]) -> str | list[dict[str, str]]:
    """One text as a string, several as parts: how they are joined is the chat template's affair."""
    if isinstance(content, str):
        return content
    if len(content) == 1:
        return content[0].text
    return [{"type": "text", "text": part.text} for part in content]


class Message(Strict):
    content: Content
    name: str | None = None

    def for_engine(self) -> dict[str, Any]:
        """The message as the engine's chat template takes it."""
        return {**self.given("content"), "content": content_for_engine(self.content)}


class SystemMessage(Message):
    role: Literal["system", "developer"]

    def for_engine(self) -> dict[str, Any]:
        # Chat templates know no developer: it is the name that newer models of OpenAI have for the system.
        return {**super().for_engine(), "role": "system"}


class UserMessage(Message):
    role: Literal["user"]


class ToolMessage(Message):
    role: Literal["tool"]
    tool_call_id: str


class CalledFunction(Strict):
    name: str
    arguments: str


def check_tool_type(tool: Any) -> Any:
    """Refuse OpenAI's custom tools by name."""
    if isinstance(tool, dict) and tool.get("type") == "custom":
        raise unsupported("Custom tools are not served by this cluster; use a tool of type 'function'.", at="type")
    return tool


class ToolCall(Strict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: AssistantContent | None = None
    tool_calls: (
        Annotated[list[Annotated[ToolCall, BeforeValidator(check_tool_type)]], Field(min_length=1, fail_fast=True)]
        | None
    ) = None
    refusal: str | None = None
    reasoning_content: str | None = None
    name: str | None = None
    annotations: list[Any] | None = None  # stands in OpenAI's answers, which clients send back as they are
    audio: Annotated[Any, refuse("Send its transcript as 'content'.")] = None
    function_call: Annotated[Any, refuse("It is OpenAI's old name; use 'tool_calls'.")] = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.tool_calls is None and self.refusal is None:
            raise missing("content")
        return self

    def for_engine(self) -> dict[str, Any]:
        """The message as the engine's chat template takes it. A refusal is text that the assistant said."""
        return {**self.given("content", "refusal", "annotations"), "content": self._text()}

    def _text(self) -> str | None:
        if self.content is None:
            return self.refusal
        if isinstance(self.content, str):
            return self.content + (self.refusal or "")
        said = [part.text if isinstance(part, TextPart) else part.refusal for part in self.content]
        # One string: an assistant's last message is continued by the engine, which takes a string for that.
        return "".join(said) + (self.refusal or "")


_ROLES = ("system", "developer", "user", "assistant", "tool")


def check_role(message: Any) -> Any:
    """Refuse a message by its role, before its fields are looked at."""
    if not isinstance(message, dict):
        raise wrong_type("an object", message)
    if "role" not in message:
        raise missing("role")
    role = message["role"]
    if not isinstance(role, str):
        raise wrong_type("a string", role, at="role")
    if role == "function":
        raise unsupported("Messages of role 'function' are OpenAI's old form; use role 'tool'.", at="role")
    if role not in _ROLES:
        raise wrong_value(_supported(role, _ROLES), at="role")
    return message


def role_tag(message: Any) -> str:
    role = message["role"]
    return f"{TAG}{'system' if role == 'developer' else role}"


ChatMessage = Annotated[
    Annotated[SystemMessage, Tag(f"{TAG}system")]
    | Annotated[UserMessage, Tag(f"{TAG}user")]
    | Annotated[AssistantMessage, Tag(f"{TAG}assistant")]
    | Annotated[ToolMessage, Tag(f"{TAG}tool")],
    Discriminator(role_tag),
    BeforeValidator(check_role),
]


# --- tools and formats ----------------------------------------------------------------------------------------------


class Function(Strict):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def for_engine(self) -> dict[str, Any]:
        # OpenAI: without parameters, a function takes none.
        return {"parameters": {"type": "object", "properties": {}}, **self.given()}


class Tool(Strict):
    type: Literal["function"]
    function: Function

    def for_engine(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.for_engine()}


class ChosenFunction(Strict):
    name: FunctionName


class NamedChoice(Strict):
    type: Literal["function"]
    function: ChosenFunction


def check_tool_choice(choice: Any) -> Any:
    """Refuse the forms of a tool choice that are not served, by name."""
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise wrong_value(_supported(choice, ("none", "auto", "required")))
        return choice
    if not isinstance(choice, dict):
        raise wrong_type("one of a string or an object", choice)
    if choice.get("type") in ("allowed_tools", "custom"):
        raise unsupported(
            f"A tool choice of type '{choice['type']}' is not served by this cluster; send only the tools that may be "
            "called, or name one function.",
            at="type",
        )
    return choice


ToolChoice = Annotated[
    Annotated[str, Tag(f"{TAG}str")] | Annotated[NamedChoice, Tag(f"{TAG}list")],
    Discriminator(list_or_str),
    BeforeValidator(check_tool_choice),
]


class PlainFormat(Strict):
    type: Literal["text", "json_object"]


class JSONSchema(Strict):
    name: FunctionName
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JSONSchema


_FORMATS = ("text", "json_object", "json_schema")


def check_format(value: Any) -> Any:
    """Refuse a response format by its `type`, before its fields are looked at."""
    if not isinstance(value, dict):
        raise wrong_type("an object", value)
    if "type" not in value:
        raise missing("type")
    if value["type"] not in _FORMATS:
        raise wrong_value(_supported(value["type"], _FORMATS), at="type")
    return value


def format_tag(value: Any) -> str:
    return f"{TAG}schema" if value["type"] == "json_schema" else f"{TAG}plain"


ResponseFormat = Annotated[
    Annotated[PlainFormat, Tag(f"{TAG}plain")] | Annotated[SchemaFormat, Tag(f"{TAG}schema")],
    Discriminator(format_tag),
    BeforeValidator(check_format),
]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[bool, only(False, "streams are not padded; leave it out")] | None = None


# --- what generations share -----------------------------------------------------------------------------------------


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


class Generation(Strict):
    """The parameters that chats and completions share: OpenAI's, then llama.cpp's."""

    kind: ClassVar[Kind]

    model: NonEmpty
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]], AfterValidator(check_token_ids), at_most(MAX_BIASES)
        ]
        | None
    ) = None
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
    n_keep: Annotated[int, Field(ge=-1, le=_INT32)] | None = None
    repeat_last_n: Natural | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=1e6)] | None = None
    samplers: Annotated[list[Sampler], Field(min_length=1, fail_fast=True)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT32)] | None = None
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
        body = self.given("model", "n", "stream", "stream_options", *without_effect, *leave_out)
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
            "include_usage": bool(options and options.include_usage),
        }


# --- the three bodies -----------------------------------------------------------------------------------------------


Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    at_most(16),
]


class ChatCompletionRequest(Generation):
    """The body of `POST /v1/chat/completions`."""

    kind: ClassVar[Kind] = "chat"

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: Positive | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    response_format: ResponseFormat | None = None
    tools: (
        Annotated[
            list[Annotated[Tool, BeforeValidator(check_tool_type)]],
            Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True),
        ]
        | None
    ) = None
    tool_choice: ToolChoice | None = None

    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_format: Literal["none", "auto", "deepseek", "deepseek-legacy"] | None = None

    metadata: Metadata | None = None
    store: Annotated[bool, only(False, "answers are not stored; leave it out")] | None = None
    service_tier: (
        Annotated[
            Literal["auto", "default", "flex", "scale", "priority", "fast"],
            AfterValidator(lambda tier: _check_tier(tier)),
        ]
        | None
    ) = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    modalities: Annotated[list[str], Field(fail_fast=True), only(["text"], "answers are text; leave it out")] | None = (
        None
    )
    verbosity: (
        Annotated[
            Literal["low", "medium", "high"],
            only("medium", "local models have no such setting; leave it out and say it in a message"),
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for name, message in self._contradictions():
            raise wrong_value(message, at=name)
        if self.logprobs and self.tools:
            raise unsupported(
                "'logprobs' together with 'tools' is not served by this cluster; leave one of them out.", at="logprobs"
            )
        return self

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            yield (
                "max_tokens",
                "'max_tokens' and 'max_completion_tokens' are two names of one limit; send only 'max_completion_tokens'.",
            )
        if self.top_logprobs is not None and not self.logprobs:
            yield "top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true."
        yield from self._tool_contradictions()
        if self.grammar is not None and self._format():
            yield "grammar", "'grammar' and a JSON 'response_format' exclude each other; send one of them."
        kwargs = self.chat_template_kwargs or {}
        if not isinstance(kwargs.get("enable_thinking", True), bool):
            yield "chat_template_kwargs", "Invalid 'chat_template_kwargs.enable_thinking': it must be true or false."
        for name in self._template_arguments().keys() & kwargs.keys():
            yield (
                "reasoning_effort",
                f"'reasoning_effort' sets 'chat_template_kwargs.{name}', which is given too; send one of them.",
            )

    def _tool_contradictions(self) -> Iterator[tuple[str, str]]:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            yield "tools", "Invalid 'tools': two functions have the same name. Give each its own."
        if self.tools and self.grammar is not None and self.tool_choice != "none":
            yield "grammar", "'grammar' and 'tools' exclude each other; send one of them, or 'tool_choice': 'none'."
        if not self.tools and (isinstance(self.tool_choice, NamedChoice) or self.tool_choice == "required"):
            yield "tool_choice", "Invalid value for 'tool_choice': it is only allowed when 'tools' are specified."
        elif isinstance(self.tool_choice, NamedChoice) and self.tool_choice.function.name not in names:
            yield (
                "tool_choice.function.name",
                f"Tool choice '{self.tool_choice.function.name}' not found in 'tools' parameter.",
            )

    def _template_arguments(self) -> dict[str, Any]:
        """What `reasoning_effort` means to a chat template: llama.cpp hands these names to it."""
        if self.reasoning_effort is None:
            return {}
        return (
            {"enable_thinking": False}
            if self.reasoning_effort == "none"
            else {"reasoning_effort": self.reasoning_effort}
        )

    def request(self) -> GenerationRequest:
        """The request that this body makes."""
        body = self.sampling(
            "messages", "logprobs", "top_logprobs", "max_completion_tokens", "reasoning_effort", "response_format",
            "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs",
        )  # fmt: skip
        body["messages"] = [message.for_engine() for message in self.messages]
        if self.max_completion_tokens is not None:
            body["max_tokens"] = self.max_completion_tokens
        if kwargs := {**(self.chat_template_kwargs or {}), **self._template_arguments()}:
            body["chat_template_kwargs"] = kwargs
        if self.logprobs:
            # The engine gives none at all for 0, and 20 when the number is left out.
            body |= {"logprobs": True, "top_logprobs": max(1, self.top_logprobs or 0)}
        body |= {**self._format(), **self._tools()}
        alternatives = (self.top_logprobs or 0) if self.logprobs else None
        return GenerationRequest(kind="chat", body=body, logprobs=alternatives, **self.envelope())

    def _format(self) -> dict[str, Any]:
        if isinstance(self.response_format, SchemaFormat):
            asked = self.response_format.json_schema
            schema = {"name": asked.name, "schema": asked.schema_ or {}}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        if self.response_format is not None and self.response_format.type == "json_object":
            return {"response_format": {"type": "json_object"}}
        return {}

    def _tools(self) -> dict[str, Any]:
        if not self.tools:
            return {}
        tools, choice = self.tools, self.tool_choice
        if isinstance(choice, NamedChoice):
            # Engines know the three words only; "must call" of one single tool says the same.
            tools, choice = [tool for tool in tools if tool.function.name == choice.function.name], "required"
        body: dict[str, Any] = {"tools": [tool.for_engine() for tool in tools]}
        if choice is not None:
            body["tool_choice"] = choice
        if self.parallel_tool_calls is not None:
            body["parallel_tool_calls"] = self.parallel_tool_calls
        return body


def _check_tier(tier: str) -> str:
    if tier not in ("auto", "default"):
        raise unsupported(f"'{tier}' is not served by this cluster: there is one tier; leave it out.")
    return tier


def check_inputs(noun: str) -> BeforeValidator:
    """The value of `prompt` or `input` as a tuple of texts and tuples of token ids, whatever its form was."""

    def check(value: Any) -> tuple[Input, ...]:
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list):
            raise wrong_type("one of a string or an array", value)
        if not value:
            raise wrong_value(f"Invalid '{noun}': empty array. Expected an array with minimum length 1.")
        if _is_token(value[0]):
            return (_tokens(value, noun),)
        return tuple(_input(item, noun, index) for index, item in enumerate(value))

    return BeforeValidator(check)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _input(item: Any, noun: str, index: int) -> Input:
    if isinstance(item, str):
        return item
    if isinstance(item, list) and item:
        return _tokens(item, f"{noun}[{index}]")
    if isinstance(item, list):
        raise wrong_value(f"Invalid '{noun}[{index}]': empty array. Expected an array with minimum length 1.", at=index)
    raise wrong_type("one of a string or an array of token ids", item, at=index)


def _tokens(ids: list[Any], where: str) -> tuple[int, ...]:
    if not all(_is_token(token) for token in ids):
        raise wrong_value(f"Invalid '{where}': an array of token ids must hold integers only.")
    if min(ids) < 0 or max(ids) > _INT32:
        raise wrong_value(f"Invalid '{where}': a token id must be between 0 and {_INT32}.")
    return tuple(ids)


Inputs = tuple[str | tuple[int, ...], ...]


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
        body.setdefault("max_tokens", DEFAULT_COMPLETION_TOKENS)
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


class EmbeddingRequest(Strict):
    """The body of `POST /v1/embeddings`."""

    kind: ClassVar[Kind] = "embedding"

    model: NonEmpty
    input: Annotated[Inputs, check_inputs("input")]
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None

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
            kind="embedding", model=self.model, inputs=self.input, encoding_format=self.encoding_format or "float"
        )


# --- from bytes to a request ----------------------------------------------------------------------------------------


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


Body = TypeVar("Body", ChatCompletionRequest, CompletionRequest, EmbeddingRequest)


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
