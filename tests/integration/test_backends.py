"""The two backends, as the installer leaves them and over the wire: what they promise in `backend.proto`."""

import json
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from gguf_files import gguf, lora, projector, split, split_into
from waiting import LIMIT, wait_for

from localai_q.gallery import catalog
from localai_q.proto import backend_pb2 as pb
from localai_q.proto import backend_pb2_grpc
from workers.node.installer import install_backend, python_of
from workers.replica.backend import STUCK

OPTIONS = [("grpc.max_receive_message_length", 50 << 20), ("grpc.max_send_message_length", 50 << 20)]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Running:
    """A backend process and a stub for it."""

    def __init__(self, folder: Path, *arguments: str, **env: str) -> None:
        self.socket = Path(tempfile.mkdtemp(prefix="lq")) / "b.sock"
        self.address = f"unix:{self.socket}"
        self.process = subprocess.Popen(
            [python_of(folder), "server.py", "--addr", self.address, *arguments],
            cwd=folder,
            env={**os.environ, **env},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self.channel = grpc.insecure_channel(self.address, OPTIONS)
        self.stub = backend_pb2_grpc.BackendStub(self.channel)
        grpc.channel_ready_future(self.channel).result(LIMIT)

    def load(self, **options: Any) -> pb.Result:
        return self.stub.LoadModel(pb.ModelOptions(**options), timeout=LIMIT)

    def status(self) -> pb.StatusResponse:
        return self.stub.Status(pb.HealthMessage(), timeout=LIMIT)

    def stream(self, timeout: float = LIMIT, **body: Any) -> Any:
        return self.stub.PredictStream(chat(**body), timeout=timeout)

    def worked(self) -> float:
        """Seconds of a processor that the process has used."""
        return sum(psutil.Process(self.process.pid).cpu_times()[:2])

    def close(self) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        shutil.rmtree(self.socket.parent)


def chat(content: str = "hello", **body: Any) -> pb.PredictOptions:
    body = {"messages": [{"role": "user", "content": content}], **body}
    return pb.PredictOptions(OpenAIBody=json.dumps(body), OpenAIKind="chat")


def completion(prompt: Any, **body: Any) -> pb.PredictOptions:
    return pb.PredictOptions(OpenAIBody=json.dumps({"prompt": prompt, **body}), OpenAIKind="completion")


def text_of(replies: Any) -> str:
    return b"".join(reply.message for reply in replies).decode()


def refused(code: grpc.StatusCode, call: Callable[[], Any]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() == code, caught.value.details()
    return str(caught.value.details())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("backends")
    return {name: install_backend(catalog.backend(name), root, lambda _: None) for name in ("echo", "xllamacpp")}


@pytest.fixture(scope="module")
def shared_echo(folders: dict[str, Path]) -> Iterator[Running]:
    with closing(Running(folders["echo"])) as running:
        yield running


@pytest.fixture
def echo(shared_echo: Running) -> Running:
    assert shared_echo.load(Model="m", ContextSize=100, Options=["parallel:2"]).success
    return shared_echo


@pytest.fixture
def own_echo(folders: dict[str, Path]) -> Iterator[Running]:
    with closing(Running(folders["echo"])) as running:
        assert running.load(Model="m").success
        yield running


@pytest.fixture(scope="module")
def llama(folders: dict[str, Path], weights: Path) -> Iterator[Running]:
    with closing(Running(folders["xllamacpp"])) as running:
        result = running.load(Model="smol", ModelFile=str(weights), ContextSize=1024, Threads=1, Options=["parallel:2"])
        assert result.success, result.message
        yield running


# --- the process, whatever the engine


def test_a_call_without_the_token_is_refused(folders: dict[str, Path]) -> None:
    with closing(Running(folders["echo"], LOCALAI_GRPC_AUTH_TOKEN="secret")) as running:
        health = pb.HealthMessage()
        refused(grpc.StatusCode.UNAUTHENTICATED, lambda: running.stub.Health(health))
        refused(grpc.StatusCode.UNAUTHENTICATED, lambda: list(running.stream()))
        wrong = [("authorization", "Bearer secreT")]
        refused(grpc.StatusCode.UNAUTHENTICATED, lambda: running.stub.Health(health, metadata=wrong))
        right = [("authorization", "Bearer secret")]
        assert running.stub.Health(health, metadata=right).message == b"OK"


def test_only_the_owner_can_open_the_socket(echo: Running) -> None:
    assert stat.S_IMODE(echo.socket.stat().st_mode) == 0o600


def test_a_backend_stops_on_sigterm_without_waiting_for_its_streams(own_echo: Running) -> None:
    stream = own_echo.stream(content="[[echo tokens=9 delay_ms=600000]]")
    next(stream)
    own_echo.process.send_signal(signal.SIGTERM)
    assert own_echo.process.wait(LIMIT) == 0


def test_a_backend_that_works_on_more_than_64_requests_answers_its_health_check(folders: dict[str, Path]) -> None:
    with closing(Running(folders["echo"], "--threads", "86", "--parent", str(os.getpid()))) as running:
        assert running.load(Model="m", Options=["parallel:70"]).success
        streams = [running.stream(content="[[echo tokens=9 delay_ms=60000]]") for _ in range(70)]
        for stream in streams:
            next(stream)
        assert running.stub.Health(pb.HealthMessage(), timeout=LIMIT).message == b"OK"
        assert running.status().slots_busy == 70


def test_a_backend_dies_with_its_parent(folders: dict[str, Path]) -> None:
    socket = Path(tempfile.mkdtemp(prefix="lq")) / "b.sock"
    parent = subprocess.Popen(
        ["/bin/sh", "-c", f"{python_of(folders['echo'])} server.py --addr unix:{socket} & echo $!; wait"],
        cwd=folders["echo"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert wait_for(socket.exists)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_for(lambda: not alive(child))
    shutil.rmtree(socket.parent)


def test_a_load_that_names_an_unknown_option_is_told_the_known_ones(echo: Running, llama: Running) -> None:
    result = echo.load(Model="m", Options=["speed:9"])
    assert not result.success
    assert "unknown option 'speed'" in result.message
    assert "parallel" in result.message
    assert "must be at least 1" in echo.load(Model="m", Options=["parallel:0"]).message


# --- echo


def test_echo_answers_with_the_words_of_the_last_user_message(echo: Running) -> None:
    replies = list(echo.stream(content="one two three"))
    assert [reply.message for reply in replies] == [b"one", b" two", b" three", b""]
    assert [reply.chat_deltas[0].content for reply in replies[:-1]] == ["one", " two", " three"]
    assert [reply.tokens for reply in replies] == [1, 2, 3, 3]
    assert (replies[-1].finish_reason, replies[-1].prompt_tokens) == ("stop", 3)


def test_echo_answers_a_prompt_of_the_standard_fields(echo: Running) -> None:
    reply = echo.stub.Predict(pb.PredictOptions(Prompt="a b c", Tokens=2))
    assert (reply.message, reply.finish_reason, reply.tokens) == (b"a b", "length", 2)
    messages = [pb.Message(role="system", content="s"), pb.Message(role="user", content="x y")]
    assert echo.stub.Predict(pb.PredictOptions(Messages=messages, UseTokenizerTemplate=True)).message == b"x y"


def test_echo_stops_at_64_tokens_unless_told(echo: Running) -> None:
    replies = list(echo.stub.PredictStream(completion("w " * 90)))
    assert (replies[-1].tokens, replies[-1].finish_reason) == (64, "length")
    replies = list(echo.stub.PredictStream(completion("w " * 90, max_tokens=80)))
    assert (replies[-1].tokens, replies[-1].finish_reason) == (80, "length")


def test_echo_emits_as_many_numbers_as_the_directive_says(echo: Running) -> None:
    assert text_of(echo.stream(content="[[echo tokens=5 seed=7]] ignored")) == "7 8 9 10 11"
    assert list(echo.stream(content="[[echo tokens=100]]"))[-1].finish_reason == "stop"


def test_echo_continues_an_answer_that_was_cut(echo: Running) -> None:
    messages = [{"role": "user", "content": "[[echo tokens=6 fail_after=2]]"}]
    messages.append({"role": "assistant", "content": "0 1 2"})
    assert text_of(echo.stream(messages=messages)) == " 3 4 5"


def test_echo_is_no_faster_than_it_was_told(echo: Running) -> None:
    start = time.monotonic()
    stream = echo.stream(content="[[echo tokens=4 delay_ms=50 first_ms=200]]")
    next(stream)
    first = time.monotonic() - start
    list(stream)
    assert first >= 0.2
    assert time.monotonic() - start >= 0.35


def test_echo_refuses_an_unknown_directive(echo: Running) -> None:
    says = refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: list(echo.stream(content="[[echo speed=1]]")))
    assert "fail_after" in says


def test_echo_fails_when_told(echo: Running) -> None:
    stream = echo.stream(content="[[echo tokens=9 fail_after=3]]")
    assert [next(stream).message for _ in range(3)] == [b"0", b" 1", b" 2"]
    assert refused(grpc.StatusCode.INTERNAL, lambda: next(stream)) == "echo was told to fail"


def test_echo_exits_when_told(own_echo: Running) -> None:
    refused(grpc.StatusCode.UNAVAILABLE, lambda: list(own_echo.stream(content="[[echo tokens=9 exit_after=3]]")))
    assert own_echo.process.wait(LIMIT) == 3
    assert own_echo.process.stderr is not None
    assert b"echo was told to exit" in own_echo.process.stderr.read()


def test_echo_answers_nobody_once_it_is_wedged(own_echo: Running) -> None:
    stream = own_echo.stream(content="[[echo tokens=9 wedge_after=1]]")
    assert next(stream).message == b"0"
    health = pb.HealthMessage()
    refused(grpc.StatusCode.DEADLINE_EXCEEDED, lambda: own_echo.stub.Health(health, timeout=0.5))
    assert own_echo.process.poll() is None
    own_echo.process.kill()
    refused(grpc.StatusCode.UNAVAILABLE, lambda: next(stream))


def test_a_backend_ends_when_a_cancelled_request_does_not(folders: dict[str, Path]) -> None:
    with closing(Running(folders["echo"], LOCALAI_Q_CANCEL_PATIENCE="1")) as running:
        assert running.load(Model="m", Options=["parallel:2"]).success
        neighbour = running.stream(content="[[echo tokens=9 delay_ms=600000]]")
        next(neighbour)
        stream = running.stream(content="[[echo tokens=9 stuck_after=1]]")
        next(stream)
        assert running.process.stderr is not None
        assert b"echo is stuck" in running.process.stderr.readline()
        stream.cancel()
        refused(grpc.StatusCode.UNAVAILABLE, lambda: next(neighbour))
        assert running.process.wait(LIMIT) == STUCK
        assert b"a request that was cancelled has not ended within 1 seconds" in running.process.stderr.read()


def test_a_backend_goes_on_when_what_cannot_be_cancelled_takes_its_time(folders: dict[str, Path]) -> None:
    with closing(Running(folders["echo"], LOCALAI_Q_CANCEL_PATIENCE="1")) as running:
        assert running.load(Model="m", Options=["first_ms:3500"]).success
        given_up = running.stub.Embedding.future(pb.PredictOptions(Embeddings="a"))
        assert wait_for(lambda: running.status().slots_busy == 1)
        given_up.cancel()
        assert wait_for(lambda: running.status().slots_busy == 0)
        assert running.process.poll() is None


def test_a_backend_goes_on_when_cancelled_requests_end_one_after_the_other(folders: dict[str, Path]) -> None:
    with closing(Running(folders["echo"], LOCALAI_Q_CANCEL_PATIENCE="3")) as running:
        assert running.load(Model="m", Options=["parallel:5"]).success
        streams = [running.stream(content=f"[[echo tokens=9 delay_ms=600000 linger_ms={1000 * number}]]")
                   for number in range(1, 6)]  # fmt: skip
        for stream in streams:
            next(stream)
        for stream in streams:
            stream.cancel()
        assert wait_for(lambda: running.status().slots_busy == 0)
        assert running.process.poll() is None


def test_a_backend_goes_on_when_a_cancelled_request_ends(folders: dict[str, Path]) -> None:
    with closing(Running(folders["echo"], LOCALAI_Q_CANCEL_PATIENCE="1")) as running:
        assert running.load(Model="m", Options=["parallel:2"]).success
        neighbour = running.stream(content="[[echo tokens=9 delay_ms=500]]")
        for _ in range(4):
            next(neighbour)
            stream = running.stream(content="[[echo tokens=9 delay_ms=600000]]")
            next(stream)
            stream.cancel()
        assert text_of(neighbour) == " 4 5 6 7 8"


def test_echo_sends_garbage_when_told(echo: Running) -> None:
    replies = list(echo.stream(content="[[echo tokens=3 garbage_after=1]]"))
    with pytest.raises(UnicodeDecodeError):
        replies[1].message.decode()
    assert replies[-1].finish_reason == "stop"


def test_a_cancelled_echo_stops_amid_a_pause(echo: Running) -> None:
    stream = echo.stream(content="[[echo tokens=9 delay_ms=600000]]")
    next(stream)
    assert echo.status().slots_busy == 1
    stream.cancel()
    assert wait_for(lambda: echo.status().slots_busy == 0)


def test_echo_lets_requests_beyond_its_slots_wait(echo: Running) -> None:
    busy = [echo.stream(content="[[echo tokens=9 delay_ms=600000]]") for _ in range(2)]
    for stream in busy:
        next(stream)
    refused(grpc.StatusCode.DEADLINE_EXCEEDED, lambda: next(echo.stream(content="hello", timeout=0.5)))
    waiting = echo.stream(content="hello")
    busy[0].cancel()
    assert text_of(waiting) == "hello"
    busy[1].cancel()


def test_echo_refuses_a_prompt_beyond_its_context(echo: Running) -> None:
    says = refused(grpc.StatusCode.OUT_OF_RANGE, lambda: list(echo.stream(content="w " * 101)))
    assert "101 tokens" in says


def test_echo_calls_the_tool_that_it_must_call(echo: Running) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        reply = echo.stub.Predict(chat(tools=[TOOL], tool_choice=choice))
        call = reply.chat_deltas[0].tool_calls[0]
        assert (call.name, call.arguments, reply.finish_reason) == ("get_weather", "{}", "tool_calls")
    assert echo.stub.Predict(chat("just words", tools=[TOOL])).message == b"just words"


def test_echo_embeds_the_same_text_the_same_way(echo: Running) -> None:
    first, second, other = (echo.stub.Embedding(pb.PredictOptions(Embeddings=text)) for text in ("a b", "a b", "c"))
    assert first.embeddings == second.embeddings != other.embeddings
    assert (first.dim, len(first.embeddings), first.prompt_tokens) == (32, 32, 2)
    assert sum(value**2 for value in first.embeddings) == pytest.approx(1)


def test_echo_ranks_documents_by_shared_words(echo: Running) -> None:
    documents = ["red fox", "blue whale", "the red whale"]
    ranked = echo.stub.Rerank(pb.RerankRequest(query="red whale", documents=documents, top_n=2)).results
    assert [(item.index, item.relevance_score) for item in ranked] == [(2, 1.0), (0, 0.5)]


def test_echo_gives_words_back_for_their_ids(echo: Running) -> None:
    tokens = echo.stub.TokenizeString(pb.PredictOptions(Prompt="to be or not to be"))
    assert tokens.length == 6
    assert tokens.tokens[0] == tokens.tokens[4]
    assert echo.stub.Detokenize(pb.DetokenizeRequest(tokens=tokens.tokens)).content == "to be or not to be"
    refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: echo.stub.Detokenize(pb.DetokenizeRequest(tokens=[1])))


def test_echo_fails_its_load_when_told(own_echo: Running) -> None:
    result = own_echo.load(Model="m", Options=["load_fail:out of luck: really", "load_ms:200"])
    assert (result.success, result.message) == (False, "out of luck: really")
    refused(grpc.StatusCode.UNAVAILABLE, lambda: own_echo.load(Model="m", Options=["load_exit:4"]))
    assert own_echo.process.wait(LIMIT) == 4


@pytest.mark.parametrize("name", ["echo", "llama"])
def test_a_request_for_another_model_is_refused(name: str, request: pytest.FixtureRequest) -> None:
    running: Running = request.getfixturevalue(name)
    options = pb.PredictOptions(Prompt="x", ModelIdentity="other")
    says = refused(grpc.StatusCode.NOT_FOUND, lambda: list(running.stub.PredictStream(options)))
    assert says.startswith("model identity mismatch")
    refused(grpc.StatusCode.NOT_FOUND, lambda: running.stub.Predict(options))


def test_a_backend_without_a_model_says_so(echo: Running) -> None:
    assert echo.stub.Free(pb.HealthMessage()).success
    for call in (
        lambda: list(echo.stream()),
        lambda: echo.stub.Predict(chat()),
        lambda: echo.stub.Embedding(pb.PredictOptions(Embeddings="a")),
        lambda: echo.stub.TokenizeString(pb.PredictOptions(Prompt="a")),
        lambda: echo.stub.ModelMetadata(pb.ModelOptions()),
    ):
        refused(grpc.StatusCode.FAILED_PRECONDITION, call)
    assert echo.status().state == pb.StatusResponse.UNINITIALIZED
    assert echo.stub.Free(pb.HealthMessage()).success


# --- xllamacpp


def test_a_chat_streams_its_tokens_and_ends_with_counts(llama: Running) -> None:
    replies = list(llama.stream(content="Count to five.", max_tokens=8, temperature=0))
    *pieces, last = replies
    assert [piece.tokens for piece in pieces] == list(range(1, 9))
    assert all(piece.chat_deltas[0].content.encode() == piece.message for piece in pieces)
    assert (last.finish_reason, last.tokens) == ("length", 8)
    assert last.prompt_tokens > 10
    assert last.timing_prompt_processing > 0
    assert last.timing_token_generation > 0


def test_a_whole_answer_is_the_streamed_one(llama: Running) -> None:
    ask = {"content": "Name a colour.", "max_tokens": 12, "temperature": 0}
    llama.stub.Predict(chat(**ask))
    whole = llama.stub.Predict(chat(**ask, n=3))
    assert whole.message.decode() == text_of(llama.stream(**ask))
    assert whole.chat_deltas[0].content == whole.message.decode()
    assert whole.finish_reason in ("stop", "length")
    assert whole.cached_tokens > 0


def test_the_standard_fields_do_what_the_body_does(llama: Running) -> None:
    messages = [pb.Message(role="user", content="Name a colour.")]
    options = pb.PredictOptions(Messages=messages, UseTokenizerTemplate=True, Tokens=12, ModelIdentity="smol")
    by_fields = llama.stub.Predict(options)
    assert by_fields.message == llama.stub.Predict(chat("Name a colour.", max_tokens=12, temperature=0)).message
    stopped = llama.stub.Predict(pb.PredictOptions(Prompt="A, B, C, D, E,", Tokens=30, StopPrompts=["G"]))
    assert stopped.finish_reason == "stop"
    assert b"F" in stopped.message
    assert b"G" not in stopped.message


def test_an_answer_that_was_cut_is_continued(llama: Running) -> None:
    messages = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "A, B, C, D,"}]
    reply = llama.stub.Predict(chat(messages=messages, max_tokens=3, temperature=0))
    assert reply.message.decode().strip().startswith("E")


