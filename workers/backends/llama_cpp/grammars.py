"""The grammar that an answer must follow: a GBNF grammar as it is, or what a JSON schema makes of it. Pure.

Owns how much a schema may repeat, for the converter writes every repetition out. Grammars are judged by `limits`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import grpc
from limits import check_grammar
from llama_cpp import LlamaGrammar
from serving import Refusal

MOST_REPEATS = 500  # that a schema may ask for
REPEATING = ("minItems", "maxItems", "minLength", "maxLength")
_REPEATS = re.compile(r"\{(\d+)?(?:,(\d+)?)?\}")


def grammar_of(fields: Mapping[str, Any]) -> str | None:
    """The grammar that a body asks for; None if it asks for none.

    Raises:
        Refusal: INVALID_ARGUMENT, with what is wrong with it.
    """
    grammar, schema = fields.get("grammar"), _schema(fields.get("response_format"))
    if grammar is not None and schema is not None:
        raise _refuse("grammar and response_format exclude each other")
    if schema is not None:
        grammar = _converted(schema)
        check_grammar(grammar)
    if grammar is not None and (not isinstance(grammar, str) or not grammar.strip()):
        raise _refuse("grammar must be a string that is not empty")
    return grammar


def _refuse(message: str) -> Refusal:
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, message)


def _schema(form: Any) -> Any:
    """The JSON schema of a `response_format`; None for text."""
    match form:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return form.get("schema") or {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return schema
    raise _refuse("response_format must be an object of type text, json_object or json_schema with its schema")


def _converted(schema: Any) -> str:
    try:
        _check_repeats(schema)
        return LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False)._grammar
    except Refusal:
        raise
    except RecursionError as error:
        raise _refuse("the JSON schema goes too deep to be enforced") from error
    except Exception as error:
        raise _refuse(f"this JSON schema cannot be enforced ({type(error).__name__}: {error})") from error


def _check_repeats(schema: Any) -> None:
    """Refuse a schema whose grammar would be very long."""
    if isinstance(schema, list):
        for each in schema:
            _check_repeats(each)
    elif isinstance(schema, dict):
        asked = [schema[name] for name in REPEATING if isinstance(schema.get(name), int)]
        if isinstance(pattern := schema.get("pattern"), str):
            counts = [int(number) for found in _REPEATS.findall(pattern) for number in found if number]
            asked.append(math.prod(max(count, 1) for count in counts))  # they may stand within each other
        if max(asked, default=0) > MOST_REPEATS:
            raise _refuse(f"this JSON schema cannot be enforced: it repeats something more than {MOST_REPEATS} times")
        for each in schema.values():
            _check_repeats(each)
