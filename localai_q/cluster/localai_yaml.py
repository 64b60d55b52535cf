"""LocalAI's model YAML as a model of ours. Pure.

Every field of theirs is honoured, left out with a warning that says what holds instead, or refused with what to do; none
is dropped without a word. What is empty or false, as LocalAI writes what nobody has set, says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from localai_q.cluster.models import OF_ONE_FILE, Document
from localai_q.cluster.parts import every
from localai_q.cluster.sampling import Parameters
from localai_q.documents import checked
from localai_q.errors import InvalidValue

ENGINE = "xllamacpp"  # which serves what LocalAI's backend does: llama.cpp, many requests at once
LLAMA = re.compile(
    r"(?:(?:cpu|cuda\d*|rocm|vulkan|metal|sycl)-)?llama(?:-cpp|\.cpp|-stable|-ggml)?(?:-[a-z0-9-]+)?|llama-cpp"
)

SAME = {  # LocalAI's names: ours
    "name": "name", "context_size": "context_size", "threads": "threads", "gpu_layers": "gpu_layers", "embeddings": "embeddings",
    "reranking": "rerank", "system_prompt": "system_prompt", "pinned": "pinned", "disabled": "disabled",
    "concurrency_groups": "concurrency_groups",
}  # fmt: skip
ENGINE_OPTIONS = ("pooling", "gpu_layers", "cache_ram")  # of theirs that our engine has, too
ALWAYS = ("use_jinja", "jinja")
UNSAID = (  # of ours, what their form has no word for, so that a model keeps it when it is written anew
    "preload", "spread_all", "min_replicas", "max_replicas", "idle_timeout", "selector", "route_policy", "min_prefix_match",
    "balance_abs_threshold", "balance_rel_threshold", "memory", "fit_context", "chat_template",
)  # fmt: skip

LEFT_OUT = {
    **dict.fromkeys(("description", "usage", "known_usecases", "known_input_modalities", "known_output_modalities"),
                    "it only describes the model"),
    **dict.fromkeys(("mmap", "mmlock", "low_vram", "numa", "main_gpu", "tensor_split", "no_mulmatq", "no_kv_offloading",
                     "flash_attention", "cuda", "f16", "n_draft", "prompt_cache_path", "prompt_cache_all",
                     "prompt_cache_ro", "rms_norm_eps", "ngqa"), "the engine decides that"),
    **dict.fromkeys(("debug", "feature_flags", "grpc", "step", "roles"), "it means nothing here"),
    **dict.fromkeys(("function", "reasoning"), "the engine reads calls of tools and reasoning as the model's template says"),
    **dict.fromkeys(("reasoning_effort", "chat_template_kwargs"), "give it with requests"),
    **dict.fromkeys(("mcp", "agent"), "a model has no tools of its own here; give 'tools' with requests"),
    "parameters.batch": "the engine decides that",
    "parameters.n": "give it with requests",
    "parameters.echo": "give it with requests",
    "parameters.logprobs": "give it with requests",
    "parameters.top_logprobs": "give it with requests",
    "parameters.logit_bias": "give it with requests",
    "parameters.encoding_format": "give it with requests",
}  # fmt: skip
TEXT_ONLY = "this cluster serves text models with llama.cpp; leave it out"
REFUSED = {
    **dict.fromkeys(("alias", "failover", "router", "pipeline"), "a model here stands for no other; add the models themselves"),
    **dict.fromkeys(("cutstrings", "extract_regex", "trimspace", "trimsuffix"),
                    "answers are not changed here; leave it out, and do it where they are read"),
    **dict.fromkeys(("rope_scaling", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow",
                     "parameters.rope_freq_base", "parameters.rope_freq_scale"),
                    "the model's file says how positions are scaled; leave it out"),
    **dict.fromkeys(("proxy", "mitm", "pii", "pii_detection", "compression", "limits"),
                    "requests are not sent on, filtered or limited by a model here; leave it out"),
    **dict.fromkeys(("diffusers", "tts", "quantization", "load_format", "gpu_memory_utilization", "trust_remote_code",
                     "enforce_eager", "swap_space", "max_model_len", "tensor_parallel_size", "disable_log_stats", "dtype",
                     "limit_mm_per_prompt", "engine_args", "type", "cfg_scale", "parameters.language",
                     "parameters.translate", "parameters.negative_prompt", "parameters.negative_prompt_scale",
                     "parameters.clip_skip", "parameters.tokenizer"), TEXT_ONLY),
    "parameters.tfz": "llama.cpp has no tail-free sampling any more; leave it out",
    "grammar": "a grammar goes with a request; leave it out",
    "lora_base": "an adapter is for the model itself; leave it out",
    "artifacts": "give the file as parameters.model: huggingface://owner/repo/file",
    "overrides": "the model's file is loaded as it is; leave it out",
    "env": "backends get no environment from a model; leave it out",
}  # fmt: skip

_HUB = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)/(?:resolve|blob)/([^/]+)/([^?]+)(?:\?.*)?")
_URI = re.compile(r"[a-z0-9]+:")


@dataclass
class Imported:
    """What became of a document of LocalAI's."""

    document: Document
    warnings: list[str] = field(default_factory=list)  # fields that were left out, and what holds instead


