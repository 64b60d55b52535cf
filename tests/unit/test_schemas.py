"""Bodies become requests, and each mistake becomes one error in OpenAI's style that names the field."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params

from api.openai.schemas import (
    ACCEPTED_WITHOUT_EFFECT,
    UNSUPPORTED,
    honoured,
    parse_chat,
    parse_completion,
    parse_embedding,
)
from localai_q.cluster.requests import SEEDS
from localai_q.errors import (
    InvalidJSON,
    InvalidRequest,
    InvalidType,
    InvalidValue,
    MissingParameter,
    StartupError,
    UnknownParameter,
    UnsupportedParameter,
    all_errors,
)

MESSAGES = [{"role": "user", "content": "hi"}]
F = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
G = {"type": "function", "function": {"name": "g"}}
DOCS = Path(__file__).parents[2] / "docs" / "api.md"


def chat(**fields):
    return parse_chat(json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode())


def message(**fields):
    return chat(messages=[fields])


def completion(**fields):
    return parse_completion(json.dumps({"model": "m", "prompt": "Once", **fields}).encode())


def embedding(**fields):
    return parse_embedding(json.dumps({"model": "m", "input": "a", **fields}).encode())


BAD_CHATS = [
    ({"temperature": "0.7"}, InvalidType, "temperature", "Invalid type for 'temperature': expected a decimal, but got a string instead."),
    ({"temperature": True}, InvalidType, "temperature", "but got a boolean"),
    ({"temperature": 2.1}, InvalidValue, "temperature", "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 2.1 instead."),
    ({"temperature": -1}, InvalidValue, "temperature", "Expected a value >= 0, but got -1 instead."),
    ({"top_p": 1.5}, InvalidValue, "top_p", "<= 1"),
    ({"frequency_penalty": 3}, InvalidValue, "frequency_penalty", "<= 2"),
    ({"presence_penalty": -3}, InvalidValue, "presence_penalty", ">= -2"),
    ({"n": 0}, InvalidValue, "n", "Invalid 'n': integer below minimum value. Expected a value >= 1, but got 0 instead."),
    ({"n": 17}, InvalidValue, "n", "<= 16"),
    ({"n": True}, InvalidType, "n", "expected an integer, but got a boolean"),
    ({"n": 1.0}, InvalidType, "n", "but got a decimal"),
    ({"stream": "yes"}, InvalidType, "stream", "expected a boolean, but got a string"),
    ({"model": ""}, InvalidValue, "model", "empty string"),
    ({"model": None}, MissingParameter, "model", "Missing required parameter: 'model'."),
    ({"model": 3}, InvalidType, "model", "expected a string, but got an integer"),
    ({"foo": 1}, UnknownParameter, "foo", "Unknown parameter: 'foo'."),
    ({"foo": None}, UnknownParameter, "foo", "Unknown parameter: 'foo'."),
    ({"id": "x"}, UnknownParameter, "id", "Unknown parameter"),
    ({"audio": {"voice": "a"}}, UnsupportedParameter, "audio", "Unsupported parameter: 'audio' is not served by this cluster"),
    ({"functions": []}, UnsupportedParameter, "functions", "use 'tools'"),
    ({"function_call": "auto"}, UnsupportedParameter, "function_call", "use 'tool_choice'"),
    ({"store": True}, UnsupportedParameter, "store", "not stored"),
    ({"service_tier": "flex"}, UnsupportedParameter, "service_tier", "'flex'"),
    ({"service_tier": "gold"}, InvalidValue, "service_tier", "Supported values are: 'auto', 'default'"),
    ({"verbosity": "low"}, UnsupportedParameter, "verbosity", "leave it out"),
    ({"modalities": ["text", "audio"]}, UnsupportedParameter, "modalities", "answers are text"),
    ({"metadata": {"a": 1}}, InvalidType, "metadata.a", "expected a string"),
    ({"metadata": {str(i): "" for i in range(17)}}, InvalidValue, "metadata", "at most 16"),
    ({"messages": "hi"}, InvalidType, "messages", "Invalid type for 'messages': expected an array of objects, but got a string instead."),
    ({"messages": []}, InvalidValue, "messages", "Invalid 'messages': empty array. Expected an array with minimum length 1."),
    ({"messages": None}, MissingParameter, "messages", "'messages'"),
    ({"messages": ["hi"]}, InvalidType, "messages[0]", "expected an object, but got a string"),
    ({"messages": [*MESSAGES, {"role": "user"}]}, MissingParameter, "messages[1].content", "'messages[1].content'"),
    ({"tools": []}, InvalidValue, "tools", "minimum length 1"),
    ({"tools": {}}, InvalidType, "tools", "expected an array of objects, but got an object"),
    ({"tools": [F] * 129}, InvalidValue, "tools", "at most 128"),
    ({"tools": [F, F]}, InvalidValue, "tools", "same name"),
    ({"tools": [F, {"type": "function", "function": {}}]}, MissingParameter, "tools[1].function.name", "Missing"),
    ({"tools": [F, {"type": "function", "function": {"name": "a b"}}]}, InvalidValue, "tools[1].function.name", "^[a-zA-Z0-9_-]{1,64}$"),
    ({"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]}, UnknownParameter, "tools[0].function.x", "Unknown"),
    ({"tools": [{"type": "custom", "custom": {}}]}, UnsupportedParameter, "tools[0].type", "Custom tools"),
    ({"tools": [F], "tool_choice": "any"}, InvalidValue, "tool_choice", "Supported values are: 'none', 'auto' and 'required'."),
    ({"tools": [F], "tool_choice": 3}, InvalidType, "tool_choice", "expected one of a string or an object"),
    ({"tools": [F], "tool_choice": G}, InvalidValue, "tool_choice.function.name", "Tool choice 'g' not found in 'tools' parameter."),
    ({"tools": [F], "tool_choice": {"type": "allowed_tools"}}, UnsupportedParameter, "tool_choice.type", "allowed_tools"),
    ({"tool_choice": "required"}, InvalidValue, "tool_choice", "only allowed when 'tools' are specified"),
    ({"tools": [F], "logprobs": True}, UnsupportedParameter, "logprobs", "together with 'tools'"),
    ({"tools": [F], "grammar": "x"}, InvalidValue, "grammar", "exclude each other"),
    ({"response_format": {"type": "json_object"}, "grammar": "x"}, InvalidValue, "grammar", "exclude each other"),
    ({"response_format": "json"}, InvalidType, "response_format", "expected an object"),
    ({"response_format": {}}, MissingParameter, "response_format.type", "Missing"),
    ({"response_format": {"type": "xml"}}, InvalidValue, "response_format.type", "'json_schema'"),
    ({"response_format": {"type": "json_schema"}}, MissingParameter, "response_format.json_schema", "Missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": []}}}, InvalidType, "response_format.json_schema.schema", "expected an object, but got an array"),
    ({"top_logprobs": 2}, InvalidValue, "top_logprobs", "only allowed when 'logprobs' is true"),
    ({"logprobs": True, "top_logprobs": 21}, InvalidValue, "top_logprobs", "<= 20"),
    ({"logprobs": 1}, InvalidType, "logprobs", "expected a boolean"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, InvalidValue, "max_tokens", "send only 'max_completion_tokens'"),
    ({"max_tokens": 0}, InvalidValue, "max_tokens", ">= 1"),
    ({"max_completion_tokens": -1}, InvalidValue, "max_completion_tokens", ">= 1"),
    ({"seed": 2**63}, InvalidValue, "seed", "<= 9223372036854775807"),
    ({"seed": 1.5}, InvalidType, "seed", "expected an integer"),
    ({"stop": ""}, InvalidValue, "stop", "empty string"),
    ({"stop": ["a"] * 17}, InvalidValue, "stop", "at most 16"),
    ({"stop": ["a", 3]}, InvalidType, "stop[1]", "expected a string"),
    ({"stop": 3}, InvalidType, "stop", "one of a string or an array of strings"),
    ({"logit_bias": {"hello": 1}}, InvalidValue, "logit_bias", "'hello'"),
    ({"logit_bias": {"1": 101}}, InvalidValue, "logit_bias.1", "<= 100"),
    ({"logit_bias": []}, InvalidType, "logit_bias", "expected an object"),
    ({"stream_options": {"include_usage": True}}, InvalidValue, "stream_options", "only allowed when 'stream' is true"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, UnsupportedParameter, "stream_options.include_obfuscation", "not padded"),
    ({"stream": True, "stream_options": {"x": 1}}, UnknownParameter, "stream_options.x", "Unknown"),
    ({"reasoning_effort": "huge"}, InvalidValue, "reasoning_effort", "'minimal'"),
    ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}, InvalidValue, "reasoning_effort", "send one"),
    ({"chat_template_kwargs": {"enable_thinking": "no"}}, InvalidValue, "chat_template_kwargs", "true or false"),
    ({"samplers": ["top_q"]}, InvalidValue, "samplers[0]", "'top_k'"),
    ({"mirostat": 3}, InvalidValue, "mirostat", "0, 1 and 2"),
    ({"min_p": 1.5}, InvalidValue, "min_p", "<= 1"),
    ({"repeat_penalty": 0}, InvalidValue, "repeat_penalty", "> 0"),
    ({"top_k": 2**31}, InvalidValue, "top_k", "<= 2147483647"),
    ({"dry_sequence_breakers": []}, InvalidValue, "dry_sequence_breakers", "minimum length 1"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "kind", "param", "words"), BAD_CHATS, ids=[str(row[0])[:60] for row in BAD_CHATS])
def test_a_mistake_in_a_chat_is_one_error_that_names_the_field(fields, kind, param, words):
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert (type(caught.value), caught.value.param) == (kind, param)
    assert words in caught.value.message
    assert caught.value.message.endswith(".")


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_MESSAGES = [
    ({"content": "a"}, MissingParameter, "role"),
    ({"role": "pirate", "content": "a"}, InvalidValue, "role"),
    ({"role": 3, "content": "a"}, InvalidType, "role"),
    ({"role": "function", "name": "f", "content": "a"}, UnsupportedParameter, "role"),
    ({"role": "user", "content": 3}, InvalidType, "content"),
    ({"role": "user", "content": None}, InvalidType, "content"),
    ({"role": "user", "content": []}, InvalidValue, "content"),
    ({"role": "user", "content": ["a"]}, InvalidType, "content[0]"),
    ({"role": "user", "content": [{"type": "text"}]}, MissingParameter, "content[0].text"),
    ({"role": "user", "content": [{"type": "text", "text": 1}]}, InvalidType, "content[0].text"),
    ({"role": "user", "content": [{"text": "a"}]}, MissingParameter, "content[0].type"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, UnsupportedParameter, "content[0].type"),
    ({"role": "user", "content": [{"type": "input_audio"}]}, UnsupportedParameter, "content[0].type"),
    ({"role": "user", "content": [{"type": "file"}]}, UnsupportedParameter, "content[0].type"),
    ({"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}, InvalidValue, "content[0].type"),
    ({"role": "user", "content": "a", "color": "red"}, UnknownParameter, "color"),
    ({"role": "user", "content": "a", "name": 1}, InvalidType, "name"),
    ({"role": "tool", "content": "a"}, MissingParameter, "tool_call_id"),
    ({"role": "assistant"}, MissingParameter, "content"),
    ({"role": "assistant", "content": None, "tool_calls": []}, InvalidValue, "tool_calls"),
    ({"role": "assistant", "tool_calls": [{**CALL, "id": 1}]}, InvalidType, "tool_calls[0].id"),
    ({"role": "assistant", "tool_calls": [{"id": "c", "type": "custom"}]}, UnsupportedParameter, "tool_calls[0].type"),
    ({"role": "assistant", "content": "a", "function_call": {}}, UnsupportedParameter, "function_call"),
    ({"role": "assistant", "content": "a", "audio": {"id": "x"}}, UnsupportedParameter, "audio"),
]


@pytest.mark.parametrize(("fields", "kind", "param"), BAD_MESSAGES, ids=[str(row[0])[:60] for row in BAD_MESSAGES])
def test_a_mistake_in_a_message_is_one_error_that_names_the_field(fields, kind, param):
    with pytest.raises(InvalidRequest) as caught:
        message(**fields)
    assert (type(caught.value), caught.value.param) == (kind, f"messages[0].{param}")
    assert f"messages[0].{param}" in caught.value.message or kind is InvalidValue


BAD_BYTES = {
    "nothing": (b"", InvalidJSON),
    "half": (b'{"model": ', InvalidJSON),
    "not UTF-8": (b'{"model": "\xff"}', InvalidJSON),
    "UTF-16": ('{"model": "m"}'.encode("utf-16"), InvalidJSON),
    "an array": (b"[]", InvalidType),
    "a string": (b'"x"', InvalidType),
    "null": (b"null", InvalidType),
    "NaN": (b'{"temperature": NaN}', InvalidJSON),
    "Infinity": (b'{"temperature": -Infinity}', InvalidJSON),
    "a huge decimal": (b'{"temperature": 1e999}', InvalidJSON),
    "a huge integer": (b'{"n": ' + b"9" * 5000 + b"}", InvalidJSON),
    "deep arrays": (b"[" * 200_000, InvalidJSON),
    "deep objects": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, InvalidJSON),
    "101 levels": (b'{"tools":' + b"[" * 100 + b"]" * 100 + b"}", InvalidJSON),
    "a NUL": (b'{"model": "a\\u0000b"}', InvalidValue),
    "half a pair": (b'{"model": "m", "messages": [{"role": "user", "content": "\\uD800"}]}', InvalidValue),
    "half a pair in a name": (b'{"\\udfff": 1}', InvalidValue),
}


@pytest.mark.parametrize(("data", "kind"), BAD_BYTES.values(), ids=BAD_BYTES.keys())
@pytest.mark.parametrize("parse", [parse_chat, parse_completion, parse_embedding])
def test_bytes_that_cannot_be_a_body_are_one_error(parse, data, kind):
    with pytest.raises(kind):
        parse(data)


def test_a_whole_surrogate_pair_and_a_hundred_levels_are_fine():
    assert message(role="user", content="\U0001f600").body["messages"][0]["content"] == "\U0001f600"
    schema = json.loads('{"items":' * 90 + "{}" + "}" * 90)
    assert chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})


def test_the_last_of_duplicate_keys_counts():
    assert parse_completion(b'{"model": "m", "prompt": "a", "prompt": "b"}').inputs == ("b",)


def test_a_million_mistakes_are_one_error_and_little_memory():
    for body in (
        b'{"model":"m","messages":[' + b"0," * 1_000_000 + b"0]}",
        b'{"model":"m","messages":[{' + b",".join(b'"k%d":0' % i for i in range(200_000)) + b"}]}",
        b'{"model":"m","messages":[],"logit_bias":{' + b",".join(b'"k%d":"x"' % i for i in range(200_000)) + b"}}",
    ):
        with pytest.raises(InvalidRequest) as caught:
            parse_chat(body)
        assert len(caught.value.message) < 300


# --- what becomes of a good body ---


def test_the_engine_gets_what_has_an_effect_and_nothing_else():
    request = chat(
        temperature=0, stop="x", seed=-1, n=2, stream=True, stream_options={"include_usage": True}, top_k=5,
        user="u", metadata={"a": "b"}, store=False, service_tier="auto", safety_identifier="s", modalities=["text"],
        prompt_cache_key="k", prompt_cache_retention="24h", prompt_cache_options={"mode": "implicit"},
        verbosity="medium", max_completion_tokens=9, response_format={"type": "text"}, tool_choice="auto",
    )  # fmt: skip
    assert request.body == {
        "messages": MESSAGES, "temperature": 0, "stop": ["x"], "seed": SEEDS - 1, "top_k": 5, "max_tokens": 9,
    }  # fmt: skip
    assert (request.kind, request.model, request.n) == ("chat", "m", 2)
    assert (request.stream, request.include_usage, request.logprobs) == (True, True, None)


@pytest.mark.parametrize("kind", ["chat", "completion", "embedding"])
def test_null_counts_as_absent_for_every_known_optional_parameter(kind):
    parse = {"chat": chat, "completion": completion, "embedding": embedding}[kind]
    required = {"model", "messages", "prompt", "input"}
    names = {*honoured(kind), *ACCEPTED_WITHOUT_EFFECT[kind], *UNSUPPORTED[kind]} - required
    assert parse(**dict.fromkeys(names)) == parse()


def test_messages_reach_the_engine_in_the_form_that_chat_templates_take():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    sent = [
        {"role": "developer", "content": "be brief", "name": "boss"},
        {"role": "user", "content": parts},
        {"role": "user", "content": parts[:1]},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "annotations": [], "audio": None},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
        {"role": "assistant", "content": [*parts, {"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": None, "refusal": "never"},
    ]
    assert chat(messages=sent).body["messages"] == [
        {"role": "system", "content": "be brief", "name": "boss"},
        {"role": "user", "content": parts},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
        {"role": "assistant", "content": "abno"},
        {"role": "assistant", "content": "never"},
    ]


def test_a_named_tool_choice_becomes_the_only_tool_and_required():
    body = chat(tools=[F, G], tool_choice={"type": "function", "function": {"name": "g"}}).body
    assert body["tool_choice"] == "required"
    empty = {"type": "object", "properties": {}}
    assert body["tools"] == [{"type": "function", "function": {"name": "g", "parameters": empty}}]


def test_tools_pass_with_their_choice():
    body = chat(tools=[F, G], tool_choice="none", parallel_tool_calls=False, grammar="x").body
    assert [tool["function"]["name"] for tool in body["tools"]] == ["f", "g"]
    assert (body["tool_choice"], body["parallel_tool_calls"], body["grammar"]) == ("none", False, "x")


@pytest.mark.parametrize(("asked", "engine"), [({}, 1), ({"top_logprobs": 0}, 1), ({"top_logprobs": 5}, 5)])
def test_the_engine_is_asked_for_one_alternative_at_least(asked, engine):
    request = chat(logprobs=True, **asked)
    assert (request.body["logprobs"], request.body["top_logprobs"]) == (True, engine)
    assert request.logprobs == asked.get("top_logprobs", 0)
    assert "logprobs" not in chat(logprobs=False).body


def test_a_reasoning_effort_reaches_the_chat_template():
    assert chat(reasoning_effort="high").body["chat_template_kwargs"] == {"reasoning_effort": "high"}
    assert chat(reasoning_effort="none").body["chat_template_kwargs"] == {"enable_thinking": False}
    assert chat(chat_template_kwargs={"x": 1}).body["chat_template_kwargs"] == {"x": 1}


def test_response_formats_reach_the_engine():
    wanted = {"name": "a", "schema": {"type": "object"}}
    assert chat(response_format={"type": "json_object"}).body["response_format"] == {"type": "json_object"}
    body = chat(response_format={"type": "json_schema", "json_schema": {**wanted, "strict": True}}).body
    assert body["response_format"] == {"type": "json_schema", "json_schema": wanted}


@pytest.mark.parametrize(
    ("prompt", "inputs"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3)))],
)
def test_every_form_of_a_prompt_becomes_a_tuple_of_inputs(prompt, inputs):
    assert completion(prompt=prompt).inputs == inputs
    assert embedding(input=prompt).inputs == inputs


def test_a_completion_has_its_log_probabilities_and_leaves_its_length_to_its_model():
    request = completion(logprobs=0, echo=False, best_of=2, n=2)
    assert request.body == {"logprobs": 1}
    assert (request.logprobs, request.echo, request.n) == (0, False, 2)
    assert completion(max_tokens=3, echo=True).body == {"max_tokens": 3}


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"prompt": None}, MissingParameter, "prompt"),
        ({"prompt": 3}, InvalidType, "prompt"),
        ({"prompt": []}, InvalidValue, "prompt"),
        ({"prompt": ["a", 3]}, InvalidType, "prompt[1]"),
        ({"prompt": ["a", []]}, InvalidValue, "prompt[1]"),
        ({"prompt": [1, "a"]}, InvalidValue, "prompt"),
        ({"prompt": [1, True]}, InvalidValue, "prompt"),
        ({"prompt": [-1]}, InvalidValue, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, InvalidValue, "prompt"),
        ({"suffix": "x"}, UnsupportedParameter, "suffix"),
        ({"best_of": 2}, UnsupportedParameter, "best_of"),
        ({"logprobs": 6}, InvalidValue, "logprobs"),
        ({"logprobs": True}, InvalidType, "logprobs"),
        ({"echo": True, "logprobs": 1}, UnsupportedParameter, "echo"),
        ({"echo": True, "prompt": [1]}, UnsupportedParameter, "echo"),
        ({"messages": []}, UnknownParameter, "messages"),
        ({"tools": []}, UnknownParameter, "tools"),
    ],
)
def test_a_mistake_in_a_completion_is_one_error_that_names_the_field(fields, kind, param):
    with pytest.raises(InvalidRequest) as caught:
        completion(**fields)
    assert (type(caught.value), caught.value.param) == (kind, param)


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"input": None}, MissingParameter, "input"),
        ({"input": ""}, InvalidValue, "input"),
        ({"input": ["a"] * 2049}, InvalidValue, "input"),
        ({"dimensions": 8}, UnsupportedParameter, "dimensions"),
        ({"encoding_format": "hex"}, InvalidValue, "encoding_format"),
        ({"stream": True}, UnknownParameter, "stream"),
    ],
)
def test_a_mistake_in_an_embedding_is_one_error_that_names_the_field(fields, kind, param):
    with pytest.raises(InvalidRequest) as caught:
        embedding(**fields)
    assert (type(caught.value), caught.value.param) == (kind, param)


# --- the promise: each parameter of OpenAI's API is in exactly one list ---

OPENAI = {
    "chat": [chat_create_params.CompletionCreateParamsNonStreaming, chat_create_params.CompletionCreateParamsStreaming],
    "completion": [
        completion_create_params.CompletionCreateParamsNonStreaming,
        completion_create_params.CompletionCreateParamsStreaming,
    ],
    "embedding": [embedding_create_params.EmbeddingCreateParams],
}


@pytest.mark.parametrize("kind", OPENAI)
def test_every_parameter_of_openais_client_is_honoured_accepted_or_refused_by_name(kind):
    lists = {"honoured": honoured(kind), "accepted": ACCEPTED_WITHOUT_EFFECT[kind], "unsupported": UNSUPPORTED[kind]}
    names = {name for params in OPENAI[kind] for name in params.__annotations__}
    assert len(names) > 4
    for name in sorted(names):
        where = [title for title, entries in lists.items() if name in entries]
        assert len(where) == 1, f"'{name}' of OpenAI's {kind} API stands in {where or 'no list'}"


@pytest.mark.parametrize("kind", OPENAI)
def test_the_lists_do_not_overlap_and_stand_in_the_docs(kind):
    text = DOCS.read_text()
    names = [*honoured(kind), *ACCEPTED_WITHOUT_EFFECT[kind], *UNSUPPORTED[kind]]
    assert len(names) == len(set(names))
    titles = {"chat": "## Chat completions", "completion": "## Completions", "embedding": "## Embeddings"}
    section = text.partition(f"{titles[kind]}\n")[2].partition("\n## ")[0]
    shared = text.partition("## Sampling\n")[2].partition("\n## ")[0] if kind != "embedding" else ""
    missing = [name for name in names if f"`{name}`" not in section + shared]
    assert not missing, f"docs/api.md says nothing of {missing}"


def test_every_error_that_a_client_can_get_stands_in_the_docs():
    table = DOCS.read_text().partition("## Errors\n")[2].partition("\n## ")[0].splitlines()
    for error in all_errors().values():
        if error.code and not issubclass(error, StartupError):
            rows = [row for row in table if f"`{error.code}`" in row]
            assert rows, f"docs/api.md says nothing of {error.code}"
            assert rows[0].startswith(f"| {error.status} | `{error.type}` |")


# --- whatever comes in, an error of ours comes out ---

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8)
junk = st.recursive(
    scalars,
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=6), child, max_size=3),
    max_leaves=8,
)
known = {kind: [*honoured(kind), *ACCEPTED_WITHOUT_EFFECT[kind], *UNSUPPORTED[kind]] for kind in OPENAI}
parts_ = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(["text", "refusal", "image_url"]) | junk, "text": junk, "refusal": junk}
)
message_ = st.fixed_dictionaries({}, optional={
    "role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"]) | junk,
    "content": st.text(max_size=5) | st.lists(parts_, max_size=2) | junk,
    "tool_calls": st.lists(st.fixed_dictionaries({}, optional={"id": junk, "type": junk, "function": junk}), max_size=2) | junk,
    "name": junk, "tool_call_id": junk, "refusal": junk, "audio": junk,
})  # fmt: skip
tool_ = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["function", "custom"]) | junk,
        "function": st.fixed_dictionaries(
            {}, optional={"name": junk | st.just("f"), "parameters": junk, "strict": junk}
        )
        | junk,
    },
)
shaped = st.fixed_dictionaries({"model": st.just("m") | junk}, optional={
    "messages": st.lists(message_, max_size=3) | junk, "tools": st.lists(tool_, max_size=3) | junk,
    "tool_choice": st.sampled_from(["none", "auto", "required", {"type": "function", "function": {"name": "f"}}]) | junk,
    "response_format": st.fixed_dictionaries({}, optional={"type": st.sampled_from(["text", "json_object", "json_schema"]) | junk, "json_schema": junk}) | junk,
    "logit_bias": junk, "stop": junk, "prompt": junk, "input": junk,
})  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["chat", "completion", "embedding"]).flatmap(
        lambda kind: st.tuples(
            st.just(kind), shaped, st.dictionaries(st.sampled_from(known[kind]) | st.text(max_size=4), junk, max_size=4)
        )
    )
)
def test_no_json_makes_anything_but_a_request_or_one_of_our_errors(case):
    kind, base, extra = case
    drop = {
        "chat": ("prompt", "input"),
        "completion": ("messages", "tools", "tool_choice", "response_format", "input"),
        "embedding": ("messages", "tools", "tool_choice", "response_format", "logit_bias", "stop", "prompt"),
    }[kind]
    body = {**{name: value for name, value in base.items() if name not in drop}, **extra}
    parse = {"chat": parse_chat, "completion": parse_completion, "embedding": parse_embedding}[kind]
    try:
        request = parse(json.dumps(body).encode())
    except InvalidRequest as caught:
        said = caught.body()["error"]
        complete = bool(said["message"] and said["code"])
    else:
        complete = len(request.bodies()) == request.count and bool(json.dumps(request.to_json()))
    assert complete


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40) | st.text(alphabet='{}[]",:\\ud8012eE+-.nul trfas', max_size=40).map(str.encode))
def test_no_bytes_make_anything_but_a_request_or_one_of_our_errors(data):
    with pytest.raises(InvalidRequest):
        parse_chat(data)
