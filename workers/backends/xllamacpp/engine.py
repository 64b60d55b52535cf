"""The engine: llama.cpp's server inside this process. Owns its parameters, its life, and the ways into it.

The engine also listens on a loopback port, which tokenizing needs; a random key keeps everybody else out.
"""

from __future__ import annotations

import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backend_pb2
import grpc
import replies
import xllamacpp
from answering import Engine
from gguf_header import header_of
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

DEFAULT_CONTEXT = 4096  # tokens of one request, where the load does not say
# On a CPU a batch of the prompt takes about a second; nothing else can be decoded, and nothing cancelled, within one.
CPU_BATCH = 256
DEFAULT_CACHE = 512  # MiB of RAM for the prompts of requests that have ended
HTTP_TIMEOUT = 30.0

POOLING = {
    name: getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{name.upper()}")
    for name in ("mean", "cls", "last")
}
CACHE_TYPES = {
    name: getattr(xllamacpp.ggml_type, f"GGML_TYPE_{name.upper()}")
    for name in ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
}
FLASH = {
    **dict.fromkeys(("", "auto"), xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_AUTO),
    **dict.fromkeys(("on", "true", "enabled", "1"), xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED),
    **dict.fromkeys(("off", "false", "disabled", "0"), xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED),
}


OPTIONS: dict[str, Callable[[str], Any]] = {
    "parallel": whole_number(1),
    "pooling": one_of(POOLING),
    "gpu_layers": whole_number(0),
    "cache_ram": whole_number(0),
    "chat_template": str,
}


# Every answer is streamed, with counts.
IMPOSED = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "timings_per_token": True,
    # One chunk per batch of the prompt: the only moments at which a request can be cancelled before its first token.
    "return_progress": True,
}


