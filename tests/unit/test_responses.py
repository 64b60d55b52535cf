"""Answers and streams have OpenAI's shapes, as OpenAI's own client reads them."""

import base64
import json
import struct
from dataclasses import replace

import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from api.openai.responses import ChatStream, CompletionStream, response_for, stream_for
from api.sse import DONE, comment, sse
from localai_q.cluster.events import Delta, End, Finish, Progress, Usage, Vector
from localai_q.cluster.requests import GenerationRequest

CHAT = GenerationRequest(kind="chat", model='m "x"', body={"messages": []}, stream=True)
COMPLETION = GenerationRequest(kind="completion", model="m", inputs=("Once",), stream=True)
DONE_5 = End(state="done", usage=Usage(prompt=3, completion=2, cached=1))
USAGE_5 = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 1},
}
TOKEN = {
    "id": 57,
    "token": "Hi",
    "bytes": [72, 105],
    "logprob": -0.5,
    "top_logprobs": [
        {"id": 57, "token": "Hi", "bytes": [72, 105], "logprob": -0.5},
        {"id": 9, "token": "Yo", "bytes": [89, 111], "logprob": -1.5},
    ],
}
CALL = (
    {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}},
    {"index": 0, "function": {"arguments": '{"a":'}},
    {"index": 1, "id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    {"index": 0, "function": {"arguments": "1}"}},
)


def answer(request, *events):
    response = response_for(request, "j1", 1700000000)
    for event in events:
        response.feed(event)
    return response.body()


def chunks(request, *events):
    stream = stream_for(request, "j1", 1700000000)
    return [json.loads(text) for event in events if (text := stream.feed(event))]


def strict(model, body):
    """The body as OpenAI's client has it; raises where its types do not agree."""
    parsed = model.model_validate(body, strict=True)
    assert not parsed.model_extra, f"fields that OpenAI does not have: {parsed.model_extra}"
    return parsed


def test_a_chat_answer_is_a_chat_completion():
    body = answer(CHAT, Delta(text="Hel"), Delta(text="lo"), Finish(reason="length"), DONE_5)
    parsed = strict(ChatCompletion, body)
    assert parsed.id == "chatcmpl-j1"
    assert parsed.model == CHAT.model
    assert parsed.choices[0].message.content == "Hello"
    assert parsed.choices[0].finish_reason == "length"
    assert parsed.choices[0].logprobs is None
    assert body["usage"] == USAGE_5


def test_choices_are_sorted_whatever_order_their_pieces_come_in():
    events = [Delta(choice=1, text="b"), Finish(choice=1), Delta(text="a"), Finish(), DONE_5]
    parsed = strict(ChatCompletion, answer(replace(CHAT, n=2), *events))
    assert [(choice.index, choice.message.content) for choice in parsed.choices] == [(0, "a"), (1, "b")]


def test_pieces_of_tool_calls_are_merged_and_a_call_without_text_has_null_content():
    events = [Delta(tool_calls=(piece,)) for piece in CALL]
    parsed = strict(ChatCompletion, answer(CHAT, *events, Finish(reason="tool_calls"), DONE_5))
    message = parsed.choices[0].message
    assert message.content is None
    assert [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls] == [
        ("call_1", "f", '{"a":1}'),
        ("call_2", "g", "{}"),
    ]


def test_an_empty_answer_has_empty_content():
    assert answer(CHAT, Finish(), DONE_5)["choices"][0]["message"]["content"] == ""


def test_reasoning_stands_beside_the_content():
    message = answer(CHAT, Delta(reasoning="hm"), Delta(text="yes"), Finish(), DONE_5)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "yes")


@pytest.mark.parametrize("alternatives", [0, 1, 2])
def test_log_probabilities_have_as_many_alternatives_as_were_asked_for(alternatives):
    request = replace(CHAT, logprobs=alternatives)
    parsed = strict(ChatCompletion, answer(request, Delta(text="Hi", logprobs=(TOKEN,)), Finish(), DONE_5))
    [token] = parsed.choices[0].logprobs.content
    assert (token.token, token.logprob, token.bytes) == ("Hi", -0.5, [72, 105])
    assert len(token.top_logprobs) == alternatives
    [chunk] = [c for c in chunks(request, Delta(text="Hi", logprobs=(TOKEN,))) if c["choices"][0]["logprobs"]]
    assert strict(ChatCompletionChunk, chunk).choices[0].logprobs.content == parsed.choices[0].logprobs.content