def test_log_probabilities_come_with_chats_and_completions(llama: Running) -> None:
    asks = [chat(max_tokens=3, temperature=0, logprobs=True, top_logprobs=2)]
    asks.append(completion("Once upon", max_tokens=3, temperature=0, logprobs=2))
    asks.append(pb.PredictOptions(Prompt="Once upon", Tokens=3, Logprobs=2))
    for ask in asks:
        items = json.loads(llama.stub.Predict(ask).logprobs)["content"]
        assert len(items) == 3
        assert {"token", "logprob", "bytes", "top_logprobs"} <= set(items[0])
        assert len(items[0]["top_logprobs"]) == 2


def test_characters_of_several_tokens_arrive_whole(llama: Running) -> None:
    ask = completion("😀🦊日本\n😀🦊日本\n😀🦊日本\n", max_tokens=12, temperature=0)
    replies = list(llama.stub.PredictStream(ask))
    assert "😀" in "".join(reply.message.decode() for reply in replies)
    assert replies[-1].tokens == 12


def test_a_json_schema_binds_the_answer(llama: Running) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    text = text_of(llama.stream(content="Where?", max_tokens=40, temperature=0, response_format=form))
    assert json.loads(text)["city"] in ("Rome", "Oslo")


def test_a_required_tool_is_called(llama: Running) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        replies = list(llama.stream(content="Weather in Paris?", max_tokens=60, tools=[TOOL], tool_choice=choice))
        calls = [call for reply in replies for delta in reply.chat_deltas for call in delta.tool_calls]
        assert [call.name for call in calls] == ["get_weather"]
        assert isinstance(json.loads(calls[0].arguments)["city"], str)
        assert calls[0].id
        assert replies[-1].finish_reason == "tool_calls"
        assert replies[-1].tokens > 5
        assert text_of(replies) == ""


