"""The backend llama-cpp, as the installer leaves it and over the wire: what it answers, what it refuses, how it ends."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from gguf_files import lora, split_into
from test_backends import TOOL, Running, bad_files, chat, check_embeddings, completion, refused, text_of
from waiting import wait_for

from localai_q.config import load_settings
from localai_q.gallery import catalog
from localai_q.proto import backend_pb2 as pb
from workers.node.installer import Kit, install_backend
from workers.node.sources import Access
from workers.node.wheels import Wheels

# `make wheels` compiles what this backend needs, once for a machine; whoever runs this file alone first waits for it.
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wheels = Wheels(Access(load_settings(), "", "", ""), cpus=2, progress=lambda _: None)
    root = tmp_path_factory.mktemp("backends")
    return install_backend(catalog.backend("llama-cpp"), root, lambda _: None, Kit(wheel=wheels.bring))


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    with closing(Running(folder)) as found:
        yield found


@pytest.fixture(scope="module")
def llama(running: Running, weights: Path) -> Running:
    result = running.load(Model="smol", ModelFile=str(weights), ContextSize=512, Threads=2, Options=["parallel:1"])
    assert result.success, result.message
    return running


def of_text(llama: Running, ask: pb.PredictOptions) -> str:
    return llama.stub.Predict(ask, timeout=60).message.decode()


def test_a_chat_streams_its_tokens_and_ends_with_counts(llama: Running) -> None:
    replies = list(llama.stream(content="Count to five.", max_tokens=8, temperature=0, ignore_eos=True))
    *pieces, last = replies
    assert [piece.tokens for piece in pieces] == list(range(1, 9))
    assert all(piece.chat_deltas[0].content.encode() == piece.message for piece in pieces)
    assert (last.finish_reason, last.tokens) == ("length", 8)
    assert last.prompt_tokens > 10
    assert last.timing_prompt_processing > 0
    assert last.timing_token_generation > 0


def test_a_chat_is_put_into_the_models_own_template(llama: Running) -> None:
    """SmolLM2's template frames each message, and adds a system message where there is none."""
    framed = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    framed += "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"
    same = {"max_tokens": 10, "temperature": 0, "cache_prompt": False}
    by_chat = llama.stub.Predict(chat("Name a colour.", **same))
    by_prompt = llama.stub.Predict(completion(framed, **same))
    assert by_chat.prompt_tokens == by_prompt.prompt_tokens
    assert by_chat.message == by_prompt.message


def test_the_same_request_twice_is_answered_alike_and_from_the_cache(llama: Running) -> None:
    ask = chat("Say why the sky is blue.", max_tokens=16, temperature=0)
    once, again = llama.stub.Predict(ask), llama.stub.Predict(ask)
    assert again.message == once.message == text_of(llama.stub.PredictStream(ask)).encode()
    assert again.cached_tokens == again.prompt_tokens - 1
    longer = chat(
        messages=[
            {"role": "user", "content": "Say why the sky is blue."},
            {"role": "assistant", "content": again.message.decode()},
            {"role": "user", "content": "And the sea?"},
        ],
        max_tokens=1,
    )
    assert llama.stub.Predict(longer).cached_tokens >= again.prompt_tokens
    fresh = chat("Say why the sky is blue.", max_tokens=1, cache_prompt=False)
    assert llama.stub.Predict(fresh).cached_tokens == 0


def test_an_answer_that_was_cut_is_continued(llama: Running) -> None:
    messages = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "A, B, C, D,"}]
    assert of_text(llama, chat(messages=messages, max_tokens=3, temperature=0)).strip().startswith("E")


def test_the_standard_fields_do_what_the_body_does(llama: Running) -> None:
    options = pb.PredictOptions(
        Messages=[pb.Message(role="user", content="Name a colour.")], UseTokenizerTemplate=True, Tokens=12
    )
    assert of_text(llama, options) == of_text(llama, chat("Name a colour.", max_tokens=12, temperature=0))


@pytest.mark.parametrize("stop", [["G"], [" F, G", "Z"], "G,"])
def test_an_answer_ends_before_a_stop_string(llama: Running, stop: Any) -> None:
    replies = list(llama.stub.PredictStream(completion("A, B, C, D, E,", max_tokens=30, temperature=0, stop=stop)))
    assert replies[-1].finish_reason == "stop"
    assert text_of(replies) == ("" if "F" in stop[0] else " F, ")


