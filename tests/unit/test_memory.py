"""What a model takes: by its parts, on each kind of machine, and with a context that is cut to fit."""

from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localai_q.cluster.memory import (
    CONTEXT_STEP,
    LEAST_CONTEXT,
    MIB,
    PROMPT_CACHE,
    REPLICA,
    Memory,
    kv_cache,
    need,
    need_within,
)
from localai_q.cluster.models import Facts, ModelConfig

SMOL = Facts(architecture="llama", blocks=30, context_length=8192, embedding_length=576, heads=9, kv_heads=90,
             key_length=64, value_length=64, vocabulary=49152, file_size=98362432, layer_bytes=66493440,
             other_bytes=30083328)  # fmt: skip


def ram(facts: Facts | None = SMOL, gpus: int = 0, **config) -> int:
    found = need(ModelConfig(**config), facts, gpus)
    assert found is not None
    return found.memory.ram


def vram(gpus: int, **config) -> int:
    found = need(ModelConfig(**config), SMOL, gpus)
    assert found is not None
    return found.memory.vram


class TestNeed:
    def test_the_kv_cache_holds_a_key_and_a_value_for_each_head_layer_and_token(self) -> None:
        assert kv_cache(SMOL, 4 * 4096, "f16") == 360 * MIB

    @pytest.mark.parametrize(
        ("context", "slots", "cache_type", "used"),  # MiB of RSS of the backend, measured by bench/memory.py
        [(512, 1, "f16", 193), (4096, 4, "f16", 543), (8192, 4, "f16", 904), (8192, 4, "q8_0", 567)],
    )
    def test_the_estimate_is_near_what_the_real_engine_takes(self, context, slots, cache_type, used) -> None:
        told = ram(context_size=context, slots=slots, cache_type=cache_type) - PROMPT_CACHE - REPLICA
        assert used * 0.95 < told / MIB < used * 1.25

    def test_more_context_slots_or_precision_take_more(self) -> None:
        assert ram(context_size=1024) < ram(context_size=2048) < ram(context_size=2048, slots=8)
        assert ram(cache_type="q4_0") < ram(cache_type="q8_0") < ram(cache_type="f16")

    def test_a_smaller_prompt_cache_takes_less(self) -> None:
        assert ram() - ram(options=("cache_ram:100",)) == PROMPT_CACHE - 100 * MIB
        assert ram(options=("cache_ram:x", "other:1")) == ram()

    def test_what_is_configured_is_what_is_needed(self) -> None:
        assert need(ModelConfig(memory=5), SMOL, 0).memory == Memory(ram=5)
        assert need(ModelConfig(memory=5), None, 2).memory == Memory(vram=5)

    def test_a_file_of_which_only_the_size_is_known_is_guessed(self) -> None:
        found = need(ModelConfig(size=1000), None, 0)
        assert (found.memory, found.note) == (Memory(ram=1200), "a guess from the file's size")

    def test_of_a_model_without_file_and_facts_nothing_is_known(self) -> None:
        assert need(ModelConfig(backend="echo"), None, 0) is None

    def test_a_model_on_a_gpu_leaves_its_weights_and_cache_there(self) -> None:
        assert vram(1) > SMOL.tensor_bytes + kv_cache(SMOL, 4 * 4096, "f16")
        assert ram(gpus=1) < ram() - kv_cache(SMOL, 4 * 4096, "f16")

    def test_several_gpus_each_take_their_own_share_of_overhead(self) -> None:
        assert vram(1) < vram(2) < vram(4)

    def test_only_the_layers_that_are_offloaded_count_on_the_gpu(self) -> None:
        assert vram(1, gpu_layers=1) < vram(1, gpu_layers=15) < vram(1, gpu_layers=30) == vram(1, gpu_layers=99)
        assert ram(gpus=1, gpu_layers=1) > ram(gpus=1, gpu_layers=15) > ram(gpus=1)

    def test_a_model_that_embeds_takes_its_whole_context_as_one_batch(self) -> None:
        assert ram(embeddings=True, slots=1) > ram(slots=1)

    def test_facts_survive_being_stored_and_those_of_another_version_are_none(self) -> None:
        assert Facts.from_json(asdict(SMOL)) == SMOL
        for wrong in (
            {"blocks": 3},
            {**asdict(SMOL), "blocks": "3"},
            {**asdict(SMOL), "blocks": -1},
            {**asdict(SMOL), "architecture": 1},
        ):
            assert Facts.from_json(wrong) is None


class TestCutting:
    def test_a_context_is_cut_only_where_that_is_allowed(self) -> None:
        free = Memory(ram=ram(context_size=1024))
        whole = ModelConfig(context_size=8192)
        assert need_within(whole, SMOL, 0, free).context_size == 8192
        assert need_within(whole.model_copy(update={"fit_context": True}), SMOL, 0, free).context_size == 1024

    def test_what_fits_is_not_cut(self) -> None:
        config = ModelConfig(context_size=1000, fit_context=True)
        assert need_within(config, SMOL, 0, Memory(ram=1 << 40)).context_size == 1000

    @given(st.integers(0, 3 << 30), st.integers(16, 40_000), st.integers(1, 8), st.integers(0, 3))
    def test_the_cut_context_is_the_largest_that_fits(self, free, context, slots, gpus) -> None:
        config = ModelConfig(context_size=context, slots=slots, fit_context=True)
        room = Memory(ram=free, vram=free)
        found = need_within(config, SMOL, gpus, room)
        assert found.context_size <= context
        if found.context_size == context:
            assert found.memory.within(room) or context <= LEAST_CONTEXT
            return
        assert found.context_size % CONTEXT_STEP == 0
        assert found.context_size >= LEAST_CONTEXT
        assert found.memory.within(room) or found.context_size == LEAST_CONTEXT
        longer = min(found.context_size + CONTEXT_STEP, context)
        assert not need(config.model_copy(update={"context_size": longer}), SMOL, gpus).memory.within(room)

    def test_less_than_nothing_of_what_is_not_needed_is_enough(self) -> None:
        assert Memory(ram=1).within(Memory(ram=1, vram=-5))
        assert not Memory(ram=1, vram=1).within(Memory(ram=1, vram=0))
        assert Memory(1, 2) + Memory(3, 4) - Memory(1, 1) == Memory(3, 5)

    def test_a_model_of_which_little_is_known_is_not_cut(self) -> None:
        config = ModelConfig(size=1000, fit_context=True)
        assert need_within(config, None, 0, Memory(ram=1)).memory == Memory(ram=1200)
        assert need_within(replace_memory(config), SMOL, 0, Memory(ram=1)).memory == Memory(ram=7)


def replace_memory(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"memory": 7})


def test_a_model_without_layers_is_estimated_too() -> None:
    assert need(ModelConfig(), replace(SMOL, blocks=0, layer_bytes=0, kv_heads=0), 2).memory.vram > 0