def test_a_prompt_beyond_the_context_is_refused(llama: Running) -> None:
    says = refused(grpc.StatusCode.OUT_OF_RANGE, lambda: list(llama.stream(content="hi " * 1100)))
    assert "1024 tokens" in says


@pytest.mark.parametrize(
    "ask",
    [
        chat(messages=[{"role": "user"}]),
        chat(temperature="warm"),
        chat(response_format={"type": "json_schema", "json_schema": {"schema": {"type": "wrong"}}}),
        chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "fly"}}),
        completion(["a", "b"]),
        completion("a", grammar="root ::= ("),
        completion("a", grammar='root ::= "a"{5,2}'),
        completion("a", grammar="root ::= " + "(" * 200_000),
        completion("a", samplers=["top_k"] * 33),
        pb.PredictOptions(OpenAIBody="{", OpenAIKind="chat"),
        pb.PredictOptions(OpenAIBody="{}", OpenAIKind="song"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(llama: Running, ask: pb.PredictOptions) -> None:
    assert refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: list(llama.stub.PredictStream(ask)))


def test_a_cancelled_stream_frees_its_slot_and_costs_nothing_more(llama: Running) -> None:
    before = llama.worked()
    list(llama.stream(content="Tell a story.", max_tokens=60, ignore_eos=True))
    short = llama.worked() - before
    stream = llama.stream(content="Tell a long story.", max_tokens=900, ignore_eos=True)
    next(stream)
    assert (llama.status().slots_busy, llama.status().state) == (1, pb.StatusResponse.BUSY)
    before = llama.worked()
    stream.cancel()
    assert wait_for(lambda: llama.status().slots_busy == 0)
    assert llama.worked() - before < short, "the engine went on with an answer that nobody waits for"


