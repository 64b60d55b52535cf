"""The texts of a body: the four forms that `prompt` and `input` may have, made one.

It owns the forms. How many texts a body may hold is said by `completion` and `embedding`, and which tokens there are
by the models' backends.
"""

from __future__ import annotations

from typing import Any

from pydantic import BeforeValidator

from api.openai.schemas.complaints import wrong_type, wrong_value
from localai_q.cluster.requests import Input
from localai_q.cluster.sampling import INT32_MAX

Inputs = tuple[str | tuple[int, ...], ...]


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
    if min(ids) < 0 or max(ids) > INT32_MAX:
        raise wrong_value(f"Invalid '{where}': a token id must be between 0 and {INT32_MAX}.")
    return tuple(ids)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
