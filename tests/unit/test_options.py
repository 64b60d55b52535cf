"""A request reaches a backend twice: as the OpenAI body, and in the fields of LocalAI's interface."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localai_q.proto import backend_pb2
from workers.child import ModelSpec, ReplicaSpec
from workers.replica.options import NUMBERS, embedding_options, model_options, predict_options

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(**more: object) -> backend_pb2.PredictOptions:
    return predict_options("m", "chat", {**CHAT, **more}, "job")


def test_the_body_travels_as_it_is_with_the_model_and_the_job() -> None:
    body = {**CHAT, "temperature": 0.5, "anything": {"deep": [1]}}
    options = predict_options("my/model", "chat", body, "j1")
    assert json.loads(options.OpenAIBody) == body
    assert (options.OpenAIKind, options.ModelIdentity, options.CorrelationId) == ("chat", "my/model", "j1")


@pytest.mark.parametrize(("name", "field"), NUMBERS.items())
def test_a_sampling_field_is_said_in_localais_words(name: str, field: str) -> None:
    kind = type(getattr(backend_pb2.PredictOptions(), field))
    value = {int: 3, float: 0.25, bool: True, str: "root ::= x"}[kind]
    assert getattr(chat(**{name: value}), field) == value
    assert getattr(chat(**{name: None}), field) == kind()
    assert getattr(chat(), field) == kind()


@given(st.integers(-(2**63), 2**64 - 1))
def test_a_seed_of_64_bits_is_folded_into_32(seed: int) -> None:
    folded = chat(seed=seed).Seed
    assert -(2**31) <= folded < 2**31
    assert (folded - seed) % 2**32 == 0


@pytest.mark.parametrize(
    ("body", "tokens"),
    [({}, 0), ({"max_tokens": 7}, 7), ({"max_completion_tokens": 9, "max_tokens": 7}, 9), ({"max_tokens": None}, 0)],
)
def test_the_newer_name_of_the_limit_of_tokens_wins(body, tokens) -> None:
    assert chat(**body).Tokens == tokens


@pytest.mark.parametrize(("stop", "prompts"), [("END", ["END"]), (["a", "b"], ["a", "b"]), (None, []), ([], [])])
def test_stop_is_one_text_or_several(stop, prompts) -> None:
    assert list(chat(stop=stop).StopPrompts) == prompts


def test_messages_are_flattened_for_those_who_read_them() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    options = chat(
        messages=[
            {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
        ]
    )
    system, assistant, tool = options.Messages
    assert (system.role, system.content) == ("system", "Be brief.")
    assert (assistant.content, json.loads(assistant.tool_calls)) == ("", [call])
    assert (tool.content, tool.tool_call_id) == ("42", "c1")
    assert options.UseTokenizerTemplate


@pytest.mark.parametrize(
    ("choice", "said"),
    [("auto", "auto"), ("none", "none"), ({"type": "function", "function": {"name": "f"}}, None), (None, "")],
)
def test_tools_and_their_choice_travel_as_json(choice, said) -> None:
    options = chat(tools=[TOOL], tool_choice=choice)
    assert json.loads(options.Tools) == [TOOL]
    assert options.ToolChoice == (json.dumps(choice) if said is None else said)


def test_without_tools_nothing_is_said_about_them() -> None:
    assert (chat().Tools, chat(tools=[]).Tools, chat().ToolChoice) == ("", "", "")


@pytest.mark.parametrize(("asked", "sent"), [(True, 1), (False, 0), (None, 0)])
def test_log_probabilities_of_a_chat_are_on_or_off(asked, sent) -> None:
    assert chat(logprobs=asked, top_logprobs=2).Logprobs == sent
    assert chat(logprobs=asked, top_logprobs=2).TopLogprobs == 2


def test_a_completion_has_a_prompt_or_token_ids_in_the_body() -> None:
    options = predict_options("m", "completion", {"prompt": "Once"}, "j")
    assert (options.Prompt, options.UseTokenizerTemplate, len(options.Messages)) == ("Once", False, 0)
    of_ids = predict_options("m", "completion", {"prompt": [1, 2]}, "j")
    assert of_ids.Prompt == ""
    assert json.loads(of_ids.OpenAIBody)["prompt"] == [1, 2]


def test_what_is_embedded_is_a_text_or_token_ids() -> None:
    text = embedding_options("m", "words", "j")
    ids = embedding_options("m", [5, 6], "j")
    assert (text.Embeddings, list(text.EmbeddingTokens)) == ("words", [])
    assert (ids.Embeddings, list(ids.EmbeddingTokens)) == ("", [5, 6])
    assert {text.ModelIdentity, ids.ModelIdentity} == {"m"}


def test_a_model_is_loaded_as_it_was_registered() -> None:
    model = ModelSpec(id="m1", name="n", revision=1, backend="echo", source="ollama://n", context_size=2048, slots=3,
                      threads=2, sha256="a" * 64,
                      gpu_layers=5, embeddings=True, options=("delay:1",))  # fmt: skip
    spec = ReplicaSpec(id="r", number=1, job="j", model=model, backend_folder=Path("/b"), blobs=Path("/f"),
                       socket=Path("/s"), log=Path("/l"))  # fmt: skip
    options = model_options(spec)
    assert (options.Model, options.ModelFile, options.ContextSize, options.Threads) == ("n", f"/f/{'a' * 64}", 2048, 2)
    assert (options.NGPULayers, options.Embeddings, options.Reranking) == (5, True, False)
    assert list(options.Options) == ["parallel:3", "delay:1"]
    assert (options.MMProj, options.DraftModel, list(options.LoraAdapters)) == ("", "", [])
    assert model_options(spec.model_copy(update={"model": model.model_copy(update={"source": ""})})).ModelFile == ""


def test_further_files_and_a_template_are_named_by_where_they_lie() -> None:
    a, b, c = ("a" * 64, "b" * 64, "c" * 64)
    file = {"source": "ollama://x"}
    model = ModelSpec(id="m1", name="n", revision=1, source="ollama://n", mmproj={**file, "sha256": a},
                      draft_model={**file, "sha256": b}, loras=[{**file, "sha256": c, "scale": 0.5}],
                      chat_template="{{ messages }}")  # fmt: skip
    spec = ReplicaSpec(id="r", number=1, job="j", model=model, backend_folder=Path("/b"), blobs=Path("/f"),
                       socket=Path("/run/r.sock"), log=Path("/l"))  # fmt: skip
    options = model_options(spec)
    assert (options.MMProj, options.DraftModel) == (f"/f/{a}", f"/f/{b}")
    assert (list(options.LoraAdapters), list(options.LoraScales)) == ([f"/f/{c}"], [0.5])
    assert list(options.Options) == ["parallel:4", "chat_template:/run/r.jinja"]