def test_a_request_can_be_cancelled_before_its_first_token(llama: Running) -> None:
    long = chat("fox " * 980, max_tokens=1, cache_prompt=False)
    before = llama.worked()
    llama.stub.Predict(long)
    whole = llama.worked() - before
    stream = llama.stub.PredictStream(long)
    assert wait_for(lambda: llama.status().slots_busy == 1)
    before = llama.worked()
    stream.cancel()
    assert wait_for(lambda: llama.status().slots_busy == 0)
    llama.stub.Predict(chat("hi", max_tokens=1))
    assert llama.worked() - before < whole / 2, "the engine went on with a prompt that nobody waits for"


def test_a_grammar_that_keeps_the_engine_busy_is_ended_with_the_process(
    folders: dict[str, Path], weights: Path
) -> None:
    with closing(Running(folders["xllamacpp"], LOCALAI_Q_CANCEL_PATIENCE="2")) as running:
        assert loads(running, weights).success
        loaded = running.worked()
        stream = running.stream(grammar="root ::= " + "[a-z]* " * 60)
        assert wait_for(lambda: running.worked() > loaded + 3)  # it has read the prompt long since
        stream.cancel()
        assert running.process.wait(LIMIT) == STUCK


def test_two_streams_are_served_at_once(llama: Running) -> None:
    streams = [llama.stream(content=f"Story {n}", max_tokens=16, ignore_eos=True) for n in range(2)]
    next(streams[0])
    next(streams[1])
    assert llama.status().slots_busy == 2
    assert all(list(stream)[-1].finish_reason == "length" for stream in streams)


