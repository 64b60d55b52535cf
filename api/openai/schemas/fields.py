"""What every part of a body is made of: the strict base model, and the types and validators that several parts share.

It owns that no type is guessed and no field dropped. What only one part needs stands beside that part.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StringConstraints,
    model_validator,
)

from api.openai.schemas.complaints import TAG, unknown, unsupported, wrong_value

FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


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


def only(value: Any, why: str) -> AfterValidator:
    """Refuse every other value of a field by name, as a parameter that is not served."""

    def check(given: Any) -> Any:
        if given != value:
            raise unsupported(f"{given!r} is not served by this cluster: {why}.")
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