class LlamaServer(Engine):
    """A loaded model."""

    def __init__(self, server: Any, key: str, mode: str) -> None:
        self._server = server
        self._key = key
        self.mode = mode
        properties = self.ask("/props")
        self.slots = int(properties["total_slots"])
        self.context_size = int(properties["default_generation_settings"]["n_ctx"])
        template = str(properties.get("chat_template") or "")
        self.template_has_tools = "tools" in template
        self.thinks = "enable_thinking" in template or "<think>" in template

    def close(self) -> None:
        self._server = None

    def generate(self, kind: str, fields: dict[str, Any], take: Callable[[dict[str, Any]], bool]) -> None:
        server = self._server
        handle = server.handle_chat_completions if kind == "chat" else server.handle_completions
        handle({**fields, **IMPOSED}, take)

    def embed(self, text: str | list[int]) -> tuple[list[float], int]:
        answer = self._handled(self._server.handle_embeddings, {"input": text})
        return answer["data"][0]["embedding"], answer["usage"]["prompt_tokens"]

    def rerank(self, query: str, documents: list[str], top_n: int) -> dict[str, Any]:
        """The engine's `{"results": [{"index", "relevance_score"}], "usage"}`, best first; 0: all documents."""
        body = {"query": query, "documents": documents, "top_n": top_n or len(documents)}
        return self._handled(self._server.handle_rerank, body)

    def tokenize(self, text: str) -> list[int]:
        return self.ask("/tokenize", {"content": text, "add_special": False})["tokens"]

    def detokenize(self, tokens: list[int]) -> str:
        return self.ask("/detokenize", {"tokens": tokens})["content"]

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Call the engine's HTTP port."""
        request = urllib.request.Request(  # noqa: S310  (the address is the engine's own)
            self._server.listening_address + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=HTTP_TIMEOUT) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise replies.refusal(json.load(error).get("error", {})) from error
        except OSError as error:
            raise Refusal(grpc.StatusCode.INTERNAL, f"the engine's port does not answer: {error}") from error

    def _handled(self, handle: Callable[[dict[str, Any]], dict[str, Any]], body: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = handle(body)
        except ValueError as error:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error
        if "error" in answer:
            raise replies.refusal(answer["error"])
        return answer


def load(options: backend_pb2.ModelOptions) -> LlamaServer:
    """The model that the options name, loaded.

    Raises:
        LoadFailure: it cannot be loaded; the message says why.
    """
    found = parse_options(options.Options, OPTIONS)
    header = header_of(options.ModelFile)
    mode = "rerank" if options.Reranking else "embedding" if options.Embeddings else "chat"
    key = secrets.token_urlsafe(24)
    params = _params(options, found)
    params.api_keys = [key]
    if mode != "chat":
        _serve_vectors(params, options, mode, found, header)
    # The constructor holds the interpreter's lock: this process answers nothing, Health included, until it returns.
    try:
        server = xllamacpp.Server(params)
    except (RuntimeError, ValueError) as error:
        kind = header.get("general.architecture", "unknown")
        raise LoadFailure(
            f"llama.cpp cannot load {options.ModelFile} (architecture {kind}): the file is cut short or damaged, this"
            f" version does not know the architecture, or there is not enough memory for it{_besides(options, found)}"
        ) from error
    try:
        return LlamaServer(server, key, mode)
    except Refusal as refusal:
        raise LoadFailure(refusal.message) from refusal


def _besides(options: backend_pb2.ModelOptions, found: dict[str, Any]) -> str:
    """What the engine was given besides the model, any of which may be why it fails: it does not say."""
    given = [
        ("MMProj", options.MMProj),
        ("DraftModel", options.DraftModel),
        *(("LoRA", path) for path in options.LoraAdapters),
    ]
    named = [f"{name} {path}" for name, path in given if path]
    named += ["the chat template"] if "chat_template" in found else []
    return f"; or it is because of {', '.join(named)}" if named else ""


def _params(options: backend_pb2.ModelOptions, found: dict[str, Any]) -> Any:
    params = xllamacpp.CommonParams()
    params.verbosity = 0
    params.ui = False
    params.model.path = options.ModelFile
    params.n_parallel = found.get("parallel", 1)
    params.n_ctx = (options.ContextSize if options.ContextSize > 0 else DEFAULT_CONTEXT) * params.n_parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.Threads or physical_cores()
    params.cache_ram_mib = found.get("cache_ram", DEFAULT_CACHE)
    params.flash_attn_type = known_value("FlashAttention", FLASH, options.FlashAttention)
    params.cache_type_k = known_value("CacheTypeKey", CACHE_TYPES, options.CacheTypeKey or "f16")
    params.cache_type_v = known_value("CacheTypeValue", CACHE_TYPES, options.CacheTypeValue or "f16")
    _set_batch(params, options)
    layers = found.get("gpu_layers", options.NGPULayers or None)
    if layers is not None:
        params.n_gpu_layers = layers
    if options.MMProj:
        params.mmproj.path = str(existing_file("MMProj", options.MMProj))
    if options.DraftModel:
        params.speculative.draft.mparams.path = str(existing_file("DraftModel", options.DraftModel))
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    params.lora_adapters = [_adapter(path, scale) for path, scale in adapters_of(options)]
    if "chat_template" in found:
        params.chat_template = existing_file("chat_template", found["chat_template"]).read_text(encoding="utf-8")
    return params


def _adapter(path: str, scale: float) -> Any:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = path, scale
    return adapter


def _set_batch(params: Any, options: backend_pb2.ModelOptions) -> None:
    if options.NBatch > 0:
        params.n_batch = options.NBatch
    elif not _has_gpu():
        params.n_batch = CPU_BATCH
    params.n_ubatch = min(params.n_ubatch, params.n_batch)


def _serve_vectors(
    params: Any, options: backend_pb2.ModelOptions, mode: str, found: dict[str, Any], header: dict[str, Any]
) -> None:
    """Pooling, and batches as long as a request: a pooled text must fit into one."""
    params.embedding = True
    params.n_batch = params.n_ubatch = params.n_ctx // params.n_parallel
    if mode == "rerank":
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    elif "pooling" in found:
        params.pooling_type = found["pooling"]
    elif not header.get(f"{header.get('general.architecture')}.pooling_type"):
        params.pooling_type = POOLING["mean"]


def missing_device() -> str:
    """Why this build cannot be used here; empty if it can.

    One that is made for GPUs and finds none computes on the processor, many times slower than its node believes.
    """
    manifest = Path(__file__).with_name("backend.json")  # of whoever installed it
    build = json.loads(manifest.read_text())["build"] if manifest.exists() else "cpu"
    if build == "cpu" or _has_gpu():
        return ""
    return (
        f"this is made for {build}, and llama.cpp finds no such device that it can use: see to its driver, or have the"
        " node take other builds (LOCALAI_Q_BACKEND_BUILDS=cpu)"
    )


def _has_gpu() -> bool:
    return any(device["type"].name.endswith("GPU") for device in xllamacpp.get_device_info())
