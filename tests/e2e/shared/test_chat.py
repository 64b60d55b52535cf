"""What OpenAI's own client gets from the cluster when nothing goes wrong."""

import base64
import json
import math
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from e2e_cluster import CHAT_MODEL, Cluster, until
from openai import OpenAI
from waiting import LIMIT

QUESTION = [{"role": "user", "content": "Name a river."}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "large": {"type": "boolean"}},
    "required": ["city", "large"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def ask(client: OpenAI, **more: Any) -> Any:
    fixed = {"model": CHAT_MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 8}
    return client.chat.completions.create(**{**fixed, **more})


@pytest.fixture(params=["/v1", ""], ids=["with /v1", "without /v1"])
def client(request: pytest.FixtureRequest, cluster: Cluster) -> OpenAI:
    return cluster.client(prefix=request.param)


def test_a_chat_is_answered_in_one_piece(client: OpenAI) -> None:
    answer = ask(client)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content.strip()
    assert choice.finish_reason == "length"
    assert answer.model == CHAT_MODEL
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage.prompt_tokens > 5
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same_as_the_whole_answer(client: OpenAI) -> None:
    whole = ask(client, seed=1)
    chunks = list(ask(client, seed=1, stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_include_usage_has_no_usage(cluster: Cluster) -> None:
    chunks = list(ask(cluster.openai, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_the_same_seed_at_temperature_0_gives_the_same_text(cluster: Cluster) -> None:
    texts = {ask(cluster.openai, seed=7, max_tokens=12).choices[0].message.content for _ in range(3)}
    assert len(texts) == 1


def test_another_seed_gives_another_text_when_it_is_hot(cluster: Cluster) -> None:
    texts = {
        ask(cluster.openai, seed=seed, temperature=2, top_p=1, max_tokens=12).choices[0].message.content
        for seed in range(3)
    }
    assert len(texts) > 1


def test_a_stop_sequence_ends_the_answer_before_itself(cluster: Cluster) -> None:
    free = ask(cluster.openai, max_tokens=12).choices[0].message.content
    stop = free.split()[3]
    cut = ask(cluster.openai, max_tokens=12, stop=[stop]).choices[0]
    assert cut.finish_reason == "stop"
    assert stop not in cut.message.content
    assert free.startswith(cut.message.content)


def test_a_short_answer_ends_by_itself_and_a_cut_one_says_length(cluster: Cluster) -> None:
    assert cluster.say("one two three").choices[0].finish_reason == "stop"
    cut = cluster.say("one two three", max_tokens=2)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("one two", "length")
    assert cut.usage.completion_tokens == 2


def test_n_choices_are_numbered_and_the_prompt_is_counted_once(cluster: Cluster) -> None:
    one = ask(cluster.openai, max_tokens=4)
    two = ask(cluster.openai, max_tokens=4, n=2, seed=3, temperature=1)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert all(choice.message.content for choice in two.choices)
    assert two.usage.prompt_tokens == one.usage.prompt_tokens
    assert two.usage.completion_tokens == 8
    indexes = {c.choices[0].index for c in ask(cluster.openai, max_tokens=4, n=2, stream=True)}
    assert indexes == {0, 1}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_name_every_token_and_its_alternatives(cluster: Cluster, stream: bool) -> None:
    answer = ask(cluster.openai, logprobs=True, top_logprobs=2, max_tokens=4, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    said = "".join((choice.delta if stream else choice.message).content or "" for choice in choices)
    assert len(tokens) == 4
    assert "".join(token.token for token in tokens) == said
    for token in tokens:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob


def at_work(cluster: Cluster, busy: threading.Event) -> list[int]:
    """How many jobs were at work at once, in each look until `busy` is cleared."""
    looks = []
    while busy.is_set():
        looks.append(sum(job["live"] == "leased" for job in cluster.open_generations()))
        time.sleep(0.02)
    return looks


def all_at_once(cluster: Cluster, calls: list[Callable[[], str]]) -> tuple[list[str], list[int]]:
    busy = threading.Event()
    busy.set()
    with ThreadPoolExecutor(len(calls) + 1) as pool:
        watching = pool.submit(at_work, cluster, busy)
        answers = [future.result(60) for future in [pool.submit(call) for call in calls]]
        busy.clear()
        return answers, watching.result(LIMIT)


def test_eight_streams_share_four_slots_and_all_say_their_own(calm: Cluster) -> None:
    def stream(number: int) -> str:
        # A hundred numbers of one's own, 20 ms each: nobody is done before the fifth has been waiting.
        chunks = calm.say(f"[[echo tokens=50 seed={number * 1000} delay_ms=20]]", stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    answers, looks = all_at_once(calm, [lambda n=n: stream(n) for n in range(8)])
    for number, answer in enumerate(answers):
        assert answer == " ".join(str(number * 1000 + token) for token in range(50))
    assert max(looks) == 4, "the replica takes as many as it has slots, and no more"


def test_eight_streams_of_the_real_model_all_end(calm: Cluster) -> None:
    def stream() -> str:
        chunks = ask(calm.openai, stream=True, max_tokens=8, seed=1)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    answers, looks = all_at_once(calm, [stream] * 8)
    assert all(len(answer.split()) >= 3 for answer in answers), answers
    assert 1 < max(looks) <= 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema_is_kept(cluster: Cluster, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    answer = ask(cluster.openai, response_format=form, max_tokens=60, stream=stream)
    text = (
        "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        if stream
        else answer.choices[0].message.content
    )
    found = json.loads(text)
    assert set(found) == {"city", "large"}
    assert isinstance(found["city"], str)
    assert isinstance(found["large"], bool)


def test_a_json_object_parses(cluster: Cluster) -> None:
    messages = [{"role": "user", "content": 'Answer with the JSON {"a": 1} and nothing else.'}]
    # The grammar lets a small model go on for long; a stop after the first brace closes what it has.
    answer = ask(cluster.openai, messages=messages, response_format={"type": "json_object"}, max_tokens=120, seed=1)
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_tool_is_called_with_arguments_that_parse(cluster: Cluster, stream: bool) -> None:
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = ask(cluster.openai, messages=messages, tools=[TOOL], tool_choice="required", max_tokens=60, stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
        name, arguments = calls[0].function.name, "".join(call.function.arguments or "" for call in calls)
        reason = chunks[-1].finish_reason
    else:
        call = answer.choices[0].message.tool_calls[0]
        name, arguments, reason = call.function.name, call.function.arguments, answer.choices[0].finish_reason
        assert call.id
    assert name == "get_weather"
    assert set(json.loads(arguments)) == {"city"}
    assert reason == "tool_calls"


def test_a_completion_continues_its_prompt(client: OpenAI) -> None:
    answer = client.completions.create(model=CHAT_MODEL, prompt="The sky is", max_tokens=4, temperature=0)
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 4
    echoed = client.completions.create(model=CHAT_MODEL, prompt="The sky is", max_tokens=4, temperature=0, echo=True)
    assert echoed.choices[0].text == "The sky is" + answer.choices[0].text


def test_a_list_of_prompts_gets_an_answer_each(cluster: Cluster) -> None:
    answer = cluster.openai.completions.create(model="echo", prompt=["a b", "c d"], max_tokens=4)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "a b"), (1, "c d")]
    assert answer.usage.prompt_tokens == 4
    streamed = list(cluster.openai.completions.create(model="echo", prompt=["a b", "c d"], max_tokens=4, stream=True))
    texts = ["".join(c.choices[0].text for c in streamed if c.choices[0].index == index) for index in (0, 1)]
    assert texts == ["a b", "c d"]


@pytest.mark.parametrize("prefix", ["/v1", ""])
def test_embeddings_are_the_same_as_floats_and_as_base64(cluster: Cluster, vectors: str, prefix: str) -> None:
    client = cluster.client(prefix=prefix)
    floats = client.embeddings.create(model=vectors, input="a river", encoding_format="float").data[0].embedding
    packed = client.embeddings.with_raw_response.create(model=vectors, input="a river", encoding_format="base64")
    raw = base64.b64decode(json.loads(packed.text)["data"][0]["embedding"])
    assert len(floats) == 576
    assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(floats, abs=1e-6)
    assert math.sqrt(sum(value * value for value in floats)) == pytest.approx(1.0, abs=1e-3)


def test_a_list_of_texts_gets_a_vector_each_in_order(cluster: Cluster, vectors: str) -> None:
    texts = ["a river", "a mountain", "a river"]
    answer = cluster.openai.embeddings.create(model=vectors, input=texts, encoding_format="float")
    assert [item.index for item in answer.data] == [0, 1, 2]
    first, second, third = (item.embedding for item in answer.data)
    assert first == pytest.approx(third, abs=1e-4)
    assert sum(a * b for a, b in zip(first, second, strict=True)) < 0.999
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens


def test_models_are_listed_and_shown(client: OpenAI, cluster: Cluster) -> None:
    listed = {model.id for model in client.models.list()}
    assert {CHAT_MODEL, "echo", "echo-one"} <= listed
    shown = client.models.retrieve("echo")
    assert (shown.id, shown.object, shown.owned_by) == ("echo", "model", "localai_q")
    assert abs(shown.created - time.time()) < 3600


def test_event_ids_name_job_attempt_and_index_without_a_gap(calm: Cluster) -> None:
    body = {"model": "echo", "messages": [{"role": "user", "content": "[[echo tokens=6 delay_ms=30]]"}], "stream": True}
    with calm.http.stream("POST", "/v1/chat/completions", json=body) as response:
        job = response.headers["X-LocalAI-Job"]
        lines = list(response.iter_lines())
    assert response.headers["Content-Type"].startswith("text/event-stream")
    ids = [line.removeprefix("id: ") for line in lines if line.startswith("id: ")]
    jobs, places = zip(*(each.split(":") for each in ids), strict=True)
    assert set(jobs) == {job}
    attempts, indexes = zip(*(map(int, place.split("-")) for place in places), strict=True)
    assert set(attempts) == {1}
    # Six tokens and the finish; the end of the job itself is `[DONE]` and needs no id.
    assert list(indexes) == list(range(1, len(indexes) + 1))
    assert len(indexes) == 7
    assert [line for line in lines if line][-1] == "data: [DONE]"


def test_a_model_that_nobody_loaded_is_loaded_for_its_first_request(calm: Cluster) -> None:
    calm.cli("models", "add", "fresh", "--backend", "echo")
    try:
        assert calm.replicas("fresh") == []
        assert calm.say("wake up", model="fresh").choices[0].message.content == "wake up"
        until(lambda: [replica["state"] for replica in calm.replicas("fresh")] == ["ready"], LIMIT, "its node's report")
    finally:
        calm.cli("models", "remove", "fresh")
    until(lambda: not calm.pids("fresh.1@alpha"), LIMIT, "the end of the removed model's process")
    with pytest.raises(httpx.HTTPStatusError):
        calm.http.get("/v1/models/fresh").raise_for_status()


def test_a_stream_may_be_silent_before_its_first_token_and_for_long_after_it(calm: Cluster) -> None:
    # Comments keep the connection alive meanwhile; OpenAI's client must not take one for an event.
    text = "[[echo tokens=2 first_ms=2500 delay_ms=10500]]"
    chunks = calm.say(text, stream=True, stream_options={"include_usage": True})
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "0 1"