def test_log_probabilities_come_with_chats_and_completions(llama: Running) -> None:
    asks = [chat(max_tokens=3, temperature=0, logprobs=True, top_logprobs=2, ignore_eos=True)]
    asks.append(completion("Once upon", max_tokens=3, temperature=0, logprobs=2))
    asks.append(pb.PredictOptions(Prompt="Once upon", Tokens=3, Logprobs=2))
    for ask in asks:
        reply = llama.stub.Predict(ask)
        items = json.loads(reply.logprobs)["content"]
        assert "".join(item["token"] for item in items) == reply.message.decode()
        for item in items:
            assert bytes(item["bytes"]).decode() == item["token"]
            assert item["top_logprobs"][0]["token"] == item["token"]
            chances = [top["logprob"] for top in item["top_logprobs"]]
            assert len(chances) == 2
            assert 0 >= chances[0] == item["logprob"] >= chances[1]


def test_characters_of_several_tokens_arrive_whole(llama: Running) -> None:
    ask = completion("😀🦊日本\n😀🦊日本\n😀🦊日本\n", max_tokens=12, temperature=0)
    replies = list(llama.stub.PredictStream(ask))
    assert "😀🦊日" in "".join(reply.message.decode() for reply in replies)
    assert replies[-1].tokens == 12


class TestSampling:
    """What a body says of sampling has its effect."""

    ASK = "The cat"

    def text(self, llama: Running, **body: Any) -> str:
        return of_text(llama, completion(self.ASK, **{"max_tokens": 12, "cache_prompt": False, **body}))

    @pytest.mark.parametrize(
        "body",
        [
            {}, {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"typical_p": 0.5}, {"top_n_sigma": 1.0},
            {"dynatemp_range": 0.5}, {"xtc_probability": 0.5}, {"mirostat": 1}, {"mirostat": 2, "mirostat_tau": 3.0},
            {"presence_penalty": 1.0, "frequency_penalty": 1.0, "repeat_penalty": 1.2}, {"dry_multiplier": 0.8},
        ],
    )  # fmt: skip
    def test_a_seed_makes_the_same_answer(self, llama: Running, body: dict) -> None:
        assert self.text(llama, seed=7, **body) == self.text(llama, seed=7, **body)

    def test_another_seed_makes_another_answer(self, llama: Running) -> None:
        found = {self.text(llama, seed=seed, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0) for seed in range(4)}
        assert len(found) > 1

    @pytest.mark.parametrize("body", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"top_n_sigma": 0.0001},
                                      {"samplers": ["top_k", "temperature"], "top_k": 1}])  # fmt: skip
    def test_whatever_leaves_one_candidate_is_greedy(self, llama: Running, body: dict) -> None:
        assert self.text(llama, seed=3, temperature=2.0, **body) == self.text(llama, temperature=0)

    def test_a_token_can_be_forced_and_forbidden(self, llama: Running) -> None:
        (fish,) = llama.stub.TokenizeString(pb.PredictOptions(Prompt=" fish")).tokens
        assert self.text(llama, max_tokens=3, logit_bias={str(fish): 100}) == " fish fish fish"
        first = llama.stub.Predict(completion(self.ASK, max_tokens=1, temperature=0, logprobs=1))
        token = json.loads(first.logprobs)["content"][0]["id"]
        assert self.text(llama, max_tokens=1, temperature=0, logit_bias={str(token): -100}) != first.message.decode()

    def test_repetition_is_punished(self, llama: Running) -> None:
        (fish,) = llama.stub.TokenizeString(pb.PredictOptions(Prompt=" fish")).tokens

        def first(**body: Any) -> str:
            ask = {"max_tokens": 1, "temperature": 0, "logit_bias": {str(fish): 30}, **body}
            return of_text(llama, completion("The sea is full of fish", **ask))

        assert first() == " fish"
        for body in ({"repeat_penalty": 9.0}, {"presence_penalty": 99.0}, {"frequency_penalty": 99.0}):
            assert first(**body) != " fish", body
            assert first(**body, repeat_last_n=0) == " fish", body

    @pytest.mark.parametrize(
        "body",
        [
            {"repeat_last_n": 2**31 - 1, "repeat_penalty": 1.1}, {"dry_multiplier": 1, "dry_penalty_last_n": 2**31 - 1},
            {"temperature": 0, "dynatemp_range": 1e6}, {"mirostat": 2, "mirostat_tau": 0, "mirostat_eta": 0},
            {"min_keep": 2**31 - 1}, {"temperature": 1e-9}, {"xtc_probability": 1, "xtc_threshold": 0},
        ],
    )  # fmt: skip
    def test_extremes_cost_nothing(self, llama: Running, body: dict) -> None:
        before = llama.status().memory.total
        assert llama.stub.Predict(completion(self.ASK, max_tokens=2, ignore_eos=True, **body), timeout=60).tokens == 2
        assert llama.status().memory.total - before < 100 << 20

    def test_the_end_can_be_ignored(self, llama: Running) -> None:
        ask = {"content": "Say yes.", "max_tokens": 60, "temperature": 0}
        assert llama.stub.Predict(chat(**ask, grammar='root ::= "yes"')).finish_reason == "stop"
        assert llama.stub.Predict(chat(**ask, ignore_eos=True)).tokens == 60