def test_log_probabilities_that_nobody_asked_for_are_not_shown():
    assert answer(CHAT, Delta(text="Hi", logprobs=(TOKEN,)), Finish(), DONE_5)["choices"][0]["logprobs"] is None


def test_a_stream_begins_each_choice_with_its_role_and_ends_it_with_its_reason():
    sent = chunks(replace(CHAT, n=2), Delta(text="a"), Delta(text="b"), Finish(), Delta(choice=1, text="c"), DONE_5)
    for chunk in sent:
        strict(ChatCompletionChunk, chunk)
        assert (chunk["id"], chunk["created"], chunk["model"]) == ("chatcmpl-j1", 1700000000, CHAT.model)
        assert "usage" not in chunk
    assert [(c["choices"][0]["index"], c["choices"][0]["delta"], c["choices"][0]["finish_reason"]) for c in sent] == [
        (0, {"role": "assistant", "content": "a"}, None),
        (0, {"content": "b"}, None),
        (0, {}, "stop"),
        (1, {"role": "assistant", "content": "c"}, None),
    ]


def test_an_empty_choice_of_a_stream_still_has_a_role():
    assert [chunk["choices"][0]["delta"] for chunk in chunks(CHAT, Finish(), DONE_5)] == [
        {"role": "assistant", "content": ""}
    ]


def test_with_usage_every_chunk_has_a_null_and_the_last_one_has_the_numbers():
    sent = chunks(replace(CHAT, include_usage=True), Delta(text="a"), Delta(text="b"), Finish(), DONE_5)
    assert [chunk["usage"] for chunk in sent] == [None, None, None, USAGE_5]
    assert sent[-1]["choices"] == []
    strict(ChatCompletionChunk, sent[-1])


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_stream_that_did_not_succeed_tells_no_usage(state):
    assert chunks(replace(CHAT, include_usage=True), End(state=state)) == []


def test_a_streamed_tool_call_keeps_its_pieces():
    sent = chunks(CHAT, *[Delta(tool_calls=(piece,)) for piece in CALL], Finish(reason="tool_calls"))
    assert sent[0]["choices"][0]["delta"] == {"role": "assistant", "content": None, "tool_calls": [CALL[0]]}
    assert [c["choices"][0]["delta"]["tool_calls"] for c in sent[:-1]] == [[piece] for piece in CALL]
    for chunk in sent:
        strict(ChatCompletionChunk, chunk)


@pytest.mark.parametrize("text", ['"', "\\", "\n", "\u2028", "é\U0001f600", "\0", "</script>", "\0hole\0", "%s{}"])
def test_any_text_comes_through_a_stream_unchanged(text):
    request = replace(CHAT, include_usage=True)
    assert (
        "".join(c["choices"][0]["delta"]["content"] for c in chunks(request, Delta(text=text), Delta(text=text)))
        == text * 2
    )
    assert [c["choices"][0]["text"] for c in chunks(COMPLETION, Delta(text=text))] == [text]


def test_a_stream_and_an_answer_say_the_same():
    events = [Delta(reasoning="r"), Delta(text="x", logprobs=(TOKEN,)), Delta(text="y"), Finish(), DONE_5]
    said = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks(CHAT, *events))
    assert said == answer(CHAT, *events)["choices"][0]["message"]["content"] == "xy"


def test_progress_says_nothing_to_a_client():
    assert chunks(CHAT, Progress(stage="loading")) == chunks(COMPLETION, Progress(stage="loading")) == []