class _Reading:
    """One document on its way."""

    def __init__(self, content: Mapping[str, Any], backends: Collection[str]) -> None:
        self.warnings: list[str] = []
        self.refused: list[str] = []
        self._left = {name: value for name, value in content.items() if says(value)}
        self._backends = backends
        self._files = {
            str(file.get("filename")): file for file in self._list("download_files") if isinstance(file, dict)
        }
        self._named: set[str] = set()

    def document(self) -> Document:
        made = {ours: self._take(theirs) for theirs, ours in SAME.items() if theirs in self._left}
        made["backend"] = self._backend(str(self._take("backend") or ENGINE))
        parameters = self._object("parameters")
        made |= self._own_file(parameters) | self._further() | self._cache() | self._options()
        made["parameters"] = self._sampling(parameters)
        self._templates(self._object("template"))
        for name in list(self._left):
            self._set_aside(name, name)
        for name in self._files.keys() - self._named:
            self.warnings.append(f"download_files: nothing in the document names {name}, which is left out")
        if self.refused:
            raise InvalidValue(f"This model cannot be taken as it is: {'; '.join(self.refused)}.",
                               param=self.refused[0].partition(":")[0])  # fmt: skip
        return checked(Document, made)

    def _take(self, name: str) -> Any:
        return self._left.pop(name, None)

    def _list(self, name: str) -> list[Any]:
        found = self._take(name)
        return found if isinstance(found, list) else [found] if found else []

    def _object(self, name: str) -> dict[str, Any]:
        found = self._take(name) or {}
        if not isinstance(found, dict):
            raise InvalidValue(f"'{name}' must be an object.", param=name)
        return {**found}

    def _set_aside(self, name: str, path: str) -> None:
        if path in LEFT_OUT:
            self.warnings.append(f"{path} is left out: {LEFT_OUT[path]}")
        else:
            self.refused.append(f"{path}: {REFUSED.get(path, 'no field of a model that is known here; leave it out')}")

    def _backend(self, name: str) -> str:
        if LLAMA.fullmatch(name):
            self.warnings.append(f"backend: '{name}' is served by '{ENGINE}', which is llama.cpp, too")
            return ENGINE
        if name not in self._backends:
            self.refused.append(f"backend: '{name}' is none of {', '.join(self._backends)}")
        return name

    # --- files

    def _own_file(self, parameters: dict[str, Any]) -> dict[str, Any]:
        name = parameters.pop("model", None)
        if not name:
            return {}
        first, *others = every(str(name), field="parameters.model")
        made = self._file("parameters.model", first)
        if any(_base(other) in map(_base, self._files) for other in others):
            made["parts"] = [self._file("parameters.model", other) for other in others]
        return made

    def _further(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            name: self._file(name, value) for name in ("mmproj", "draft_model") if (value := self._take(name))
        }
        adapters = [*self._list("lora_adapter"), *self._list("lora_adapters")]
        scales = [*self._list("lora_scale"), *self._list("lora_scales")]
        if scales and len(scales) != len(adapters):
            self.refused.append(f"lora_scales: there are {len(scales)} for {len(adapters)} adapters")
        pairs = zip(adapters, scales or [1.0] * len(adapters), strict=False)
        if loras := [{**self._file("lora_adapters", name), "scale": scale} for name, scale in pairs]:
            made["loras"] = loras
        return made

    def _file(self, path: str, name: Any) -> dict[str, Any]:
        """Where a file is had from; what it is called in LocalAI's folder of models says nothing to other machines."""
        name = str(name)
        if _URI.match(name):
            return {"source": source_of(name)}
        file = self._files.get(name) or next(
            (file for key, file in self._files.items() if _base(key) == _base(name)), None
        )
        if file is None:
            self.refused.append(f"{path}: {name} lies in LocalAI's own folder; say where it comes from, with 'download_files' or "
                                "as huggingface://owner/repo/file, or upload it with 'localai-q models add NAME --file'")  # fmt: skip
            return {"source": "unknown"}
        self._named.add(str(file["filename"]))
        return {"source": source_of(str(file.get("uri"))), "sha256": file.get("sha256") or None}

    # --- the rest

    def _cache(self) -> dict[str, Any]:
        kinds = {str(value) for name in ("cache_type_k", "cache_type_v") if (value := self._take(name))}
        if len(kinds) > 1:
            self.refused.append("cache_type_v: keys and values have one type here; give cache_type_k the same")
        return {"cache_type": kinds.pop()} if len(kinds) == 1 else {}

    def _options(self) -> dict[str, Any]:
        made: dict[str, Any] = {}
        kept = []
        for option in map(str, self._list("options")):
            name, _, value = option.partition(":")
            if name == "parallel" and value.isdecimal():
                made["slots"] = value
            elif name in ENGINE_OPTIONS:
                kept.append(option)
            elif name not in ALWAYS:
                self.warnings.append(f"options: {option} is left out: the engine here has no such option")
        return {**made, "options": kept}

    def _sampling(self, parameters: dict[str, Any]) -> dict[str, Any]:
        ours = {*Parameters.model_fields}
        made = {name: value for name, value in parameters.items() if name in ours and value is not None}
        if made.get("seed") == -1:  # LocalAI's word for "choose one"
            del made["seed"]
        for name, value in parameters.items():
            if name not in ours and says(value):
                self._set_aside(name, f"parameters.{name}")
        if stops := [*self._list("stopwords")]:
            made["stop"] = stops
        return made | {
            name: value for name in ("mirostat", "mirostat_eta", "mirostat_tau") if says(value := self._take(name))
        }

    def _templates(self, template: dict[str, Any]) -> None:
        for name in (name for name, value in template.items() if says(value) and name != "use_tokenizer_template"):
            self.warnings.append(f"template.{name} is left out: it is in Go's language; the template in the model's file is "
                                 "used, or one in Jinja that you give the model as chat_template")  # fmt: skip