def test_text_becomes_tokens_and_text_again(llama: Running) -> None:
    tokens = llama.stub.TokenizeString(pb.PredictOptions(Prompt="Hello world 😀"))
    assert tokens.length == len(tokens.tokens) > 2
    assert llama.stub.Detokenize(pb.DetokenizeRequest(tokens=tokens.tokens)).content == "Hello world 😀"


def test_a_model_says_what_it_was_loaded_for(llama: Running) -> None:
    metadata = llama.stub.ModelMetadata(pb.ModelOptions())
    assert (metadata.context_size, metadata.slots, metadata.chat, metadata.embeddings) == (1024, 2, True, False)
    refused(grpc.StatusCode.UNIMPLEMENTED, lambda: llama.stub.Embedding(pb.PredictOptions(Embeddings="a")))
    refused(grpc.StatusCode.UNIMPLEMENTED, lambda: llama.stub.Rerank(pb.RerankRequest(query="a", documents=["b"])))
    memory = llama.status().memory
    assert memory.breakdown["rss"] == memory.total > 50 << 20


def test_free_ends_requests_gives_the_memory_back_and_a_load_works_again(
    folders: dict[str, Path], weights: Path, tmp_path: Path
) -> None:
    with closing(Running(folders["xllamacpp"])) as running:
        before = running.status().memory.total
        options = {"Model": "m", "ModelFile": str(weights), "ContextSize": 512, "Threads": 1}
        assert running.load(**options).success
        loaded = running.status().memory.total
        stream = running.stream(content="Tell a story", ignore_eos=True)
        next(stream)
        assert running.stub.Free(pb.HealthMessage(), timeout=LIMIT).success
        refused(grpc.StatusCode.CANCELLED, lambda: list(stream))
        freed = running.status().memory.total
        assert freed - before < (loaded - before) * 0.35, (before >> 20, loaded >> 20, freed >> 20)
        refused(grpc.StatusCode.FAILED_PRECONDITION, lambda: list(running.stream()))
        # The engine installs a SIGTERM handler of its own: ours must still be the one.
        assert running.load(**options, Embeddings=True).success
        check_embeddings(running)
        assert running.load(**options, Reranking=True).success
        ranked = running.stub.Rerank(pb.RerankRequest(query="a", documents=["x", "yes yes"])).results
        assert {item.index: item.text for item in ranked} == {0: "x", 1: "yes yes"}
        for what, says in bad_files(weights, tmp_path).items():
            result = running.load(Model="m", ModelFile=what)
            assert not result.success
            assert says in result.message
        assert running.stub.Health(pb.HealthMessage()).message == b"OK"
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(LIMIT) == 0


