"""The generated stubs are those of the interface as it stands, and that has LocalAI's names and numbers."""

from pathlib import Path

import pytest

from localai_q.proto import backend_pb2
from localai_q.proto.__main__ import REPOSITORY, STUBS, TARGETS, generate

OURS = 1000  # the number from which fields are ours

# As LocalAI's backend.proto has them, of what is served here.
WIRE = {
    "HealthMessage": "",
    "Result": "message 1, success 2",
    "Message": "role 1, content 2, name 3, tool_call_id 4, reasoning_content 5, tool_calls 6",
    "PredictOptions": """
        Prompt 1, Seed 2, Threads 3, Tokens 4, TopK 5, Repeat 6, Batch 7, NKeep 8, Temperature 9, Penalty 10, F16KV 11,
        DebugMode 12, StopPrompts 13, IgnoreEOS 14, TailFreeSamplingZ 15, TypicalP 16, FrequencyPenalty 17,
        PresencePenalty 18, Mirostat 19, MirostatETA 20, MirostatTAU 21, PenalizeNL 22, LogitBias 23, MLock 25, MMap 26,
        PromptCacheAll 27, PromptCacheRO 28, Grammar 29, MainGPU 30, TensorSplit 31, TopP 32, PromptCachePath 33,
        Debug 34, EmbeddingTokens 35, Embeddings 36, RopeFreqBase 37, RopeFreqScale 38, NegativePromptScale 39,
        NegativePrompt 40, NDraft 41, Images 42, UseTokenizerTemplate 43, Messages 44, Videos 45, Audios 46,
        CorrelationId 47, Tools 48, ToolChoice 49, Logprobs 50, TopLogprobs 51, Metadata 52, MinP 53, ModelIdentity 54""",
    "Reply": """
        message 1, tokens 2, prompt_tokens 3, timing_prompt_processing 4, timing_token_generation 5, audio 6, logprobs 7,
        chat_deltas 8""",
    "ChatDelta": "content 1, reasoning_content 2, tool_calls 3",
    "ToolCallDelta": "index 1, id 2, name 3, arguments 4",
    "ModelOptions": """
        Model 1, ContextSize 2, Seed 3, NBatch 4, F16Memory 5, MLock 6, MMap 7, VocabOnly 8, LowVRAM 9, Embeddings 10,
        NUMA 11, NGPULayers 12, MainGPU 13, TensorSplit 14, Threads 15, RopeFreqBase 17, RopeFreqScale 18, ModelFile 21,
        Tokenizer 34, LoraBase 35, LoraAdapter 36, DraftModel 39, Quantization 40, MMProj 41, LoraScale 42, RopeScaling 43,
        YarnExtFactor 44, YarnAttnFactor 45, YarnBetaFast 46, YarnBetaSlow 47, Type 49, GPUMemoryUtilization 50,
        TrustRemoteCode 51, EnforceEager 52, SwapSpace 53, MaxModelLen 54, TensorParallelSize 55, FlashAttention 56,
        NoKVOffload 57, LoadFormat 58, ModelPath 59, LoraAdapters 60, LoraScales 61, Options 62, CacheTypeKey 63,
        CacheTypeValue 64, GrammarTriggers 65, DType 67, Reranking 71, Overrides 72, EngineArgs 73, Proxy 74,
        EnableScore 75""",
    "EmbeddingResult": "embeddings 1, tokens 2, dim 3, prompt_tokens 4",
    "TokenizationResponse": "length 1, tokens 2",
    "DetokenizeRequest": "tokens 1",
    "DetokenizeResponse": "content 1",
    "StatusResponse": "state 1, memory 2",
    "MemoryUsageData": "total 1, breakdown 2",
    "RerankRequest": "query 1, documents 2, top_n 3, ModelIdentity 4",
    "RerankResult": "usage 1, results 2",
    "RerankDocument": "index 1, text 2, relevance_score 3",
}


@pytest.mark.parametrize("folder", TARGETS)
def test_the_committed_stubs_are_what_the_compiler_writes_today(folder: str, tmp_path: Path) -> None:
    generate(tmp_path, TARGETS[folder])
    for stub in STUBS:
        assert (REPOSITORY / folder / stub).read_text() == (tmp_path / stub).read_text(), (
            f"{folder}/{stub} is stale: run 'python -m localai_q.proto'"
        )


def test_names_and_numbers_are_localais() -> None:
    there = backend_pb2.DESCRIPTOR.message_types_by_name
    for message, fields in WIRE.items():
        wanted = {name: int(number) for name, number in (field.split() for field in fields.split(",") if field.strip())}
        assert {field.name: field.number for field in there[message].fields if field.number < OURS} == wanted, message
    assert backend_pb2.DESCRIPTOR.services_by_name["Backend"].full_name == "backend.Backend"
    states = backend_pb2.StatusResponse.State.items()
    assert dict(states) == {"UNINITIALIZED": 0, "BUSY": 1, "READY": 2, "ERROR": -1}
