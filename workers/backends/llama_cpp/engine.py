"""The engine: one model, and one sequence of tokens at a time. Owns how it is loaded and the road of an answer in it.

llama.cpp's functions are called through `native`, tokens are chosen by `sampling`, prompts are made by `prompts`, grammars
by `grammars`, and text by `writing`. A call of the library lets other threads run, so that the process answers meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import backend_pb2
import grpc
import llama_cpp as c
from answering import Engine
from gguf_header import header_of
from grammars import grammar_of
from native import Context, Model, Stopped
from prompts import Template
from sampling import PARAMETERS, Sampler, Settings, read_settings
from serving import (
    LoadFailure,
    Refusal,
    adapters_of,
    existing_file,
    known_value,
    one_of,
    parse_options,
    physical_cores,
    whole_number,
)
from writing import Text, chances, logprob_item

DEFAULT_CONTEXT = 4096  # tokens of one request, where the load does not say
BATCH = 128  # tokens of a prompt between two moments at which a request can be cancelled
MOST_ALTERNATIVES = 20  # in log probabilities
LOOK = 0.1  # seconds after which a request that waits for another looks whether it is still wanted

POOLING = {name: getattr(c, f"LLAMA_POOLING_TYPE_{name.upper()}") for name in ("mean", "cls", "last")}
CACHE_TYPES = {
    name: getattr(c, f"GGML_TYPE_{name.upper()}")
    for name in ("f32", "f16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
}
FLASH = {
    **dict.fromkeys(("", "auto"), c.LLAMA_FLASH_ATTN_TYPE_AUTO),
    **dict.fromkeys(("on", "true", "enabled", "1"), c.LLAMA_FLASH_ATTN_TYPE_ENABLED),
    **dict.fromkeys(("off", "false", "disabled", "0"), c.LLAMA_FLASH_ATTN_TYPE_DISABLED),
}
OPTIONS: dict[str, Callable[[str], Any]] = {
    "parallel": whole_number(1),
    "pooling": one_of(POOLING),
    "gpu_layers": whole_number(0),
    "chat_template": str,
}

# What a body may have besides the parameters of `sampling`. Several calls of tools, and tokens that are kept when the
# context is shifted, are asked for in vain: there is one call, and nothing is shifted.
OTHER_FIELDS = {
    "messages", "prompt", "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "reasoning_effort",
    "reasoning_format", "response_format", "grammar", "max_tokens", "stop", "logprobs", "top_logprobs", "cache_prompt",
    "n_keep",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request, read."""

    kind: str  # chat | completion
    prompt: list[int]
    settings: Settings
    grammar: str | None
    stops: list[str]
    most: int  # tokens of the answer
    alternatives: int | None  # of each token with its log probability; None: no log probabilities
    reuse: bool  # whether what the cache holds may be used


@dataclass
class Progress:
    """How far an answer is: tokens and milliseconds."""

    read: int = 0  # of the prompt
    cached: int = 0
    written: int = 0
    began: float = field(default_factory=time.monotonic)
    first: float = 0.0  # when the prompt had been read

    def timings(self) -> dict[str, float]:
        """As llama.cpp's server has them in its chunks."""
        now = time.monotonic()
        return {"cache_n": self.cached, "prompt_n": self.read - self.cached, "predicted_n": self.written,
                "prompt_ms": ((self.first or now) - self.began) * 1000,
                "predicted_ms": (now - self.first) * 1000 if self.first else 0.0}  # fmt: skip


