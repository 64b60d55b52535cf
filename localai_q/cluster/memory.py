"""How many bytes a model takes, from what the header of its file says. Pure.

The parts, as llama.cpp allocates them:

- weights: the tensors; those of the layers that a GPU holds lie there, the rest in RAM.
- KV cache: for each token of each slot, a key and a value for each KV head of each layer.
- compute buffers: what one batch of the prompt needs on its way through the layers, on each device.
- the process: interpreter, gRPC and engine of the backend, and the replica that drives it.
- further files of the model, such as adapters: their size.
- prompt cache: RAM in which the engine keeps the prompts of ended requests.

`bench/memory.py` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from localai_q.cluster.models import Facts, ModelConfig

MIB = 1 << 20

CACHE_TYPES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # bytes of one number
CPU_BATCH = 256  # tokens of the prompt that the engine takes at once, as the backend sets it
GPU_BATCH = 512
BACKEND = 60 * MIB  # of RAM for a backend's process, before it has any model
REPLICA = 90 * MIB  # of RAM for the process that drives it
GPU_CONTEXT = 400 * MIB  # of VRAM that the driver takes on each GPU
PROMPT_CACHE = 512 * MIB  # where the option `cache_ram` does not say it
UNKNOWN_FACTOR = 1.2  # of the file's size, where its header is not known
CONTEXT_STEP = 256  # tokens
LEAST_CONTEXT = 512


@dataclass(frozen=True)
class Memory:
    """Bytes of a machine's two kinds of memory."""

    ram: int = 0
    vram: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.ram + other.ram, self.vram + other.vram)

    def __sub__(self, other: Memory) -> Memory:
        return Memory(self.ram - other.ram, self.vram - other.vram)

    def within(self, other: Memory) -> bool:
        """Whether there is as much as this in `other`; of what is not needed there may be less than nothing."""
        return (not self.ram or self.ram <= other.ram) and (not self.vram or self.vram <= other.vram)


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one replica takes."""

    memory: Memory
    unseen: int = (
        0  # bytes of its RAM that a machine does not report as used: pages of the file, buffers not yet filled
    )
    context_size: int  # tokens of one request, with which this was computed
    note: str = ""  # how it is known, where that is not from the header


def need(config: ModelConfig, facts: Facts | None, gpus: int) -> Need | None:
    """What a replica needs on a machine where so many GPUs can be used; None where nothing is known of the model."""
    if config.memory:
        return Need(memory=_on_one(config.memory, gpus), context_size=config.context_size, note="as configured")
    if facts is not None:
        return _estimate(config, facts, gpus)
    own = [config.size, *(file.size for file in config.parts)]
    if not all(own):
        return None
    size = sum(own) + _further(config)
    guess = int(size * UNKNOWN_FACTOR)
    return Need(memory=_on_one(guess, gpus), unseen=0 if gpus else size, context_size=config.context_size,
                note="a guess from the file's size")  # fmt: skip


def need_within(config: ModelConfig, facts: Facts | None, gpus: int, free: Memory) -> Need | None:
    """As `need`; where that is more than `free` and the model allows it, with the largest context that fits.

    A context is cut to a multiple of `CONTEXT_STEP` and not below `LEAST_CONTEXT`, even where that does not fit.
    """
    whole = need(config, facts, gpus)
    if whole is None or facts is None or config.memory or not config.fit_context or whole.memory.within(free):
        return whole
    if config.context_size <= LEAST_CONTEXT:
        return whole
    fitting, too_much = LEAST_CONTEXT // CONTEXT_STEP, -(-config.context_size // CONTEXT_STEP)
    while too_much - fitting > 1:  # a longer context never needs less
        middle = (fitting + too_much) // 2
        tried = _with_context(config, facts, gpus, middle * CONTEXT_STEP)
        fitting, too_much = (middle, too_much) if tried.memory.within(free) else (fitting, middle)
    return _with_context(config, facts, gpus, fitting * CONTEXT_STEP)


def _with_context(config: ModelConfig, facts: Facts, gpus: int, context_size: int) -> Need:
    made = _estimate(config.model_copy(update={"context_size": context_size}), facts, gpus)
    return replace(made, note=f"with a context of {context_size} instead of {config.context_size} tokens")


def _on_one(amount: int, gpus: int) -> Memory:
    return Memory(vram=amount) if gpus else Memory(ram=amount)


def _estimate(config: ModelConfig, facts: Facts, gpus: int) -> Need:
    tokens = -(-config.context_size // CONTEXT_STEP) * CONTEXT_STEP * config.slots
    cache = kv_cache(facts, tokens, config.cache_type)
    layers = _offloaded(config, facts) if gpus else 0
    share = layers / facts.blocks if facts.blocks else float(layers > 0)
    outside = facts.other_bytes if gpus and layers >= facts.blocks else 0
    weights = Memory(vram=int(facts.layer_bytes * share) + outside)
    weights = replace(weights, ram=facts.tensor_bytes - weights.vram)
    buffers = compute_buffers(config, facts, tokens, GPU_BATCH if gpus else CPU_BATCH)
    prompts = prompt_cache(config)
    rest = Memory(ram=int(cache * (1 - share)) + BACKEND + REPLICA + prompts + buffers)
    if layers:
        # Layers are dealt out whole, so that each further GPU may end up with one more than its share.
        spare = (gpus - 1) * (facts.layer_bytes + cache) // max(facts.blocks, 1)
        rest = replace(rest, vram=int(cache * share) + gpus * (buffers + GPU_CONTEXT) + spare)
    further = _on_one(_further(config), gpus)
    return Need(memory=weights + rest + further, unseen=weights.ram + prompts + buffers + further.ram,
                context_size=config.context_size)  # fmt: skip


def _further(config: ModelConfig) -> int:
    """Bytes of the files besides the model's own, which are in memory as a whole."""
    return sum(file.size for file in config.further)


def _offloaded(config: ModelConfig, facts: Facts) -> int:
    """Layers that GPUs hold; those that a model does not limit are all."""
    return min(config.gpu_layers, facts.blocks) if config.gpu_layers else facts.blocks


def kv_cache(facts: Facts, tokens: int, cache_type: str) -> int:
    """Bytes of the keys and values of so many tokens."""
    return int(tokens * facts.kv_heads * (facts.key_length + facts.value_length) * CACHE_TYPES[cache_type])


def prompt_cache(config: ModelConfig) -> int:
    """Bytes that the backend may keep prompts in."""
    told = [option.partition(":")[2] for option in config.options if option.startswith("cache_ram:")]
    return int(told[-1]) * MIB if told and told[-1].isdecimal() else PROMPT_CACHE


def compute_buffers(config: ModelConfig, facts: Facts, tokens: int, batch: int) -> int:
    """Bytes for one batch: the logits and the activations of each of its tokens, and which tokens each may look at."""
    batch = config.context_size if config.embeddings or config.rerank else batch
    activations = 16 * facts.embedding_length  # the widest step: the feed-forward layer, in and out
    return 4 * batch * (facts.vocabulary + activations) + 2 * batch * tokens