def loads(running: Running, weights: Path, **more: Any) -> pb.Result:
    return running.load(Model="m", ModelFile=str(weights), ContextSize=256, Threads=1, **more)


def said(running: Running, weights: Path, **more: Any) -> str:
    result = loads(running, weights, **more)
    assert result.success, result.message
    return text_of(running.stream(timeout=120, content="A", max_tokens=4, temperature=0))


def test_an_adapter_changes_what_is_said_and_a_draft_does_not(
    folders: dict[str, Path], weights: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "a.gguf"
    adapter.write_bytes(lora(30, 576))
    with closing(Running(folders["xllamacpp"])) as running:
        plain = said(running, weights)
        assert said(running, weights, LoraAdapters=[str(adapter)]) != plain
        assert said(running, weights, LoraAdapters=[str(adapter)], LoraScales=[0.0], DraftModel=str(weights)) == plain
        assert "which does not exist" in loads(running, weights, LoraAdapters=["/nowhere"]).message
        assert "2 LoraScales" in loads(running, weights, LoraAdapters=[str(adapter)], LoraScales=[1, 2]).message


@pytest.mark.parametrize("bare", [False, True])
def test_a_model_in_several_files_answers_as_the_whole_one(
    folders: dict[str, Path], weights: Path, tmp_path: Path, bare: bool
) -> None:
    parts = split_into(tmp_path, weights.read_bytes(), 3, bare=bare)
    with closing(Running(folders["xllamacpp"])) as running:
        whole = said(running, weights)
        assert said(running, parts[0]) == whole
        assert "is one of 3 files of a model" in loads(running, parts[1]).message


def test_a_projector_is_loaded_where_it_suits_the_model_and_changes_no_words(
    folders: dict[str, Path], weights: Path, tmp_path: Path
) -> None:
    suits, other = tmp_path / "suits", tmp_path / "other"
    suits.write_bytes(projector(576))
    other.write_bytes(projector(512))
    with closing(Running(folders["xllamacpp"])) as running:
        assert said(running, weights, MMProj=str(suits)) == said(running, weights)
        refusal = loads(running, weights, MMProj=str(other))
        assert (refusal.success, f"because of MMProj {other}" in refusal.message) == (False, True)


@pytest.mark.parametrize("field", ["MMProj", "DraftModel", "LoraAdapters"])
def test_a_damaged_file_beside_the_model_is_named(
    folders: dict[str, Path], weights: Path, tmp_path: Path, field: str
) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"GGUF" + bytes(100))
    with closing(Running(folders["xllamacpp"])) as running:
        value = [str(damaged)] if field == "LoraAdapters" else str(damaged)
        result = loads(running, weights, **{field: value})
        assert (result.success, str(damaged) in result.message) == (False, True)