def translate(content: Mapping[str, Any], backends: Collection[str]) -> Imported:
    """A model of LocalAI's, in the form of its YAML files.

    Args:
        backends: those that there are here.

    Raises:
        InvalidRequest: it cannot be taken; the message names every field that is in the way, and what to do.
    """
    reading = _Reading(content, backends)
    return Imported(document=reading.document(), warnings=reading.warnings)


def source_of(uri: str) -> str:
    """A URI of LocalAI's as a source: what is on Hugging Face in the form of which the hub tells the SHA-256."""
    found = _HUB.fullmatch(uri)
    if found:
        repository, revision, path = found.groups()
        return f"huggingface://{repository}/{path}" + ("" if revision == "main" else f"@{revision}")
    return uri.replace("file://", "file:", 1) if uri.startswith("file://") else uri


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A document with another one over it, as an entry of a gallery has `overrides` over what it is made of.

    Of a file that comes from another source then, only what is said of that holds.
    """
    if over.get("source", base.get("source")) != base.get("source"):
        base = {name: value for name, value in base.items() if name not in OF_ONE_FILE}
    both = {name for name in base.keys() & over.keys() if isinstance(base[name], dict) and isinstance(over[name], dict)}
    return {**base, **over, **{name: merged(base[name], over[name]) for name in both}}


def says(value: Any) -> bool:
    """Whether a value is more than what LocalAI writes for "not set"."""
    return value not in (None, "", [], {}, False) and not (
        isinstance(value, dict) and not any(map(says, value.values()))
    )


def _base(path: str) -> str:
    return path.rpartition("/")[2]