class OneSequence(Engine):
    """A loaded model."""

    slots = 1

    def __init__(
        self, model: Model, context: Context, *, mode: str, context_size: int, template: Template | None
    ) -> None:
        self._model = model
        self._context = context
        self._template = template
        self._alone = threading.Lock()  # held by the request that is at work
        self.mode = mode
        self.context_size = context_size
        self.template_has_tools = template is not None and template.has_tools
        self.thinks = template is not None and template.thinks

    def close(self) -> None:
        self._context.close()
        self._model.close()

    def generate(self, kind: str, fields: dict[str, Any], take: Callable[[dict[str, Any]], bool]) -> None:
        ask = self._read(kind, fields)
        while not self._alone.acquire(timeout=LOOK):
            if take({"timings": Progress().timings()}):
                return
        try:
            sampler = Sampler(self._model, ask.settings, ask.grammar, ask.prompt)
            try:
                for chunk in self._write(ask, sampler, take):
                    if take(chunk):
                        break
            except Stopped:
                pass
            finally:
                sampler.close()
        finally:
            self._alone.release()

    def embed(self, text: str | list[int]) -> tuple[list[float], int]:
        tokens = self._tokens(text)
        if len(tokens) > self.context_size:
            raise self._too_long(len(tokens))
        with self._alone:
            return self._context.vector(tokens).tolist(), len(tokens)

    def tokenize(self, text: str) -> list[int]:
        return self._model.tokens_of(text, special=False)

    def detokenize(self, tokens: list[int]) -> str:
        return self._model.text_of(tokens)

    def _read(self, kind: str, fields: Mapping[str, Any]) -> Ask:
        """The request of a body: everything that can be wrong with it is found before it uses the model.

        Raises:
            Refusal, ValueError: what is wrong.
        """
        if unknown := fields.keys() - OTHER_FIELDS - PARAMETERS.keys():
            raise Refusal(grpc.StatusCode.UNIMPLEMENTED, f"llama-cpp does not know {min(unknown)!r}")
        settings = read_settings(fields, self._model, self.context_size)
        prompt = self._chat_prompt(fields) if kind == "chat" else self._tokens(fields["prompt"])
        if len(prompt) >= self.context_size:
            raise self._too_long(len(prompt))
        room, most = self.context_size - len(prompt), _whole(fields, "max_tokens")
        stops = fields.get("stop") or []
        stops = [stops] if isinstance(stops, str) else stops
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError("stop must be a string, or a list of strings, that are not empty")
        return Ask(
            kind=kind,
            prompt=prompt,
            settings=settings,
            grammar=grammar_of(fields),
            stops=stops,
            most=min(most, room) if most > 0 else room,
            alternatives=_alternatives(kind, fields),
            reuse=fields.get("cache_prompt") is not False,
        )

    def _chat_prompt(self, fields: Mapping[str, Any]) -> list[int]:
        if self._template is None:
            raise _cannot(
                "this model's file has no chat template: ask for a completion, or give the option chat_template"
            )
        if fields.get("tools") and fields.get("tool_choice") != "none":
            raise _cannot(
                "llama-cpp cannot tell calls of tools from text: send tool_choice 'required', or a function by name, "
                "or use the backend xllamacpp"
            )
        if fields.get("reasoning_format") not in (None, "none", "auto"):
            raise _cannot("llama-cpp cannot tell reasoning from text: send reasoning_format 'none'")
        text = self._template.prompt(fields)
        first = self._model.text_of([self._model.first]) if self._model.begins_prompts else ""
        return self._tokens(text.removeprefix(first))

    def _tokens(self, text: str | list[int]) -> list[int]:
        """The tokens of a prompt: those of a list are taken as they are."""
        if isinstance(text, list):
            self._model.check(text)
            return text
        tokens = self._model.tokens_of(text, special=True)
        if not tokens and self._model.first >= 0:
            return [self._model.first]
        if not tokens:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "the prompt is empty")
        return tokens

    def _too_long(self, tokens: int) -> Refusal:
        return Refusal(
            grpc.StatusCode.OUT_OF_RANGE,
            f"the prompt has {tokens} tokens, and the context has room for {self.context_size} tokens, answer included",
        )

    def _write(self, ask: Ask, sampler: Sampler, take: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any]]:
        """The chunks of an answer.

        Raises:
            Stopped: nobody wants it any more.
        """
        progress = Progress()

        def after_batch(read: int, cached: int) -> bool:
            progress.read, progress.cached = read, cached
            return take({"timings": progress.timings()})

        if after_batch(0, 0):  # it may have waited long
            return
        self._context.read(ask.prompt, reuse=ask.reuse, after_batch=after_batch)
        progress.first = time.monotonic()
        text, items, reason = Text(ask.stops), [], "length"
        while progress.written < ask.most:
            logits = self._context.logits()
            token = sampler.choose(logits)
            progress.written += token is not None
            if token is None or token in self._model.ends:
                reason = "stop"
                break
            if ask.alternatives is not None:
                items.append(self._item(logits, token, ask.alternatives))
            shown = text.add(self._model.piece(token))
            if shown:
                yield _chunk(ask.kind, shown, items, progress)
                items = []
            if text.stopped:
                reason, items = "stop", []
                break
            if not shown and take({"timings": progress.timings()}):
                return
            if progress.written < ask.most:
                sampler.accept(token)
                self._context.add([token])
        yield _chunk(ask.kind, text.rest(), items, progress, reason)

    def _item(self, logits: Any, token: int, alternatives: int) -> dict[str, Any]:
        piece = self._model.piece
        logprob, ranked = chances(logits, token, alternatives)
        tops = [logprob_item(piece(each, special=True), chance) for each, chance in ranked]
        return {**logprob_item(piece(token, special=True), logprob), "id": token, "top_logprobs": tops}