def test_a_chat_template_of_ones_own(folders: dict[str, Path], weights: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    options = {"Options": [f"chat_template:{template}"]}
    with closing(Running(folders["xllamacpp"])) as running:
        template.write_text(
            "{{ raise_exception('never') if messages | length > 2 else messages[0].content ~ ', B, C,' }}"
        )
        assert said(running, weights, **options).strip().startswith("D")
        messages = [{"role": role, "content": "A"} for role in ("user", "assistant", "user")]
        says = refused(
            grpc.StatusCode.INVALID_ARGUMENT, lambda: list(running.stub.PredictStream(chat(messages=messages)))
        )
        assert "never" in says
        template.write_text("{% for")
        assert "because of the chat template" in loads(running, weights, **options).message


def check_embeddings(running: Running) -> None:
    one = running.stub.Embedding(pb.PredictOptions(Embeddings="hello there"))
    tokens = running.stub.TokenizeString(pb.PredictOptions(Prompt="hello there")).tokens
    same = running.stub.Embedding(pb.PredictOptions(EmbeddingTokens=tokens))
    assert one.dim == len(one.embeddings) == 576
    assert one.prompt_tokens == len(tokens)
    assert list(one.embeddings) == pytest.approx(list(same.embeddings), abs=1e-3)
    assert sum(value**2 for value in one.embeddings) == pytest.approx(1, abs=1e-3)
    too_long = pb.PredictOptions(Embeddings="hi " * 600)
    refused(grpc.StatusCode.OUT_OF_RANGE, lambda: running.stub.Embedding(too_long))
    refused(grpc.StatusCode.UNIMPLEMENTED, lambda: list(running.stream()))
    refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: running.stub.Embedding(pb.PredictOptions()))


def bad_files(weights: Path, folder: Path) -> dict[str, str]:
    """Paths that cannot be loaded, and what must be said of them."""
    whole = weights.read_bytes()
    files = {
        "garbage": (b"\x00nonsense" * 500, "does not begin with 'GGUF'"),
        "header": (whole[:4] + b"\x03\0\0\0" + b"\xff" * 400, "is not a usable GGUF file: it claims"),
        "keys": (whole[:20_000], "ends within its header"),
        "tensors": (whole[:5_000_000], "cut short or damaged"),
        "empty": (b"", "does not begin with 'GGUF'"),
        "part": (split(gguf(), 3)[0], "is one of 3 files of a model"),
        "properties": (gguf(tensors={}), "it has no tensors"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    found = {str(folder / name): says for name, (_, says) in files.items()}
    return {**found, str(folder / "nowhere"): "No such file", "": "ModelFile is empty"}
