"""A backend without weights: it answers a prompt with the prompt's own words, one word a token.

Owns the answers, their pace, and the failures that a request may order (see the README). The process, its socket and
the model's lifecycle are `serving`'s.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import grpc

try:
    import serving
except ModuleNotFoundError:  # in the source tree it lies one folder up
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import serving
import backend_pb2

DEFAULT_TOKENS = 64
KNOWN_IDS = 65_536  # words that Detokenize remembers
GARBAGE = bytes(range(256)) * 256
DIRECTIVE = re.compile(r"\s*\[\[echo\b([^\]]*)\]\]\s?")


@dataclass(frozen=True)
class Plan:
    """How a request is answered. Times are milliseconds; -1: never."""

    tokens: int = -1  # that many numbers instead of the prompt's words
    seed: int = 0  # the first of those numbers
    delay_ms: float = 0
    first_ms: float = 0
    fail_after: int = -1
    exit_after: int = -1
    exit_status: int = 3
    wedge_after: int = -1
    garbage_after: int = -1
    stuck_after: int = -1
    linger_ms: float = 0
    again: int = 0  # 1: failures happen to a continued answer too


@dataclass(frozen=True)
class Ask:
    """What a request says."""

    text: str  # what is echoed
    prefix: str  # the answer so far, which is continued
    words: int  # of the whole prompt
    most: int  # tokens; 0: not said
    tool: str  # the function that must be called


class Echo:
    """The model: its options, its slots and the words that it has seen."""

    def __init__(self, options: backend_pb2.ModelOptions, plan: Plan, slots: int) -> None:
        self.context_size = options.ContextSize
        self.plan = plan
        self.slots = slots
        self._free = threading.Semaphore(slots)
        self._words: OrderedDict[int, str] = OrderedDict()

    def metadata(self) -> backend_pb2.ModelMetadataResponse:
        return backend_pb2.ModelMetadataResponse(
            context_size=self.context_size, slots=self.slots, chat=True, embeddings=True, rerank=True
        )

    def close(self) -> None:
        self._words.clear()

    def take_slot(self, call: serving.Call) -> bool:
        """Wait for a slot; False when the call was stopped first."""
        while not self._free.acquire(timeout=0.02):
            if call.stopped.is_set():
                return False
        return True

    def give_slot(self) -> None:
        self._free.release()

    def ids(self, text: str) -> list[int]:
        """One id a word, the same in every process."""
        ids = []
        for word in text.split():
            number = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") >> 1
            self._words[number] = word
            self._words.move_to_end(number)
            ids.append(number)
        while len(self._words) > KNOWN_IDS:
            self._words.popitem(last=False)
        return ids

    def text(self, ids: list[int]) -> str:
        """The words of ids that `ids` has given."""
        unknown = [number for number in ids if number not in self._words]
        if unknown:
            raise serving.Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"token {unknown[0]} was never given out")
        return " ".join(self._words[number] for number in ids)


class EchoBackend(serving.Backend):
    """The service."""

    def __init__(self) -> None:
        super().__init__()
        self._wedged = threading.Event()

    def load(self, options: backend_pb2.ModelOptions) -> Echo:
        number, text = serving.whole_number(0), str
        known = {
            "parallel": serving.whole_number(1),
            "delay_ms": float,
            "first_ms": float,
            "load_ms": number,
            "seed": number,
        }
        known |= {"load_work_ms": number}
        found = serving.parse_options(options.Options, {**known, "load_fail": text, "load_exit": number})
        time.sleep(found.get("load_ms", 0) / 1000)
        _work(found.get("load_work_ms", 0) / 1000)
        if "load_exit" in found:
            _exit(f"echo was told to exit with {found['load_exit']} at load", found["load_exit"])
        if "load_fail" in found:
            raise serving.LoadFailure(found["load_fail"])
        plan = Plan(delay_ms=found.get("delay_ms", 0), first_ms=found.get("first_ms", 0), seed=found.get("seed", 0))
        return Echo(options, plan, found.get("parallel", 1))

    def Health(self, request: backend_pb2.HealthMessage, context: grpc.ServicerContext) -> backend_pb2.Reply:
        self._hang(context)
        return super().Health(request, context)

    def LoadModel(self, request: backend_pb2.ModelOptions, context: grpc.ServicerContext) -> backend_pb2.Result:
        self._hang(context)
        return super().LoadModel(request, context)

    def Free(self, request: backend_pb2.HealthMessage, context: grpc.ServicerContext) -> backend_pb2.Result:
        self._hang(context)
        return super().Free(request, context)

    def Status(self, request: backend_pb2.HealthMessage, context: grpc.ServicerContext) -> backend_pb2.StatusResponse:
        self._hang(context)
        return super().Status(request, context)

    def PredictStream(
        self, request: backend_pb2.PredictOptions, context: grpc.ServicerContext
    ) -> Iterator[backend_pb2.Reply]:
        self._hang(context)
        with self.call(context, request.ModelIdentity) as (engine, call):
            yield from self._answer(engine, call, request, context)

    def Predict(self, request: backend_pb2.PredictOptions, context: grpc.ServicerContext) -> backend_pb2.Reply:
        self._hang(context)
        with self.call(context, request.ModelIdentity) as (engine, call):
            pieces = list(self._answer(engine, call, request, context))
            whole = backend_pb2.Reply()
            whole.CopyFrom(pieces[-1])
            whole.message = b"".join(piece.message for piece in pieces)
            deltas = [delta for piece in pieces for delta in piece.chat_deltas]
            del whole.chat_deltas[:]
            if deltas:
                whole.chat_deltas.add(
                    content="".join(delta.content for delta in deltas),
                    tool_calls=[item for delta in deltas for item in delta.tool_calls],
                )
            return whole

    def Embedding(
        self, request: backend_pb2.PredictOptions, context: grpc.ServicerContext
    ) -> backend_pb2.EmbeddingResult:
        self._hang(context)
        with self.call(context, request.ModelIdentity) as (engine, _):
            text = request.Embeddings or " ".join(str(number) for number in request.EmbeddingTokens)
            words = len(text.split())
            _check_length(engine, words)
            time.sleep(engine.plan.first_ms / 1000)
            raw = [byte - 127.5 for byte in hashlib.sha256(text.encode()).digest()]
            length = math.sqrt(sum(value * value for value in raw))
            return backend_pb2.EmbeddingResult(
                embeddings=[value / length for value in raw], dim=len(raw), tokens=words, prompt_tokens=words
            )

    def Rerank(self, request: backend_pb2.RerankRequest, context: grpc.ServicerContext) -> backend_pb2.RerankResult:
        """Scores are the share of the query's words that a document has."""
        self._hang(context)
        with self.call(context, request.ModelIdentity):
            query = set(request.query.lower().split())
            results = [
                backend_pb2.RerankDocument(
                    index=index,
                    text=document,
                    relevance_score=len(query & set(document.lower().split())) / max(len(query), 1),
                )
                for index, document in enumerate(request.documents)
            ]
            results.sort(key=lambda result: -result.relevance_score)
            words = sum(len(text.split()) for text in (request.query, *request.documents))
            return backend_pb2.RerankResult(
                results=results[: request.top_n or None],
                usage=backend_pb2.RerankUsage(total_tokens=words, prompt_tokens=words),
            )

    def TokenizeString(
        self, request: backend_pb2.PredictOptions, context: grpc.ServicerContext
    ) -> backend_pb2.TokenizationResponse:
        self._hang(context)
        with self.call(context, request.ModelIdentity) as (engine, _):
            ids = engine.ids(request.Prompt)
            return backend_pb2.TokenizationResponse(length=len(ids), tokens=ids)

    def Detokenize(
        self, request: backend_pb2.DetokenizeRequest, context: grpc.ServicerContext
    ) -> backend_pb2.DetokenizeResponse:
        self._hang(context)
        with self.call(context, "") as (engine, _):
            return backend_pb2.DetokenizeResponse(content=engine.text(list(request.tokens)))

    def _answer(
        self, engine: Echo, call: serving.Call, request: backend_pb2.PredictOptions, context: grpc.ServicerContext
    ) -> Iterator[backend_pb2.Reply]:
        call.heeds_stop = True
        ask, chat = _read(request)
        _check_length(engine, ask.words)
        plan, text = _plan(engine.plan, ask.text)
        if not chat and plan.tokens >= 0:
            ask = replace(ask, prefix=text)  # a completion goes on behind its prompt
        if not engine.take_slot(call):
            _stopped(call)
        try:
            if ask.tool:
                yield _tool_call(ask)
            else:
                yield from self._tokens(plan, replace(ask, text=text), chat, call, context)
        finally:
            engine.give_slot()

    def _tokens(
        self, plan: Plan, ask: Ask, chat: bool, call: serving.Call, context: grpc.ServicerContext
    ) -> Iterator[backend_pb2.Reply]:
        tokens, reason = _tokens(plan, ask)
        done = _already_said(tokens, ask.prefix)
        failing = not done or bool(plan.again)
        started = time.monotonic()
        first = started
        for index in range(done, len(tokens)):
            if call.stopped.wait((plan.first_ms if index == done else plan.delay_ms) / 1000):
                time.sleep(plan.linger_ms / 1000)
                _stopped(call)
            if index == done:
                first = time.monotonic()
            if failing:
                self._fail_as_told(plan, index, context)
            message = tokens[index].encode()
            if failing and index == plan.garbage_after:
                message = _garbage()
                yield backend_pb2.Reply(message=message, tokens=index - done + 1)
            else:
                yield _piece(tokens[index], index - done + 1, chat)
        if failing:
            self._fail_as_told(plan, len(tokens), context)
        yield backend_pb2.Reply(
            tokens=len(tokens) - done,
            prompt_tokens=ask.words,
            finish_reason=reason,
            timing_prompt_processing=(first - started) * 1000,
            timing_token_generation=(time.monotonic() - first) * 1000,
        )

    def _fail_as_told(self, plan: Plan, index: int, context: grpc.ServicerContext) -> None:
        if index == plan.exit_after:
            _exit("echo was told to exit", plan.exit_status)
        if index == plan.fail_after:
            raise serving.Refusal(grpc.StatusCode.INTERNAL, "echo was told to fail")
        if index == plan.stuck_after:
            print("echo is stuck", file=sys.stderr, flush=True)
            threading.Event().wait()
        if index == plan.wedge_after:
            self._wedged.set()
            self._hang(context)

    def _hang(self, context: grpc.ServicerContext) -> None:
        """Once wedged, answer nothing: hold the call until its caller gives up."""
        while self._wedged.is_set() and context.is_active():
            time.sleep(0.05)
        if self._wedged.is_set():
            context.abort(grpc.StatusCode.CANCELLED, "echo is wedged")