def test_a_completion_answer_has_a_choice_for_each_prompt_and_each_of_its_choices():
    request = GenerationRequest(kind="completion", model="m", inputs=("a", "b"), n=2, echo=True)
    events = [Delta(choice=index, text=str(index)) for index in range(4)]
    finishes = [Finish(choice=index) for index in range(4)]
    parsed = strict(Completion, answer(request, *events, *finishes, DONE_5))
    assert parsed.id == "cmpl-j1"
    assert [(choice.index, choice.text) for choice in parsed.choices] == [(0, "a0"), (1, "a1"), (2, "b2"), (3, "b3")]
    assert parsed.usage.total_tokens == 5


def test_a_streamed_completion_echoes_the_prompt_once_and_first():
    sent = chunks(
        replace(COMPLETION, echo=True, include_usage=True), Delta(text=" upon"), Delta(text=" a"), Finish(), DONE_5
    )
    assert [chunk["choices"][0]["text"] for chunk in sent[:-1]] == ["Once upon", " a", ""]
    assert sent[-2]["choices"][0]["finish_reason"] == "stop"
    assert [chunk["usage"] for chunk in sent] == [None] * 3 + [USAGE_5]


def test_the_log_probabilities_of_a_completion_have_the_legacy_shape():
    request = replace(COMPLETION, logprobs=1)
    events = [Delta(text="Hi", logprobs=(TOKEN,)), Delta(text="Hi", logprobs=(TOKEN,)), Finish(), DONE_5]
    parsed = strict(Completion, answer(request, *events))
    assert parsed.choices[0].logprobs.model_dump() == {
        "tokens": ["Hi", "Hi"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"Hi": -0.5}, {"Hi": -0.5}],
        "text_offset": [0, 2],
    }
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks(request, *events)[:2]]
    assert [logprobs["text_offset"] for logprobs in streamed] == [[0], [2]]


def test_a_sampled_token_that_is_not_among_the_likeliest_is_shown_too():
    unlikely = {**TOKEN, "token": "Zz", "logprob": -9.0}
    body = answer(replace(COMPLETION, logprobs=1), Delta(text="Zz", logprobs=(unlikely,)), Finish(), DONE_5)
    assert body["choices"][0]["logprobs"]["top_logprobs"] == [{"Hi": -0.5, "Zz": -9.0}]


def test_zero_alternatives_of_a_completion_still_tell_the_sampled_token():
    body = answer(replace(COMPLETION, logprobs=0), Delta(text="Hi", logprobs=(TOKEN,)), Finish(), DONE_5)
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [-0.5]
    assert body["choices"][0]["logprobs"]["top_logprobs"] is None


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings_are_sorted_and_encoded_as_asked(encoding):
    request = GenerationRequest(kind="embedding", model="m", inputs=("a", "b"), encoding_format=encoding)
    body = answer(request, Vector(index=1, values=(0.5, -1.0)), Vector(index=0, values=(2.0, 0.25)), DONE_5)
    vectors = [entry["embedding"] for entry in body["data"]]
    if encoding == "base64":
        vectors = [list(struct.unpack("<2f", base64.b64decode(vector))) for vector in vectors]
    else:
        strict(CreateEmbeddingResponse, body)
    assert vectors == [[2.0, 0.25], [0.5, -1.0]]
    assert [entry["index"] for entry in body["data"]] == [0, 1]
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


def test_each_kind_has_its_stream_and_embeddings_have_none():
    assert isinstance(stream_for(CHAT, "j", 1), ChatStream)
    assert isinstance(stream_for(COMPLETION, "j", 1), CompletionStream)
    with pytest.raises(ValueError, match="no stream"):
        stream_for(GenerationRequest(kind="embedding", model="m"), "j", 1)


def test_an_sse_frame_is_one_event_whatever_its_data_and_a_comment_is_one_line():
    assert sse("{}", "j:1-2") == b"id: j:1-2\ndata: {}\n\n"
    assert sse("{}") == b"data: {}\n\n"
    assert sse("a\nb\r\nc\rd\u2028e") == "data: a\ndata: b\ndata: c\ndata: d\u2028e\n\n".encode()
    assert comment("load\n50 %") == b": load 50 %\n"
    assert DONE == b"data: [DONE]\n\n"
