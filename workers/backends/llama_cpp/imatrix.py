"""Reads an importance matrix, as llama.cpp's `llama-imatrix` writes it, into what its quantizer takes.

There are two forms: GGUF, with the sum of the squares that each column was multiplied by and how many these were; and the
older one, with the mean of the squares times the number of chunks.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

LARGEST = 4 << 30  # bytes
MOST_ENTRIES = 100_000
LONGEST_NAME = 256
SUMS, COUNTS = ".in_sum2", ".counts"
F32 = 0  # the number of that type in GGUF


class Damaged(Exception):
    """It is no importance matrix; the message says why."""


def read(path: Path) -> Any:
    """The array that `llama_model_quantize_params.imatrix` points to.

    Raises:
        Damaged: it is none.
    """
    if path.stat().st_size > LARGEST:
        raise Damaged(f"it has more than {LARGEST >> 30} GiB")
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    found = _from_gguf(path) if is_gguf else _from_dat(path.read_bytes())
    if not found:
        raise Damaged("it says nothing of any tensor")
    rows = (llama_cpp.llama_model_imatrix_data * (len(found) + 1))()  # the last one, empty, ends it
    for row, (name, values) in zip(rows, found.items(), strict=False):
        if not np.isfinite(values).all():
            raise Damaged(f"what it says of {name!r} are no numbers")
        row.name, row.size = name.encode(), len(values)
        row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    rows.kept = found  # as long as the array is
    return rows


def _from_dat(data: bytes) -> dict[str, Any]:
    place = 0

    def take(count: int) -> bytes:
        nonlocal place
        if not 0 <= count <= len(data) - place:
            raise Damaged("it is cut off, or of another format")
        place += count
        return data[place - count : place]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    found = {}
    entries = number()
    if not 0 < entries <= MOST_ENTRIES:
        raise Damaged(f"it claims {entries} entries")
    for _ in range(entries):
        length = number()
        if not 0 < length <= LONGEST_NAME:
            raise Damaged(f"it has a name of {length} bytes")
        name, calls, count = take(length).decode("utf-8", "replace"), number(), number()
        values = np.frombuffer(take(4 * count), "<f4").astype(np.float32)
        found[name] = values / np.float32(calls) if calls > 0 else values
    return found


class _Parameters(ctypes.Structure):
    """`gguf_init_params`."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def _library() -> Any:
    """The functions of ggml that read GGUF."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    path = next(path for path in sorted(folder.glob("*ggml-base*")) if path.suffix in (".so", ".dylib", ".dll"))
    found = ctypes.CDLL(str(path))
    found.gguf_init_from_file.argtypes = (ctypes.c_char_p, _Parameters)
    found.gguf_init_from_file.restype = ctypes.c_void_p
    for name, kind in (("n_tensors", ctypes.c_int64), ("data_offset", ctypes.c_size_t)):
        function = getattr(found, f"gguf_get_{name}")
        function.argtypes, function.restype = (ctypes.c_void_p,), kind
    for name, kind in (("name", ctypes.c_char_p), ("type", ctypes.c_int), ("offset", ctypes.c_size_t),
                       ("size", ctypes.c_size_t)):  # fmt: skip
        function = getattr(found, f"gguf_get_tensor_{name}")
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64), kind
    found.gguf_free.argtypes, found.gguf_free.restype = (ctypes.c_void_p,), None
    return found


def _from_gguf(path: Path) -> dict[str, Any]:
    library = _library()
    header = library.gguf_init_from_file(bytes(path), _Parameters(no_alloc=True, context=None))
    if not header:
        raise Damaged("it is no whole GGUF file")
    try:
        tensors = {
            library.gguf_get_tensor_name(header, index).decode(): _tensor(library, header, index, path)
            for index in range(min(library.gguf_get_n_tensors(header), MOST_ENTRIES))
        }
    finally:
        library.gguf_free(header)
    found = {}
    for name, sums in tensors.items():
        counts = tensors.get(name.removesuffix(SUMS) + COUNTS)
        if not name.endswith(SUMS) or counts is None:
            continue
        if not counts.size or sums.size % counts.size:
            raise Damaged(f"what it says of {name!r} does not fit together")
        columns = sums.reshape(counts.size, -1)
        means = np.where(counts[:, None] > 0, columns / np.maximum(counts[:, None], 1), 1)
        found[name.removesuffix(SUMS)] = np.ascontiguousarray(means.reshape(-1), dtype=np.float32)
    return found


def _tensor(library: Any, header: Any, index: int, path: Path) -> Any:
    if library.gguf_get_tensor_type(header, index) != F32:
        raise Damaged("it has tensors of another type than F32")
    begin = library.gguf_get_data_offset(header) + library.gguf_get_tensor_offset(header, index)
    size = library.gguf_get_tensor_size(header, index)
    if begin + size > path.stat().st_size:
        raise Damaged("it is cut off")
    return np.fromfile(path, "<f4", size // 4, offset=begin)
