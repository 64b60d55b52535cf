"""What is read from a GGUF header; and that no bytes at all make anything of it but facts or one clear error."""

import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
from gguf_files import PAIRS, gguf, text, value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localai_q.cluster.models import Facts
from localai_q.errors import InvalidValue
from localai_q.gguf import is_gguf, read_facts

WHOLE = gguf()


def numbers(name: str, *values: float) -> bytes:
    """A file in which a property is an array of numbers with a point."""
    array = struct.pack("<IIQ", 9, 6, len(values)) + struct.pack(f"<{len(values)}f", *values)
    return gguf({**PAIRS, "x": 1, name: 7}).replace(text(name) + value(7), text(name) + array)


def read(folder: Path, content: bytes) -> Facts:
    file = folder / "x.gguf"
    file.write_bytes(content)
    return read_facts(file)


def test_the_facts_of_a_model(tmp_path: Path) -> None:
    assert read(tmp_path, WHOLE) == Facts(
        architecture="llama", blocks=2, context_length=2048, embedding_length=64, heads=4, kv_heads=4, key_length=16,
        value_length=16, vocabulary=3, file_size=len(WHOLE), layer_bytes=1280, other_bytes=352,
    )  # fmt: skip


def test_what_a_header_says_of_heads_goes_before_what_follows_from_the_rest(tmp_path: Path) -> None:
    facts = read(tmp_path, gguf(**{"llama.attention.key_length": 128, "llama.attention.value_length": 96,
                                   "llama.attention.head_count_kv": [1, 3], "llama.attention.head_count": [4, 8]}))  # fmt: skip
    assert (facts.key_length, facts.value_length, facts.kv_heads, facts.heads) == (128, 96, 4, 8)


def test_without_kv_heads_each_head_has_its_own(tmp_path: Path) -> None:
    pairs = {name: value for name, value in PAIRS.items() if "head_count_kv" not in name}
    assert read(tmp_path, gguf(pairs)).kv_heads == 8


def test_properties_that_nobody_asks_for_are_passed_over(tmp_path: Path) -> None:
    more = {"general.name": "x" * (2 << 20), "general.numbers": list(range(70_000)), "general.sure": True, "a.b": 0.5}
    assert read(tmp_path, gguf(**more)).blocks == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends within its header"),
        (b"ABCD" + WHOLE[4:], "does not begin with 'GGUF'"),
        (b"GGUF" + struct.pack("<I", 9) + WHOLE[8:], "version 9 is not known"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "claims 1152921504606846976 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1 << 60), "claims 1152921504606846976 properties"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1 << 62), "ends within its header"),
        (WHOLE[:300], "ends within its header"),
        (WHOLE[:-700], "ends before its tensors do"),
        (gguf(tensors={}), "no tensors"),
        (gguf({}), "does not say its architecture"),
        (gguf({"general.architecture": 5}), "does not say its architecture"),
        (gguf(**{"llama.block_count": "two"}), "llama.block_count is no number"),
        (gguf(**{"llama.block_count": float("nan")}), "llama.block_count is no number"),
        (gguf(**{"llama.block_count": 1 << 31}), "llama.block_count cannot be 2147483648"),
        (gguf(**{"general.alignment": 0}), "general.alignment cannot be 0"),
        (b"GGUF" + struct.pack("<IQQQcI", 3, 1, 8, 1, b"k", 99) + bytes(50), "unknown type 99"),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 1, 8, 1, b"k", 9, 9, 2) + bytes(50), "unknown type 9 in an array"),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 1, 8, 1, b"k", 9, 4, 1 << 50), "items of an array"),
        (b"GGUF" + struct.pack("<IQQQcI", 3, 1, 0, 1, b"k", 99) + bytes(50), "a tensor of 99 dimensions"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1 << 63), "claims 9223372036854775808 properties"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, (1 << 14) + 1) + bytes(20 << 14), "claims 16385 properties"),
        (b"GGUF" + struct.pack("<IQQ", 3, (1 << 18) + 1, 0) + bytes(1 << 19), "claims 262145 tensors"),
        (b"GGUF" + struct.pack("<IQQQcIIQQ", 3, 1, 8, 1, b"k", 9, 8, 9, 1 << 63) + bytes(50), "ends within its header"),
        (numbers("llama.attention.head_count_kv", float("nan"), 1.0), "head_count_kv cannot be nan"),
        (numbers("llama.attention.head_count_kv", float("inf")), "head_count_kv cannot be inf"),
        (numbers("llama.block_count", float("-inf")), "block_count cannot be -inf"),
    ],
)
def test_a_damaged_header_is_refused_in_words(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InvalidValue, match=message) as raised:
        read(tmp_path, content)
    assert raised.value.param == "source"


def facts_or_refusal(folder: Path, content: bytes) -> None:
    tracemalloc.start()
    with suppress(InvalidValue):
        read(folder, content)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 << 20


def test_what_many_arrays_claim_takes_neither_memory_nor_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localai_q.gguf.MOST_KEPT", 1 << 12)
    array = struct.pack("<IIQ", 9, 0, 1 << 10) + bytes(1 << 10)
    pairs = b"".join(text(f"a{number}") + array for number in range(300))
    count = len(PAIRS) + 300
    header = WHOLE.replace(struct.pack("<IQQ", 3, 4, len(PAIRS)), struct.pack("<IQQ", 3, 4, count) + pairs)
    tracemalloc.start()
    assert read(tmp_path, header).blocks == 2
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    header = b"GGUF" + struct.pack("<IQQQcIIQ", 3, 1, 1, 1, b"k", 9, 8, (1 << 21) + 1) + bytes(17 << 20)
    with pytest.raises(InvalidValue, match="claims 2097153 strings in arrays"):
        read(tmp_path, header)


fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(st.binary(max_size=400))
def test_any_bytes_are_facts_or_one_error(tmp_path: Path, content: bytes) -> None:
    facts_or_refusal(tmp_path, b"GGUF" + struct.pack("<I", 3) + content)


@fuzz
@given(st.sampled_from([WHOLE, numbers("llama.attention.head_count_kv", 1.0, 3.0), numbers("llama.block_count", 2.0)]),
       st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=6),
       st.integers(0, len(WHOLE)))  # fmt: skip
def test_a_header_with_changed_bytes_is_facts_or_one_error(tmp_path: Path, whole: bytes, changes, length: int) -> None:
    content = bytearray(whole)
    for place, byte in changes:
        content[place] = byte
    facts_or_refusal(tmp_path, bytes(content[: max(length, 500)]))


def test_whether_a_file_is_gguf_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x"
    for content, answer in ((b"GGUF...", True), (b"GG", False), (b"", False)):
        file.write_bytes(content)
        assert is_gguf(file) is answer
