"""What clients get of the engine llama-cpp, installed by the cluster's own node from the wheel of this machine."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_cluster import Cluster
from openai import BadRequestError
from test_chat import SCHEMA, TOOL

CHATS, EMBEDS = "library", "library-vectors"
ADD = ("--backend", "llama-cpp", "--context-size", "512")
# `make wheels` compiles what this engine needs, once for a machine; whoever runs this file alone first waits for it.
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def engine(cluster: Cluster, weights: Path) -> Iterator[Cluster]:
    cluster.cli("models", "add", CHATS, "--file", str(weights), *ADD)
    cluster.cli("models", "add", EMBEDS, "--file", str(weights), *ADD, "--embeddings")
    cluster.until_serving(CHATS, 3000)
    yield cluster
    cluster.cli("models", "remove", EMBEDS)
    cluster.cli("models", "remove", CHATS)


def ask(cluster: Cluster, **more: Any) -> Any:
    return cluster.say("Name a river.", CHATS, **{"temperature": 0, "max_tokens": 12, **more})


def test_a_chat_is_answered_at_once_or_as_a_stream(engine: Cluster) -> None:
    whole = ask(engine)
    chunks = list(ask(engine, stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content != ""
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens > 0
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens > 5
    assert len(ask(engine, n=2, temperature=1, seed=1).choices) == 2


def test_an_answer_follows_its_schema(engine: Cluster) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    found = json.loads(ask(engine, response_format=form, max_tokens=100).choices[0].message.content)
    assert found.keys() == {"city", "large"}
    (call,) = ask(engine, tools=[TOOL], tool_choice="required", max_tokens=100).choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments).keys() == {"city"}


def test_a_text_is_embedded(engine: Cluster) -> None:
    answer = engine.openai.embeddings.create(model=EMBEDS, input=["a river", "a lake", "a river"])
    one, two, three = (each.embedding for each in answer.data)
    assert len(one) == 576
    assert one == pytest.approx(three)
    assert one != pytest.approx(two)
    assert math.hypot(*one) == pytest.approx(1, abs=1e-3)


def test_what_the_engine_cannot_do_is_the_clients_mistake(engine: Cluster) -> None:
    with pytest.raises(BadRequestError, match="cannot tell calls of tools from text") as caught:
        ask(engine, tools=[TOOL])
    assert caught.value.code == "unsupported_by_model"
    with pytest.raises(BadRequestError, match="512 tokens"):
        engine.say("river " * 600, CHATS)


def test_it_serves_one_request_at_a_time(engine: Cluster, weights: Path) -> None:
    # Another one may have been placed on a node that an earlier test has killed, and of which nobody knows that yet.
    ready = [replica for replica in engine.replicas(CHATS) if replica["state"] == "ready"]
    assert [replica["slots"] for replica in ready] == [1]
    assert "works on 1 request" in engine.cli("models", "edit", CHATS, "--slots", "2", code=1)
    line = engine.cli("models", "add", "ranks", "--file", str(weights), *ADD, "--slots", "3", code=1)
    assert "works on 1 request" in line
