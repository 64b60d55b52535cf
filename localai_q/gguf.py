"""Reads from the header of a GGUF file what its memory depends on. The values of the tensors are the engine's.

The backend `xllamacpp` has a reader of its own: a backend imports nothing of ours, and asks other things of the header.

A header is other people's data: it is read once, front to back, within `LONGEST_HEADER`; what it claims is compared with
what is there before memory is given to it.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from localai_q.cluster.models import Facts
from localai_q.errors import InvalidValue

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, where the header does not say
LONGEST_HEADER = 256 << 20  # bytes; vocabularies are a few MiB
LONGEST_STRING = 1 << 20  # bytes of a string that is kept
LONGEST_ARRAY = 1 << 16  # numbers of an array that is kept
MOST_KEPT = 1 << 20  # numbers of all of them
MOST_STRINGS = 1 << 21  # in all arrays: vocabularies and their merges are below a million
MOST_PROPERTIES, MOST_TENSORS = 1 << 14, 1 << 18
MOST_DIMENSIONS = 8
LARGEST = 1 << 31  # of a number that the memory depends on
STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
U32, U64 = 4, 10
MOST_PARAMETERS = 1 << 50
TYPES = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 9: "q8_1", 10: "q2_k", 11: "q3_k",
         12: "q4_k", 13: "q5_k", 14: "q6_k", 15: "q8_k", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s",
         20: "iq4_nl", 21: "iq3_s", 22: "iq2_s", 23: "iq4_xs", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64",
         29: "iq1_m", 30: "bf16", 34: "tq1_0", 35: "tq2_0", 39: "mxfp4", 40: "nvfp4", 41: "q1_0", 42: "q2_0"}  # fmt: skip


@dataclass(frozen=True)
class _Array:
    """An array of which not more is kept than is asked for later."""

    length: int
    numbers: tuple[float, ...]


_Value = int | float | str | _Array


def is_gguf(path: Path) -> bool:
    """Whether the file begins as GGUF files do.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_facts(path: Path, *parts: Path) -> Facts:
    """What the header of a model's GGUF file says, or the headers of all its files: `parts` are those behind the first.

    Raises:
        InvalidValue: it is no whole GGUF header, or these are not all files of one model in their order; the message says
            where it goes wrong.
        OSError: one cannot be read.
    """
    found = [_one_of(each, number, len(parts) + 1) for number, each in enumerate((path, *parts), 1)]
    _check_together([content for content, _ in found])
    sizes = {name: size for _, each in found for name, size in each.items()}
    if not sizes:
        raise _damaged("it has no tensors")
    return _facts(found[0][0].pairs, sizes, sum(content.file_size for content, _ in found))


@dataclass(frozen=True)
class Tensors:
    """What a model's tensors are in all."""

    types: frozenset[str]  # as "q4_k"
    parameters: int  # numbers that they hold


def read_tensors(path: Path, *parts: Path) -> Tensors:
    """What the headers of a model's GGUF file, or of all its files, say of its tensors.

    Raises:
        InvalidValue, OSError: as `read_facts`.
    """
    found = [tensor for each in (path, *parts) for tensor in _read(each).tensors]
    return Tensors(
        types=frozenset(TYPES.get(tensor.kind, f"type {tensor.kind}") for tensor in found),
        parameters=_bounded("parameters", sum(tensor.elements for tensor in found), MOST_PARAMETERS),
    )


@dataclass(frozen=True)
class _Tensor:
    name: str
    kind: int
    elements: int
    offset: int


@dataclass(frozen=True)
class _Content:
    """All that a header says."""

    pairs: dict[str, _Value]
    tensors: list[_Tensor]
    length: int  # bytes of the header
    file_size: int


def _read(path: Path) -> _Content:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        header = _Header(file, min(size, LONGEST_HEADER))
        if header.take(len(MAGIC)) != MAGIC:
            raise _damaged("it does not begin with 'GGUF'")
        version = header.number(U32)
        if version not in VERSIONS:
            raise _damaged(f"GGUF version {version} is not known")
        tensor_count, pair_count = int(header.number(U64)), int(header.number(U64))
        pairs = dict(header.pair() for _ in range(header.counted(pair_count, "properties", MOST_PROPERTIES)))
        tensors = [header.tensor() for _ in range(header.counted(tensor_count, "tensors", MOST_TENSORS))]
        return _Content(pairs, tensors, header.at, size)


def _one_of(path: Path, number: int, count: int) -> tuple[_Content, dict[str, int]]:
    """A file's header, and the bytes of its tensors."""
    try:
        found = _read(path)
        return found, _sizes(found)
    except InvalidValue as error:
        if count == 1:
            raise
        raise InvalidValue(f"File {number} of {count}: {error.message}", param=error.param) from error


def _check_together(files: Sequence[_Content]) -> None:
    """Refuse files that are not all of one model, in their order."""
    count, total = len(files), sum(len(file.tensors) for file in files)
    for number, file in enumerate(files, 1):
        of, at = max(_number(file.pairs, "split.count", 1), 1), _number(file.pairs, "split.no", 0) + 1
        if of > count == 1:
            raise _apart(f"this one is one of {of}, and the others are missing; they come with the first of them where "
                         f"that is called …-00001-of-{of:05}.gguf")  # fmt: skip
        if of != count:
            raise _apart(f"file {number} is one of {of}, and there are {count}")
        if at != number:
            raise _apart(f"file {number} of {count} says that it is file {at}")
    if any(_number(file.pairs, "split.tensors.count", total) != total for file in files):
        raise _apart(f"they have {total} tensors together, and one of them is of a model that has another number")
    if count > 1 and len({tensor.name for file in files for tensor in file.tensors}) < total:
        raise _apart("two of them have the same tensor")


