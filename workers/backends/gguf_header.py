"""Reads what a GGUF file says about itself, so that a damaged file is refused in words before the engine opens it.

Owns the format's header: magic, version, and the key-value pairs. Tensors are the engine's.
"""

from __future__ import annotations

import os
import struct
from typing import Any, BinaryIO

from serving import LoadFailure

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LONGEST_STRING = 64 << 20  # bytes; a longer one means a damaged file
MOST_ITEMS = 1 << 24
STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


class DamagedFile(ValueError):
    """The file is no GGUF file, or only a part of one."""


def header_of(path: str) -> dict[str, Any]:
    """The key-value pairs of the model file that a load names, without its arrays.

    Raises:
        LoadFailure: there is none, or it is damaged.
    """
    if not path:
        raise LoadFailure("ModelFile is empty: it must name a GGUF file")
    try:
        header = read_header(path)
    except DamagedFile as error:
        raise LoadFailure(f"{path} is not a usable GGUF file: {error}") from error
    except OSError as error:
        raise LoadFailure(f"cannot read the model {path}: {error.strerror}") from error
    count = header.get("split.count", 1)
    if isinstance(count, int) and count > 1 and not path.endswith(f"-00001-of-{count:05}.gguf"):
        raise LoadFailure(f"{path} is one of {count} files of a model: all are needed, of which the first is given")
    return header


def read_header(path: str) -> dict[str, Any]:
    """The key-value pairs of a GGUF file, without its arrays.

    Raises:
        DamagedFile: it is no whole GGUF header.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(4) != MAGIC:
            raise DamagedFile("it does not begin with 'GGUF'")
        version = _scalar(file, 4)
        if version not in VERSIONS:
            raise DamagedFile(f"GGUF version {version} is not known")
        tensors, pairs = _scalar(file, 10), _scalar(file, 10)
        if max(tensors, pairs) > MOST_ITEMS:
            raise DamagedFile(f"it claims {tensors} tensors and {pairs} properties")
        found = {}
        for _ in range(pairs):
            key = _string(file)
            value = _value(file, _scalar(file, 4))
            if value is not None:
                found[key] = value
        if not tensors and "split.count" not in found:  # the first of several files may have properties only
            raise DamagedFile("it has no tensors")
        return found


def _read(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise DamagedFile("it ends within its header")
    return data


def _scalar(file: BinaryIO, kind: int) -> Any:
    form = SCALARS[kind]
    return struct.unpack(form, _read(file, struct.calcsize(form)))[0]


def _string(file: BinaryIO) -> str:
    length = _scalar(file, 10)
    if length > LONGEST_STRING:
        raise DamagedFile(f"it claims a string of {length} bytes")
    return _read(file, length).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> Any:
    """The next value; None for an array, which is skipped."""
    if kind == STRING:
        return _string(file)
    if kind == ARRAY:
        _skip_array(file)
        return None
    if kind not in SCALARS:
        raise DamagedFile(f"it uses the unknown value type {kind}")
    return _scalar(file, kind)


def _skip_array(file: BinaryIO) -> None:
    kind, count = _scalar(file, 4), _scalar(file, 10)
    if count > MOST_ITEMS:
        raise DamagedFile(f"it claims an array of {count} items")
    if kind in SCALARS:
        file.seek(count * struct.calcsize(SCALARS[kind]), os.SEEK_CUR)
    elif kind == STRING:
        for _ in range(count):
            length = _scalar(file, 10)
            if length > LONGEST_STRING:
                raise DamagedFile(f"it claims a string of {length} bytes")
            file.seek(length, os.SEEK_CUR)
    else:
        raise DamagedFile(f"it uses the unknown value type {kind} in an array")
