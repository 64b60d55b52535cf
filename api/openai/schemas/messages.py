"""The messages of a chat, one model per role, and each as the engine's chat template takes it.

It owns the roles. It leaves what a message holds to `content`, and the calls of an assistant to `tools`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Tag, model_validator

from api.openai.schemas.complaints import TAG, missing, not_among, unsupported, wrong_type
from api.openai.schemas.content import AssistantContent, Content, TextPart, content_for_engine
from api.openai.schemas.fields import Strict
from api.openai.schemas.tools import ToolCalls

_ROLES = ("system", "developer", "user", "assistant", "tool")


def refuse(why: str) -> AfterValidator:
    """Refuse every value of a field but null by name."""

    def check(given: Any) -> Any:
        if given is not None:
            raise unsupported(why)
        return given

    return AfterValidator(check)


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


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: AssistantContent | None = None
    tool_calls: ToolCalls | None = None
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
        raise not_among(_ROLES, role, at="role")
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