def _chunk(kind: str, text: str, items: list[Any], progress: Progress, reason: str | None = None) -> dict[str, Any]:
    choice: dict[str, Any] = {"delta": {"content": text}} if kind == "chat" else {"text": text}
    if items:
        choice["logprobs"] = {"content": items}
    return {"choices": [{**choice, "finish_reason": reason}], "timings": progress.timings()}


def _cannot(message: str) -> Refusal:
    return Refusal(grpc.StatusCode.UNIMPLEMENTED, message)


def _whole(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if value is None:
        return 0
    if type(value) is not int:
        raise ValueError(f"{name} must be a whole number")
    return value


def _alternatives(kind: str, fields: Mapping[str, Any]) -> int | None:
    """How many likely tokens are shown with each; None if no log probabilities are asked for."""
    if kind == "chat":
        asked = _whole(fields, "top_logprobs") if fields.get("logprobs") else None
    else:
        asked = None if fields.get("logprobs") is None else _whole(fields, "logprobs")
    if asked is not None and not 0 <= asked <= MOST_ALTERNATIVES:
        raise ValueError(f"the alternatives in log probabilities can be 0 to {MOST_ALTERNATIVES}")
    return asked


def load(options: backend_pb2.ModelOptions) -> OneSequence:
    """The model that the options name, loaded.

    Raises:
        LoadFailure: it cannot be loaded; the message says why.
    """
    found = parse_options(options.Options, OPTIONS)
    if found.get("parallel", 1) > 1:
        raise LoadFailure("llama-cpp works on one request at a time: the option parallel (slots) can only be 1")
    if options.Reranking or options.MMProj or options.DraftModel:
        raise LoadFailure(
            "llama-cpp neither ranks documents nor sees images, and takes no DraftModel: use the backend xllamacpp"
        )
    adapters = adapters_of(options)
    header = header_of(options.ModelFile)
    mode = "embedding" if options.Embeddings else "chat"
    params = _params(options, mode, found, header)
    with ExitStack() as undo:
        model = Model(options.ModelFile, found.get("gpu_layers", options.NGPULayers or None))
        undo.callback(model.close)
        template = _template(model, found)
        context = Context(model, params)
        undo.callback(context.close)
        context.adapt(adapters)
        undo.pop_all()
    return OneSequence(model, context, mode=mode, context_size=params.n_ctx, template=template)


def _params(options: backend_pb2.ModelOptions, mode: str, found: Mapping[str, Any], header: Mapping[str, Any]) -> Any:
    params = c.llama_context_default_params()
    params.n_ctx = options.ContextSize if options.ContextSize > 0 else DEFAULT_CONTEXT
    params.n_threads = params.n_threads_batch = options.Threads or physical_cores()
    params.flash_attn_type = known_value("FlashAttention", FLASH, options.FlashAttention)
    params.type_k = known_value("CacheTypeKey", CACHE_TYPES, options.CacheTypeKey or "f16")
    params.type_v = known_value("CacheTypeValue", CACHE_TYPES, options.CacheTypeValue or "f16")
    params.n_batch = min(options.NBatch if options.NBatch > 0 else BATCH, params.n_ctx)
    if mode == "embedding":
        params.embeddings = True
        params.n_batch = params.n_ctx  # a pooled text must fit into one batch
        if "pooling" in found:
            params.pooling_type = found["pooling"]
        elif not header.get(f"{header.get('general.architecture')}.pooling_type"):
            params.pooling_type = POOLING["mean"]
    params.n_ubatch = params.n_batch
    return params


def _template(model: Model, found: Mapping[str, Any]) -> Template | None:
    text = model.template
    if "chat_template" in found:
        text = existing_file("chat_template", found["chat_template"]).read_text(encoding="utf-8")
    if not text:
        return None
    first, last = (model.text_of([token]) if token >= 0 else "" for token in (model.first, model.last))
    return Template(text, first=first, last=last)
