"""From bytes to a JSON object that every later step can carry: finite, not too deep, and storable as text.

It owns what counts as JSON here. What the object must hold is the affair of `api.openai.schemas` and `api.bodies`.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from localai_q.errors import InvalidJSON, InvalidType, InvalidValue

MAX_DEPTH = 100  # levels: engines and encoders recurse, and a request is encoded many times on its way

# Only escapes can bring these in: strict UTF-8 has no lone surrogates, and JSON no raw control characters.
_SUSPECT = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")

_NAMES = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a decimal",
    list: "an array",
    dict: "an object",
}


def name_of_type(value: Any) -> str:
    """What a JSON value is, in words: "an integer", "null"."""
    return _NAMES.get(type(value), "null" if value is None else "something else")


def path_of(parts: tuple[str | int, ...]) -> str:
    """A place in a body as OpenAI writes it: `messages[0].content`."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def load_object(data: bytes) -> dict[str, Any]:
    """The object that `data` is.

    Raises:
        InvalidJSON: not UTF-8, not JSON, a number that is not finite, or nested deeper than `MAX_DEPTH`.
        InvalidType: JSON, but no object.
        InvalidValue: a text holds U+0000 or half a surrogate pair, which no database keeps.
    """
    value = _loads(data)
    if not isinstance(value, dict):
        raise InvalidType(f"Invalid type for the body: expected an object, but got {name_of_type(value)} instead.")
    # Every level costs one bracket: most bodies have too few of them to need a look.
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _refuse_deep(value)
    if _SUSPECT.search(data):
        _refuse_unstorable(value)
    return value


def _loads(data: bytes) -> Any:
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError:
        raise InvalidJSON("The body is not valid UTF-8. Send JSON, encoded as UTF-8.") from None
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise InvalidJSON(f"The body is not valid JSON: {where}.") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:
        # Python reads no integer of more than 4300 digits.
        raise InvalidJSON("The body is not valid JSON: a number has too many digits.") from None


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidJSON(f"The body is not valid JSON: {name} is no JSON number.")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise InvalidJSON(f"The body is not valid JSON: the number {digits[:40]} is too large.")
    return value


def _too_deep() -> InvalidJSON:
    return InvalidJSON(f"The body is nested too deeply: at most {MAX_DEPTH} levels are allowed.")


def _refuse_deep(body: Any) -> None:
    level = [body]
    for _ in range(MAX_DEPTH):
        level = [child for value in level for child in _children(value) if isinstance(child, dict | list)]
        if not level:
            return
    raise _too_deep()


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


def _refuse_unstorable(body: dict[str, Any]) -> None:
    stack: list[tuple[Any, tuple[str | int, ...]]] = [(body, ())]
    while stack:
        value, path = stack.pop()
        if isinstance(value, str):
            _refuse_text(value, path)
        elif isinstance(value, list):
            stack.extend((item, (*path, index)) for index, item in enumerate(value))
        elif isinstance(value, dict):
            for name, item in value.items():
                _refuse_text(name, path)
                stack.append((item, (*path, name)))


def _refuse_text(text: str, path: tuple[str | int, ...]) -> None:
    found = _UNSTORABLE.search(text)
    if found is None:
        return
    param = path_of(path) or None
    where = f"'{param}'" if param else "body"
    character = f"U+{ord(found[0]):04X}"
    raise InvalidValue(f"Invalid {where}: it contains {character}, which cannot be stored. Remove it.", param=param)