class TestForms:
    """Answers that must have a form."""

    def test_a_grammar_binds_the_answer(self, llama: Running) -> None:
        ask = chat("Where?", max_tokens=20, temperature=1.5, grammar='root ::= ("Rome" | "Oslo") "!"+')
        assert of_text(llama, ask).rstrip("!") in ("Rome", "Oslo")
        literal = chat("Where?", max_tokens=20, grammar='root ::= "((((" "{5,2}" [({] # ((')
        assert of_text(llama, literal) in ("(((({5,2}(", "(((({5,2}{")

    def test_a_json_schema_binds_the_answer(self, llama: Running) -> None:
        schema = {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        }
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        for temperature in (0, 1.5):
            ask = chat("Where, and for how long?", max_tokens=60, temperature=temperature, response_format=form, seed=1)
            found = json.loads(of_text(llama, ask))
            assert found.keys() == {"city", "days"}
            assert found["city"] in ("Rome", "Oslo")

    def test_a_json_object_is_one(self, llama: Running) -> None:
        ask = chat("A person, please.", max_tokens=300, temperature=0, response_format={"type": "json_object"})
        assert isinstance(json.loads(of_text(llama, ask)), dict)

    def test_a_required_tool_is_called(self, llama: Running) -> None:
        for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
            reply = llama.stub.Predict(chat("Weather in Paris?", max_tokens=80, tools=[TOOL], tool_choice=choice))
            (call,) = reply.chat_deltas[0].tool_calls
            assert call.name == "get_weather"
            assert isinstance(json.loads(call.arguments)["city"], str)
            assert reply.finish_reason == "tool_calls"


BRACKETS = "(" * 200_000
REPEATED = {"type": "array", "items": {}, "maxItems": 10**9}
NESTED = {"type": "string", "pattern": "^((a{900}){900}){900}$"}
DEEP: dict = {"type": "string"}
for _ in range(900):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (chat(messages=[{"role": "user"}]), "content"),
        (chat(messages=[]), "at least one message"),
        (chat(messages=[{"role": "king", "content": "x"}]), "role"),
        (chat(temperature="warm"), "temperature must be a number"),
        (chat(top_p=2), "top_p must be from 0 to 1"),
        (chat(repeat_penalty=0), "repeat_penalty must be above 0"),
        (chat(seed="x"), "seed must be a whole number"),
        (chat(max_tokens="many"), "max_tokens must be"),
        (chat(stop=[""]), "stop must be"),
        (chat(logprobs=True, top_logprobs=99), "can be 0 to 20"),
        (chat(samplers=["infill"]), "unknown sampler 'infill'"),
        (chat(logit_bias={"49152": 1}), "the token 49152 does not exist"),
        (completion([1, 49152]), "the token 49152 does not exist"),
        (completion([1, -1]), "the token -1 does not exist"),
        (completion(["a", "b"]), "one list of token ids"),
        (completion("a", grammar="root ::= ("), "cannot read the grammar"),
        (completion("a", grammar='root ::= root "a"'), "cannot read the grammar"),
        (completion("a", grammar=BRACKETS), "brackets"),
        (completion("a", grammar='root ::= ("a" "b"){5,2}'), "at least so often"),
        (completion("a", dry_sequence_breakers=["x"] * 33), "32 strings at most"),
        (chat(grammar="x", response_format={"type": "json_object"}), "exclude each other"),
        (chat(response_format={"type": "yaml"}), "response_format must be"),
        *(
            (chat(response_format={"type": "json_schema", "json_schema": {"schema": schema}}), says)
            for schema, says in (({"type": "wrong"}, "cannot be enforced"), (REPEATED, "more than 500 times"),
                                 (NESTED, "more than 500 times"), (DEEP, "are read at most"))
        ),
        (chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "fly"}}), "not among the tools"),
        (pb.PredictOptions(OpenAIBody="{", OpenAIKind="chat"), "not JSON"),
    ],
)  # fmt: skip
def test_a_request_that_makes_no_sense_is_refused(llama: Running, ask: pb.PredictOptions, says: str) -> None:
    assert says in refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: list(llama.stub.PredictStream(ask, timeout=60)))


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (chat(tools=[TOOL]), "cannot tell calls of tools"),
        (chat(reasoning_format="deepseek"), "reasoning"),
        (chat(speed=9), "'speed'"),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]),
            "text only",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_as_such(llama: Running, ask: pb.PredictOptions, says: str) -> None:
    assert says in refused(grpc.StatusCode.UNIMPLEMENTED, lambda: list(llama.stub.PredictStream(ask)))
    refused(grpc.StatusCode.UNIMPLEMENTED, lambda: llama.stub.Embedding(pb.PredictOptions(Embeddings="a")))
    refused(grpc.StatusCode.UNIMPLEMENTED, lambda: llama.stub.Rerank(pb.RerankRequest(query="a", documents=["b"])))


