"""The engine: llama.cpp's server inside this process. Owns its parameters, its life, and the ways into it.

The engine also listens on a loopback port, which tokenizing needs; a random key keeps everybody else out.
"""

from __future__ import annotations

import json
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backend_pb2
import gguf_header
import grpc
import replies
import xllamacpp
from serving import LoadFailure, Refusal, parse_options, whole_number

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


def _pooling(name: str) -> Any:
    return _one_of(POOLING, name)


def _one_of(known: dict[str, Any], name: str) -> Any:
    if name.lower() not in known:
        raise ValueError(f"must be one of: {', '.join(key for key in known if key)}")
    return known[name.lower()]


OPTIONS: dict[str, Callable[[str], Any]] = {
    "parallel": whole_number(1),
    "pooling": _pooling,
    "gpu_layers": whole_number(0),
    "cache_ram": whole_number(0),
    "chat_template": str,
}


class LlamaServer:
    """A loaded model."""

    def __init__(self, server: Any, key: str, mode: str) -> None:
        self._server = server
        self._key = key
        self.mode = mode  # chat | embedding | rerank
        properties = self.ask("/props")
        self.slots = int(properties["total_slots"])
        self.context_size = int(properties["default_generation_settings"]["n_ctx"])
        template = str(properties.get("chat_template") or "")
        self.template_has_tools = "tools" in template
        self._thinks = "enable_thinking" in template or "<think>" in template

    def metadata(self) -> backend_pb2.ModelMetadataResponse:
        return backend_pb2.ModelMetadataResponse(
            supports_thinking=self._thinks,
            context_size=self.context_size,
            slots=self.slots,
            chat=self.mode == "chat",
            embeddings=self.mode == "embedding",
            rerank=self.mode == "rerank",
        )

    def close(self) -> None:
        self._server = None

    def require(self, mode: str) -> None:
        """Refuse with UNIMPLEMENTED what the model was not loaded for."""
        if mode != self.mode:
            raise Refusal(grpc.StatusCode.UNIMPLEMENTED, f"this model was loaded for {self.mode}, not for {mode}")

    def generate(self, kind: str, body: dict[str, Any], take: Callable[[dict[str, Any]], bool]) -> None:
        """Run a request to its end, calling `take` with each chunk on this thread; True from it cancels.

        Raises:
            ValueError: the engine cannot read the body.
        """
        server = self._server
        handle = server.handle_chat_completions if kind == "chat" else server.handle_completions
        handle(body, take)

    def embed(self, text: str | list[int]) -> tuple[list[float], int]:
        """The vector of a text or of token ids, and how many tokens they were."""
        answer = self._handled(self._server.handle_embeddings, {"input": text})
        return answer["data"][0]["embedding"], answer["usage"]["prompt_tokens"]

    def rerank(self, query: str, documents: list[str], top_n: int) -> dict[str, Any]:
        """The engine's `{"results": [{"index", "relevance_score"}], "usage"}`, best first; 0: all documents."""
        body = {"query": query, "documents": documents, "top_n": top_n or len(documents)}
        return self._handled(self._server.handle_rerank, body)

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
    header = _header(options.ModelFile)
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


def _header(path: str) -> dict[str, Any]:
    if not path:
        raise LoadFailure("ModelFile is empty: it must name a GGUF file")
    try:
        return gguf_header.read_header(path)
    except gguf_header.DamagedFile as error:
        raise LoadFailure(f"{path} is not a usable GGUF file: {error}") from error
    except OSError as error:
        raise LoadFailure(f"cannot read the model {path}: {error.strerror}") from error


def _params(options: backend_pb2.ModelOptions, found: dict[str, Any]) -> Any:
    params = xllamacpp.CommonParams()
    params.verbosity = 0
    params.ui = False
    params.model.path = options.ModelFile
    params.n_parallel = found.get("parallel", 1)
    params.n_ctx = (options.ContextSize if options.ContextSize > 0 else DEFAULT_CONTEXT) * params.n_parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.Threads or physical_cores()
    params.cache_ram_mib = found.get("cache_ram", DEFAULT_CACHE)
    params.flash_attn_type = _known("FlashAttention", FLASH, options.FlashAttention)
    params.cache_type_k = _known("CacheTypeKey", CACHE_TYPES, options.CacheTypeKey or "f16")
    params.cache_type_v = _known("CacheTypeValue", CACHE_TYPES, options.CacheTypeValue or "f16")
    _set_batch(params, options)
    layers = found.get("gpu_layers", options.NGPULayers or None)
    if layers is not None:
        params.n_gpu_layers = layers
    if options.MMProj:
        params.mmproj.path = _existing("MMProj", options.MMProj)
    if options.DraftModel:
        params.speculative.draft.mparams.path = _existing("DraftModel", options.DraftModel)
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    _set_adapters(params, options)
    if "chat_template" in found:
        params.chat_template = Path(_existing("chat_template", found["chat_template"])).read_text(encoding="utf-8")
    return params


def _set_adapters(params: Any, options: backend_pb2.ModelOptions) -> None:
    scales = list(options.LoraScales) or [1.0] * len(options.LoraAdapters)
    if len(scales) != len(options.LoraAdapters):
        raise LoadFailure(f"there are {len(options.LoraAdapters)} LoraAdapters and {len(scales)} LoraScales")
    found = []
    for path, scale in zip(options.LoraAdapters, scales, strict=True):
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = _existing("LoraAdapters", path), scale
        found.append(adapter)
    params.lora_adapters = found


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


def _known(name: str, known: dict[str, Any], value: str) -> Any:
    try:
        return _one_of(known, value)
    except ValueError as error:
        raise LoadFailure(f"{name} cannot be {value!r}: {error}") from error


def _existing(name: str, path: str) -> str:
    if not Path(path).is_file():
        raise LoadFailure(f"{name} names the file {path}, which does not exist")
    return path


def _has_gpu() -> bool:
    return any(device["type"].name.endswith("GPU") for device in xllamacpp.get_device_info())


def physical_cores() -> int:
    """Cores that this process may use; two threads of one core count once."""
    cores = set()
    for number in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(number))
    return len(cores)