def _work(seconds: float) -> None:
    """Use a processor, as an engine does that loads."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(10_000))
        time.sleep(0.001)


def _exit(line: str, status: int) -> NoReturn:
    print(line, file=sys.stderr, flush=True)
    os._exit(status)


def _stopped(call: serving.Call) -> NoReturn:
    reason = "the model is being freed" if call.freed else "the caller went away"
    raise serving.Refusal(grpc.StatusCode.CANCELLED, reason)


def _check_length(engine: Echo, words: int) -> None:
    if 0 < engine.context_size < words:
        raise serving.Refusal(
            grpc.StatusCode.OUT_OF_RANGE,
            f"request ({words} tokens) exceeds the available context size ({engine.context_size} tokens)",
        )


def _read(request: backend_pb2.PredictOptions) -> tuple[Ask, bool]:
    """What the request says, and whether it is a chat."""
    if request.OpenAIBody:
        try:
            body = json.loads(request.OpenAIBody)
        except ValueError as error:
            raise serving.Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"OpenAIBody is not JSON: {error}") from error
        most = body.get("max_completion_tokens") or body.get("max_tokens") or 0
        if request.OpenAIKind == "completion":
            return _ask([], str(body.get("prompt") or ""), most, ""), False
        tool = _forced_tool(body.get("tools") or [], body.get("tool_choice"))
        return _ask(body.get("messages") or [], "", most, tool), True
    messages = [{"role": message.role, "content": message.content} for message in request.Messages]
    chat = bool(messages) and (request.UseTokenizerTemplate or not request.Prompt)
    tool = _forced_tool(json.loads(request.Tools or "[]"), _choice(request.ToolChoice))
    return _ask(messages if chat else [], request.Prompt, max(request.Tokens, 0), tool), chat


def _choice(text: str) -> Any:
    return json.loads(text) if text.startswith("{") else text


def _ask(messages: list[dict[str, Any]], prompt: str, most: int, tool: str) -> Ask:
    if not messages:
        return Ask(text=prompt, prefix="", words=len(prompt.split()), most=most, tool=tool)
    texts = [(message.get("role"), _content(message.get("content"))) for message in messages]
    said = [text for role, text in texts if role == "user"]
    prefix = texts[-1][1] if texts[-1][0] == "assistant" else ""
    words = sum(len(text.split()) for _, text in texts)
    return Ask(text=said[-1] if said else "", prefix=prefix, words=words, most=most, tool=tool)


def _content(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text") or "") for part in content)
    return str(content or "")


def _forced_tool(tools: list[dict[str, Any]], choice: Any) -> str:
    if isinstance(choice, dict):
        return str(choice.get("function", {}).get("name", ""))
    return str(tools[0]["function"]["name"]) if tools and choice == "required" else ""


def _plan(plan: Plan, text: str) -> tuple[Plan, str]:
    """The plan that a directive at the start of the text changes, and the text without it."""
    found = DIRECTIVE.match(text)
    if not found:
        return plan, text
    changes: dict[str, float | int] = {}
    for item in found[1].split():
        key, _, value = item.partition("=")
        if key not in Plan.__dataclass_fields__:
            known = ", ".join(Plan.__dataclass_fields__)
            raise serving.Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"echo does not know {key!r}; it knows: {known}")
        try:
            changes[key] = float(value) if key.endswith("_ms") else int(value)
        except ValueError as error:
            raise serving.Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"{key} cannot be {value!r}") from error
    return replace(plan, **changes), text[found.end() :]


def _tokens(plan: Plan, ask: Ask) -> tuple[list[str], str]:
    """The whole answer and its finish reason."""
    if plan.tokens >= 0:
        words, most = [str(plan.seed + number) for number in range(plan.tokens)], plan.tokens
    else:
        words, most = ask.text.split(), DEFAULT_TOKENS
    tokens = [word if number == 0 else f" {word}" for number, word in enumerate(words)]
    done = _already_said(tokens, ask.prefix)
    end = done + (ask.most or max(most - done, 0))
    return tokens[:end], "length" if end < len(tokens) else "stop"


def _already_said(tokens: list[str], prefix: str) -> int:
    """How many tokens the prefix holds; 0 when it is no prefix of the answer."""
    said = ""
    for number, token in enumerate(tokens):
        if said == prefix:
            return number
        said += token
    return len(tokens) if said == prefix else 0


def _piece(text: str, tokens: int, chat: bool) -> backend_pb2.Reply:
    deltas = [backend_pb2.ChatDelta(content=text)] if chat else []
    return backend_pb2.Reply(message=text.encode(), tokens=tokens, chat_deltas=deltas)


def _tool_call(ask: Ask) -> backend_pb2.Reply:
    call = backend_pb2.ToolCallDelta(index=0, id="call_echo", name=ask.tool, arguments="{}")
    delta = backend_pb2.ChatDelta(tool_calls=[call])
    return backend_pb2.Reply(chat_deltas=[delta], tokens=1, prompt_tokens=ask.words, finish_reason="tool_calls")


def _garbage() -> bytes:
    """Noise on both outputs, and bytes that are no UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        stream.buffer.write(GARBAGE)
        stream.flush()
    return b"\xff\xfe\x80garbage\xc3"


if __name__ == "__main__":
    serving.main(EchoBackend())
