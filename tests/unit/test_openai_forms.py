"""Whatever OpenAI's client has a type for is served, or refused as unsupported by the name of a field: never unknown,
never of a wrong type. The values are made from the client's own types, one field after the other."""

import json
from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, Required, Union, get_args, get_origin, get_type_hints

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params

from api.openai.schemas import parse_chat, parse_completion, parse_embedding
from localai_q.errors import UnsupportedParameter

PLAIN = {str: ["a"], int: [1], float: [1.0], bool: [False, True], object: [{}], NoneType: [None]}
FUNCTION = {"type": "function", "function": {"name": "a"}}
# What a field needs beside it.
BESIDE = {
    "tool_choice": {"tools": [FUNCTION]},
    "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
}
BODIES = {
    "chat": (parse_chat, {"messages": [{"role": "user", "content": "a"}]}),
    "completion": (parse_completion, {"prompt": "a"}),
    "embedding": (parse_embedding, {"input": "a"}),
}
FORMS = {
    "chat": [chat_create_params.CompletionCreateParamsNonStreaming, chat_create_params.CompletionCreateParamsStreaming],
    "completion": [
        completion_create_params.CompletionCreateParamsNonStreaming,
        completion_create_params.CompletionCreateParamsStreaming,
    ],
    "embedding": [embedding_create_params.EmbeddingCreateParams],
}


def values(form: Any) -> Iterator[Any]:
    """Values of a type: each of its literals and each of its forms once, each field of an object once beside those required."""
    if form in PLAIN:
        yield from PLAIN[form]
    elif hasattr(form, "__required_keys__"):  # a TypedDict
        yield from objects(form)
    elif get_origin(form) is Literal:
        yield from get_args(form)
    elif get_origin(form) is Union:
        for each in get_args(form):
            yield from values(each)
    elif get_origin(form) is dict:
        for value in values(get_args(form)[1]):
            yield {"1": value}
    else:  # an array of some kind
        (item,) = get_args(form)
        for value in values(item):
            yield [value]


def required(form: Any) -> set[str]:
    """The fields that an object must have. Its own list of them does not see into annotations that are texts."""
    hints = get_type_hints(form, include_extras=True)
    return {name for name, hint in hints.items() if get_origin(hint) is Required}


def objects(form: Any) -> Iterator[dict[str, Any]]:
    least = {name: next(values(get_type_hints(form)[name])) for name in required(form)}
    yield least
    for name, hint in get_type_hints(form).items():
        for value in values(hint):
            yield {**least, name: value}


def is_silent(message: dict[str, Any]) -> bool:
    """Whether an assistant's message has nothing of what it must have one."""
    said = ("content", "refusal", "tool_calls", "function_call", "audio")
    return message["role"] == "assistant" and not any(message.get(name) for name in said)


def refusal(kind: str, fields: dict[str, Any]) -> str | None:
    """The field by whose name these are refused as unsupported; None if they are served."""
    parse, required = BODIES[kind]
    try:
        parse(json.dumps({"model": "m", **required, **fields}).encode())
    except UnsupportedParameter as error:
        return error.param or "nothing"
    return None


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_that_openais_client_knows_is_served_or_unsupported_by_name(kind: str) -> None:
    tried, refused = 0, set()
    for form in FORMS[kind]:
        for name, hint in get_type_hints(form).items():
            for value in values(hint):
                if (value is None and name in required(form)) or (name == "messages" and is_silent(value[0])):
                    continue  # something is missing, at OpenAI too
                param = refusal(kind, {**BESIDE.get(name, {}), name: value})
                refused.add(param)
                tried += 1
                assert param is None or param.partition(".")[0].partition("[")[0] == name, f"{name}={value!r}: {param}"
    assert tried > {"chat": 200, "completion": 40, "embedding": 8}[kind]
    assert refused > {None}, "some are served, some are not"
