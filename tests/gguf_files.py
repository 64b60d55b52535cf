"""GGUF files as small as a test needs them, written by the format's own description."""

import random
import struct

SCALARS = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(found) -> bytes:
    """A value with its type before it."""
    if isinstance(found, str):
        return struct.pack("<I", 8) + text(found)
    if isinstance(found, list):
        if isinstance(found[0], str):
            return struct.pack("<IIQ", 9, 8, len(found)) + b"".join(map(text, found))
        return struct.pack("<IIQ", 9, 4, len(found)) + b"".join(struct.pack("<I", item) for item in found)
    kind, form = SCALARS[type(found)]
    return struct.pack("<I", kind) + struct.pack(form, found)


def gguf(pairs: dict | None = None, tensors: dict[str, int] | None = None, **changes) -> bytes:
    """A file of these properties and of tensors of so many bytes each; without any, a llama of two layers."""
    pairs = {**(PAIRS if pairs is None else pairs), **changes}
    tensors = TENSORS if tensors is None else tensors
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    header += b"".join(text(name) + value(found) for name, found in pairs.items())
    offset = 0
    for name, size in tensors.items():
        header += text(name) + struct.pack("<IQIQ", 1, size, 0, offset)
        offset += size
    return header + bytes(-len(header) % 32) + bytes(offset)


PAIRS = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 2048,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.tokens": ["a", "b", "c"],
}
TENSORS = {"token_embd.weight": 320, "blk.0.attn_q.weight": 640, "blk.1.attn_q.weight": 640, "output.weight": 32}


def lora(layers: int, width: int, rank: int = 4) -> bytes:
    """An adapter of random weights for what a llama of this width asks its heads, in its first layers."""
    draw = random.Random(1)
    pairs = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora",
             "adapter.lora.alpha": float(rank)}  # fmt: skip
    shapes = {f"blk.{n}.attn_q.weight.lora_{side}": shape
              for n in range(layers) for side, shape in (("a", (width, rank)), ("b", (rank, width)))}  # fmt: skip
    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(pairs))
    header += b"".join(text(name) + value(found) for name, found in pairs.items())
    size = 4 * width * rank
    for number, (name, shape) in enumerate(shapes.items()):
        header += text(name) + struct.pack("<IQQIQ", 2, *shape, 0, number * size)
    weights = [draw.gauss(0, 1) for _ in range(len(shapes) * width * rank)]
    return header + bytes(-len(header) % 32) + struct.pack(f"<{len(weights)}f", *weights)