def test_a_prompt_beyond_the_context_is_refused_and_an_answer_ends_with_it(llama: Running) -> None:
    says = refused(grpc.StatusCode.OUT_OF_RANGE, lambda: list(llama.stream(content="hi " * 600)))
    assert "512 tokens" in says
    tokens = [1] * 508
    last = llama.stub.Predict(completion(tokens, ignore_eos=True))
    assert (last.prompt_tokens, last.tokens, last.finish_reason) == (508, 4, "length")


def test_a_request_for_another_model_is_refused(llama: Running) -> None:
    options = pb.PredictOptions(Prompt="x", ModelIdentity="other")
    assert "identity" in refused(grpc.StatusCode.NOT_FOUND, lambda: list(llama.stub.PredictStream(options)))


def test_a_model_says_what_it_is(llama: Running) -> None:
    found = llama.stub.ModelMetadata(pb.ModelOptions())
    assert (found.context_size, found.slots, found.chat, found.embeddings, found.rerank) == (
        512,
        1,
        True,
        False,
        False,
    )


def test_text_becomes_tokens_and_text_again(llama: Running) -> None:
    tokens = llama.stub.TokenizeString(pb.PredictOptions(Prompt="Hello <|im_end|> 😀")).tokens
    assert llama.stub.Detokenize(pb.DetokenizeRequest(tokens=tokens)).content == "Hello <|im_end|> 😀"
    refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: llama.stub.Detokenize(pb.DetokenizeRequest(tokens=[49152])))


def test_a_cancelled_stream_frees_the_slot_and_the_next_request_gets_it(llama: Running) -> None:
    stream = llama.stream(content="Tell a long story.", max_tokens=400, ignore_eos=True)
    next(stream)
    assert (llama.status().slots, llama.status().slots_busy, llama.status().state) == (1, 1, pb.StatusResponse.BUSY)
    waits = llama.stream(content="Next", max_tokens=2, ignore_eos=True)
    stream.cancel()
    assert list(waits)[-1].tokens == 2
    assert wait_for(lambda: llama.status().slots_busy == 0, 60)


def test_a_request_can_be_cancelled_while_it_waits_for_another(llama: Running) -> None:
    stream = llama.stream(content="Tell a long story.", max_tokens=900, ignore_eos=True)
    next(stream)
    waits = llama.stream(content="Next", max_tokens=2)
    assert wait_for(lambda: llama.status().slots_busy == 2)
    waits.cancel()
    assert wait_for(lambda: llama.status().slots_busy == 1)
    next(stream)
    assert llama.status().slots_busy == 1  # the first goes on
    stream.cancel()
    assert wait_for(lambda: llama.status().slots_busy == 0)