def _apart(why: str) -> InvalidValue:
    return InvalidValue(f"These are not the files of one model: {why}.", param="source")


def _damaged(why: str) -> InvalidValue:
    return InvalidValue(f"The file is no usable GGUF file: {why}.", param="source")


class _Header:
    """The header as it is read: every length is compared with the bytes that are left."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self._file = file
        self._end = end
        self._kept = 0  # numbers
        self._strings = 0
        self.at = 0

    def take(self, count: int) -> bytes:
        self._need(count)
        self.at += count
        return self._file.read(count)

    def skip(self, count: int) -> None:
        self._need(count)
        self.at += count
        self._file.seek(count, os.SEEK_CUR)

    def number(self, kind: int) -> int | float:
        form = SCALARS.get(kind)
        if form is None:
            raise _damaged(f"it uses the unknown type {kind}")
        found: int | float = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return found

    def counted(self, count: int, what: str, most: int) -> int:
        """The count, if so many things of a byte or more can follow, and are no more than may be."""
        if count > min(most, self._end - self.at):
            raise _damaged(f"it claims {count} {what}")
        return count

    def text(self) -> str:
        length = int(self.number(U64))
        if length > LONGEST_STRING:
            self.skip(length)
            return ""
        return self.take(length).decode("utf-8", "replace")

    def pair(self) -> tuple[str, _Value]:
        name = self.text()
        return name, self._value(int(self.number(U32)))

    def tensor(self) -> _Tensor:
        name = self.text()
        dimensions = int(self.number(U32))
        if dimensions > MOST_DIMENSIONS:
            raise _damaged(f"it claims a tensor of {dimensions} dimensions")
        elements = math.prod(int(self.number(U64)) for _ in range(dimensions))
        return _Tensor(name, int(self.number(U32)), elements, int(self.number(U64)))

    def _value(self, kind: int) -> _Value:
        if kind == STRING:
            return self.text()
        return self._array() if kind == ARRAY else self.number(kind)

    def _array(self) -> _Array:
        kind, length = int(self.number(U32)), int(self.number(U64))
        self.counted(length, "items of an array", LONGEST_HEADER)
        if kind == STRING:
            self._skip_strings(length)
            return _Array(length, ())
        if kind not in SCALARS:
            raise _damaged(f"it uses the unknown type {kind} in an array")
        self._kept += length
        if length > LONGEST_ARRAY or self._kept > MOST_KEPT:
            self.skip(length * struct.calcsize(SCALARS[kind]))
            return _Array(length, ())
        return _Array(length, tuple(self.number(kind) for _ in range(length)))

    def _skip_strings(self, count: int) -> None:
        self._strings += count
        if self._strings > MOST_STRINGS:
            raise _damaged(f"it claims {self._strings} strings in arrays")
        for _ in range(count):
            self.skip(int(self.number(U64)))

    def _need(self, count: int) -> None:
        if count > self._end - self.at:
            raise _damaged("it ends within its header")


def _sizes(file: _Content) -> dict[str, int]:
    """The bytes of each tensor: up to the next one, or to the file's end."""
    alignment = _number(file.pairs, "general.alignment", ALIGNMENT)
    if not alignment:
        raise _damaged("general.alignment cannot be 0")
    begin = -(-file.length // alignment) * alignment
    ordered = sorted(file.tensors, key=lambda tensor: tensor.offset)
    if ordered and begin + ordered[-1].offset > file.file_size:
        raise _damaged("it ends before its tensors do")
    ends = [*(tensor.offset for tensor in ordered[1:]), file.file_size - begin]
    return {tensor.name: end - tensor.offset for tensor, end in zip(ordered, ends, strict=False)}


def _facts(pairs: dict[str, _Value], sizes: dict[str, int], file_size: int) -> Facts:
    architecture = pairs.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise _damaged("it does not say its architecture")

    def told(name: str, default: int = 0) -> int:
        return _number(pairs, f"{architecture}.{name}", default)

    blocks, embedding, heads = told("block_count"), told("embedding_length"), told("attention.head_count")
    each = embedding // heads if heads else 0
    kv = pairs.get(f"{architecture}.attention.head_count_kv")
    kv_heads = sum(kv.numbers) if isinstance(kv, _Array) else told("attention.head_count_kv", heads) * blocks
    layers = sum(size for name, size in sizes.items() if name.startswith("blk."))
    tokens = pairs.get("tokenizer.ggml.tokens")
    return Facts(
        architecture=architecture[:100],
        blocks=blocks,
        context_length=told("context_length"),
        embedding_length=embedding,
        heads=heads,
        kv_heads=_bounded("attention.head_count_kv", kv_heads),
        key_length=told("attention.key_length", each),
        value_length=told("attention.value_length", each),
        vocabulary=_bounded("vocabulary", tokens.length) if isinstance(tokens, _Array) else told("vocab_size"),
        file_size=file_size,
        layer_bytes=layers,
        other_bytes=sum(sizes.values()) - layers,
    )


def _number(pairs: dict[str, _Value], name: str, default: int) -> int:
    """A whole number, or the largest of an array of them, which a model has that says it for each layer."""
    value = pairs.get(name, default)
    found = max(value.numbers, default=0) if isinstance(value, _Array) else value
    if isinstance(found, str) or found != found:
        raise _damaged(f"{name} is no number")
    return _bounded(name, found)


def _bounded(name: str, value: float, most: int = LARGEST) -> int:
    if not 0 <= value < most:
        raise _damaged(f"{name} cannot be {value}")
    return int(value)
