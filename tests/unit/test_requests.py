"""A request survives storage, and becomes one engine body per choice."""

import json

import pytest

from localai_q.cluster.requests import SEEDS, GenerationRequest


def completion(**more):
    return GenerationRequest(kind="completion", model="m", inputs=("a", (1, 2)), **more)


@pytest.mark.parametrize(
    "request_",
    [
        GenerationRequest(kind="chat", model="m", body={"messages": [{"role": "user", "content": "é\U0001f600"}]}, n=2),
        completion(echo=True, stream=True, include_usage=True, logprobs=0),
        GenerationRequest(kind="embedding", model="m", inputs=("a",), encoding_format="base64"),
    ],
    ids=["chat", "completion", "embedding"],
)
def test_a_request_is_the_same_after_a_round_trip_through_json(request_):
    assert GenerationRequest.from_json(json.loads(json.dumps(request_.to_json()))) == request_


def test_what_a_newer_version_added_to_a_stored_request_is_left_out():
    assert GenerationRequest.from_json({**completion().to_json(), "later": 1}) == completion()


@pytest.mark.parametrize("record", [{}, {"kind": "chat"}, {"kind": "song", "model": "m"}, {"kind": "chat", "model": 3}])
def test_a_record_that_is_no_request_is_refused(record):
    with pytest.raises(ValueError, match="not a stored"):
        GenerationRequest.from_json(record)


def test_a_chat_has_one_body_per_choice_and_each_its_own_seed():
    chat = GenerationRequest(kind="chat", model="m", body={"messages": [], "seed": 7}, n=3)
    assert [body["seed"] for body in chat.bodies()] == [7, 8, 9]
    assert chat.count == 3


def test_a_seed_wraps_around_before_the_value_that_engines_take_for_a_random_one():
    chat = GenerationRequest(kind="chat", model="m", body={"seed": SEEDS - 1}, n=2)
    assert [body["seed"] for body in chat.bodies()] == [SEEDS - 1, 0]


def test_choices_without_a_seed_get_none():
    assert all("seed" not in body for body in GenerationRequest(kind="chat", model="m", n=2).bodies())


def test_a_completion_has_the_choices_of_its_first_prompt_first():
    request = completion(n=2, body={"max_tokens": 3, "seed": 1})
    assert [(body["prompt"], body["seed"]) for body in request.bodies()] == [
        ("a", 1), ("a", 2), ([1, 2], 1), ([1, 2], 2),
    ]  # fmt: skip
    assert [request.prompt_of(choice) for choice in range(request.count)] == ["a", "a", (1, 2), (1, 2)]


def test_an_embedding_has_one_body_per_text():
    request = GenerationRequest(kind="embedding", model="m", inputs=("a", (1,)))
    assert request.bodies() == [{"input": "a"}, {"input": [1]}]