def test_a_request_can_be_cancelled_between_two_batches_of_its_prompt(llama: Running) -> None:
    long = [1] + [50 + number % 900 for number in range(500)]
    stream = llama.stub.PredictStream(completion(long, max_tokens=1, cache_prompt=False))
    assert wait_for(lambda: llama.status().slots_busy == 1, 60)
    stream.cancel()
    assert wait_for(lambda: llama.status().slots_busy == 0, 60)
    read = llama.stub.Predict(completion(long, max_tokens=1)).cached_tokens
    assert read < len(long) - 1, "the engine went on with a prompt that nobody waits for"


def test_it_is_loaded_as_it_can_be_or_not_at_all(running: Running, weights: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% if %}")
    options = {"Model": "m", "ModelFile": str(weights), "ContextSize": 512, "Threads": 2}
    for more, says in (
        ({"Options": ["parallel:2"]}, "one request at a time"),
        ({"Options": ["speed:2"]}, "this backend knows: chat_template, gpu_layers, parallel, pooling"),
        ({"Options": [f"chat_template:{broken}"]}, "the chat template cannot be read"),
        ({"Options": ["chat_template:/nowhere"]}, "which does not exist"),
        ({"Reranking": True}, "neither ranks"),
        ({"MMProj": "x"}, "nor sees images"),
        ({"DraftModel": "x"}, "takes no DraftModel"),
        ({"CacheTypeKey": "q9"}, "CacheTypeKey cannot be 'q9'"),
        *(({"ModelFile": path}, says) for path, says in bad_files(weights, tmp_path).items()),
    ):
        result = running.load(**{**options, **more})
        assert not result.success
        assert says in result.message
    assert running.load(**options, CacheTypeKey="q8_0", CacheTypeValue="q8_0").success
    assert running.stub.Predict(chat("hi", max_tokens=2, ignore_eos=True)).tokens == 2


def test_a_model_in_several_files_answers_as_the_whole_one(running: Running, weights: Path, tmp_path: Path) -> None:
    def said(file: Path) -> str:
        result = running.load(Model="m", ModelFile=str(file), ContextSize=512, Threads=2)
        assert result.success, result.message
        return of_text(running, chat("Say why the sky is blue.", max_tokens=8, temperature=0))

    assert said(split_into(tmp_path, weights.read_bytes(), 3, bare=True)[0]) == said(weights)


def test_adapters_and_a_template_of_ones_own_change_what_is_answered(
    running: Running, weights: Path, tmp_path: Path
) -> None:
    adapter, damaged, template = tmp_path / "a.gguf", tmp_path / "damaged", tmp_path / "t.jinja"
    adapter.write_bytes(lora(30, 576))
    damaged.write_bytes(b"GGUF" + bytes(100))
    options = {"Model": "m", "ModelFile": str(weights), "ContextSize": 512, "Threads": 2}

    def said(**more: Any) -> str:
        result = running.load(**options, **more)
        assert result.success, result.message
        return of_text(running, chat("A", max_tokens=4, temperature=0, ignore_eos=True))

    plain = said()
    assert said(LoraAdapters=[str(adapter)], LoraScales=[0.0]) == plain
    assert said(LoraAdapters=[str(adapter)]) != plain
    assert said() == plain
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}, B, C,")
    assert said(Options=[f"chat_template:{template}"]).strip().startswith("D")
    template.write_text("{{ raise_exception('never') }}")
    assert running.load(**options, Options=[f"chat_template:{template}"]).success
    assert "never" in refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: list(running.stream()))
    assert str(damaged) in running.load(**options, LoraAdapters=[str(damaged)]).message
    assert "2 LoraScales" in running.load(**options, LoraAdapters=[str(adapter)], LoraScales=[1, 2]).message


def test_free_ends_requests_gives_the_memory_back_and_a_load_works_again(folder: Path, weights: Path) -> None:
    with closing(Running(folder)) as running:
        before = running.status().memory.total
        options = {"Model": "m", "ModelFile": str(weights), "ContextSize": 512, "Threads": 2}
        assert running.load(**options).success
        loaded = running.status().memory.total
        stream = running.stream(content="Tell a story", ignore_eos=True)
        next(stream)
        assert running.stub.Free(pb.HealthMessage(), timeout=30).success
        refused(grpc.StatusCode.CANCELLED, lambda: list(stream))
        freed = running.status().memory.total
        assert freed - before < (loaded - before) * 0.35, (before >> 20, loaded >> 20, freed >> 20)
        refused(grpc.StatusCode.FAILED_PRECONDITION, lambda: list(running.stream()))
        assert running.load(**options, Embeddings=True).success
        check_embeddings(running)
