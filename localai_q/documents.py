"""Documents from outside: YAML or JSON text as plain values, and these as a pydantic model, or one error that says what is
wrong and where. Owns the bounds of such texts and the words of the errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from localai_q.errors import InvalidRequest, InvalidValue, MissingParameter, UnknownParameter

MOST_VALUES = 500_000  # in one text, each alias counted as what it stands for
DEEPEST = 100  # levels
LARGEST = 1 << 64  # of whole numbers

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_PAIR = re.compile(r"\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")  # as JSON writes some characters

Document = TypeVar("Document", bound=BaseModel)


class _Loader(yaml.CSafeLoader):
    """No key twice, and dates as the text that they are."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag != "tag:yaml.org,2002:timestamp"]
        for first, forms in yaml.CSafeLoader.yaml_implicit_resolvers.items()
    }


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands there twice", node.start_mark)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
# Numbers as JSON writes them, of which YAML takes those without a point for text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"-?[0-9]+(?:\.[0-9]+)?[eE][+-]?[0-9]+$"), [*"-0123456789"]
)


def read_yaml(text: str | bytes) -> list[Any]:
    """The documents of a YAML or JSON text, those that are not empty.

    Raises:
        InvalidValue: it is neither, or its aliases make more of it than anybody could mean.
    """
    try:
        whole = _without_pairs(text)
        _refuse_deep(whole)
        found = [document for document in _documents(whole) if document is not None]
        _refuse_unstorable(found)
    except (yaml.YAMLError, ValueError, KeyError) as error:  # KeyError: a tag says of a word that it is true or false
        raise InvalidValue(f"This is no YAML that can be read: {' '.join(str(error).split())[:500]}") from error
    return found


def _documents(text: str) -> list[Any]:
    loader = _Loader(text)
    documents = []
    try:
        while loader.check_node():
            node = loader.get_node()
            assert node is not None
            _measure(node, {})
            documents.append(loader.construct_document(node))
    finally:
        loader.dispose()
    return documents


def _without_pairs(text: str | bytes) -> str:
    """The text with characters that JSON writes as two halves written as YAML writes them."""
    whole = text.decode("utf-8") if isinstance(text, bytes) else text
    return _PAIR.sub(
        lambda found: f"\\U{0x10000 + ((int(found[1], 16) & 0x3FF) << 10) + (int(found[2], 16) & 0x3FF):08x}", whole
    )


def _refuse_deep(text: str) -> None:
    """Raise `ValueError` before anything walks down a text that is nested deeper than a stack is."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"it has more than {DEEPEST} levels")


def _refuse_unstorable(value: Any) -> None:
    """Raise `ValueError` for what no database keeps and no JSON says."""
    if isinstance(value, str) and _UNSTORABLE.search(value):
        raise ValueError(f"the text {value[:50]!r} has a character U+0000 or half a character in it")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"a number is larger than {LARGEST}")
    if isinstance(value, dict | list):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _refuse_unstorable(part)
    elif not isinstance(value, str | int | float | None):
        raise ValueError(
            f"a tag makes a {type(value).__name__} of a value: only texts, numbers, lists and maps are taken"
        )


def _measure(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for.

    Raises:
        ValueError: too many, or itself.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if known.get(id(node)) == 0:
        raise ValueError("an alias stands for what it is a part of")
    if id(node) not in known:
        known[id(node)] = 0
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_measure(part, known) for part in parts)
    if known[id(node)] > MOST_VALUES:
        raise ValueError(f"its aliases make more than {MOST_VALUES} values of it")
    return known[id(node)]


def checked(model: type[Document], content: Mapping[str, Any]) -> Document:
    """The content as this model.

    Raises:
        MissingParameter, UnknownParameter, InvalidValue: it is not; the error names the field.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> InvalidRequest:
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "missing":
            return MissingParameter(f"Missing required parameter: '{name}'.", param=name)
        case "extra_forbidden":
            return UnknownParameter(f"Unknown parameter: '{name}'.", param=name)
    message = problem["msg"].removeprefix("Value error, ")
    return InvalidValue(f"Invalid value for '{name}': {message}.", param=name)
