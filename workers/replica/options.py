"""A request in the words of the backend interface. Pure.

The OpenAI body travels as it is, for engines that read it; the fields that LocalAI's interface has say the same, as far
as they can, for those that do not.
"""

from __future__ import annotations

import json
from typing import Any

from localai_q.proto import backend_pb2
from workers.child import ReplicaSpec

MESSAGE_FIELDS = ("role", "content", "name", "tool_call_id", "reasoning_content")
NUMBERS = {  # OpenAI's and llama.cpp's names: LocalAI's
    "seed": "Seed",
    "top_k": "TopK",
    "repeat_last_n": "Repeat",
    "temperature": "Temperature",
    "repeat_penalty": "Penalty",
    "top_p": "TopP",
    "min_p": "MinP",
    "typical_p": "TypicalP",
    "frequency_penalty": "FrequencyPenalty",
    "presence_penalty": "PresencePenalty",
    "mirostat": "Mirostat",
    "mirostat_eta": "MirostatETA",
    "mirostat_tau": "MirostatTAU",
    "ignore_eos": "IgnoreEOS",
    "n_keep": "NKeep",
    "grammar": "Grammar",
    "top_logprobs": "TopLogprobs",
}


def predict_options(identity: str, kind: str, body: dict[str, Any], job_id: str) -> backend_pb2.PredictOptions:
    """One choice of a chat or completion."""
    options = backend_pb2.PredictOptions(
        OpenAIBody=json.dumps(body), OpenAIKind=kind, ModelIdentity=identity, CorrelationId=job_id
    )
    for name, field in NUMBERS.items():
        if body.get(name) is not None:
            setattr(options, field, _fit(options, field, body[name]))
    options.Tokens = int(body.get("max_completion_tokens") or body.get("max_tokens") or 0)
    stop = body.get("stop") or []
    options.StopPrompts.extend([stop] if isinstance(stop, str) else stop)
    if kind == "chat":
        options.UseTokenizerTemplate = True
        options.Messages.extend(_message(message) for message in body["messages"])
        if body.get("tools"):
            options.Tools = json.dumps(body["tools"])
        if body.get("tool_choice"):
            choice = body["tool_choice"]
            options.ToolChoice = choice if isinstance(choice, str) else json.dumps(choice)
        options.Logprobs = int(bool(body.get("logprobs")))
    elif isinstance(body["prompt"], str):
        options.Prompt = body["prompt"]
    return options


def embedding_options(identity: str, value: str | list[int], job_id: str) -> backend_pb2.PredictOptions:
    """One text, or its token ids, to embed."""
    options = backend_pb2.PredictOptions(ModelIdentity=identity, CorrelationId=job_id)
    if isinstance(value, str):
        options.Embeddings = value
    else:
        options.EmbeddingTokens.extend(value)
    return options


def model_options(spec: ReplicaSpec) -> backend_pb2.ModelOptions:
    """How the replica's model is loaded."""
    model = spec.model
    template = [f"chat_template:{spec.template_file}"] if model.chat_template else []
    return backend_pb2.ModelOptions(
        Model=model.name,
        ModelFile=str(spec.model_file or ""),
        ContextSize=model.context_size,
        Threads=model.threads,
        NGPULayers=model.gpu_layers,
        Embeddings=model.embeddings,
        Reranking=model.rerank,
        CacheTypeKey=model.cache_type,
        CacheTypeValue=model.cache_type,
        MMProj=str(spec.path_of(model.mmproj)) if model.mmproj else "",
        DraftModel=str(spec.path_of(model.draft_model)) if model.draft_model else "",
        LoraAdapters=[str(spec.path_of(lora)) for lora in model.loras],
        LoraScales=[lora.scale for lora in model.loras],
        Options=[f"parallel:{model.slots}", *template, *model.options],
    )


def _fit(options: backend_pb2.PredictOptions, field: str, value: Any) -> Any:
    """The value as the field can hold it: a seed of 64 bits is folded into 32."""
    if field == "Seed":
        folded = int(value) & 0xFFFFFFFF
        return folded - (1 << 32) if folded >= 1 << 31 else folded
    return type(getattr(options, field))(value)


def _message(message: dict[str, Any]) -> backend_pb2.Message:
    made = backend_pb2.Message(**{k: _text(message[k]) for k in MESSAGE_FIELDS if message.get(k) is not None})
    if message.get("tool_calls"):
        made.tool_calls = json.dumps(message["tool_calls"])
    return made


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "".join(part.get("text", "") for part in value)
