"""GGUF files as small as a test needs them, written by the format's own description."""

import math
import random
import struct
from pathlib import Path

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
        kind, form = SCALARS[type(found[0])]
        return struct.pack("<IIQ", 9, kind, len(found)) + b"".join(struct.pack(form, item) for item in found)
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


def of_weights(pairs: dict, shapes: dict[str, tuple[int, ...]], spread: float) -> bytes:
    """A file of these properties and of tensors of random numbers, some so far from 0."""
    draw = random.Random(1)
    header, content = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(pairs)), b""
    header += b"".join(text(name) + value(found) for name, found in pairs.items())
    for name, shape in shapes.items():
        header += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(content))
        count = math.prod(shape)
        content += struct.pack(f"<{count}f", *(draw.gauss(0, spread) for _ in range(count)))
        content += bytes(-len(content) % 32)
    return header + bytes(-len(header) % 32) + content


def lora(layers: int, width: int, rank: int = 4) -> bytes:
    """An adapter for what a llama of this width asks its heads, in its first layers."""
    pairs = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora",
             "adapter.lora.alpha": float(rank)}  # fmt: skip
    shapes = {f"blk.{n}.attn_q.weight.lora_{side}": shape
              for n in range(layers) for side, shape in (("a", (width, rank)), ("b", (rank, width)))}  # fmt: skip
    return of_weights(pairs, shapes, 1)


def embedder(spread: float = 0.1, **changes: object) -> bytes:
    """A BERT of one layer that makes vectors of texts, letter by letter; what they mean, it has never learnt."""
    width, inner, most = 256, 512, 64
    letters = [*map(chr, range(33, 127))]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"\u2581{letter}" for letter in letters)]
    pairs = {
        "general.architecture": "bert", "bert.block_count": 1, "bert.context_length": most, "bert.embedding_length": width,
        "bert.feed_forward_length": inner, "bert.attention.head_count": 4, "bert.attention.layer_norm_epsilon": 1e-12,
        "bert.attention.causal": False, "bert.pooling_type": 1, "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type_count": 2, "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.cls_token_id": 2, "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.mask_token_id": 4, **changes,
    }  # fmt: skip
    layer = {"attn_q": (width, width), "attn_k": (width, width), "attn_v": (width, width), "attn_output": (width, width),
             "attn_output_norm": (width,), "ffn_up": (width, inner), "ffn_down": (inner, width),
             "layer_output_norm": (width,)}  # fmt: skip
    shapes = {"token_embd.weight": (width, len(tokens)), "token_types.weight": (width, 2),
              "position_embd.weight": (width, most), "token_embd_norm.weight": (width,), "token_embd_norm.bias": (width,)}  # fmt: skip
    shapes |= {f"blk.0.{name}.{kind}": shape if kind == "weight" else shape[-1:]
               for name, shape in layer.items() for kind in ("weight", "bias")}  # fmt: skip
    return of_weights(pairs, shapes, spread)


def speaker(spread: float) -> bytes:
    """A llama of one layer that has learnt nothing, and is the surer of what comes next the larger `spread` is."""
    width, inner = 256, 512
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *map(chr, range(33, 127)),
        *(f"\u2581{chr(n)}" for n in range(33, 127)),
    ]
    pairs = {
        **PAIRS, "llama.block_count": 1, "llama.embedding_length": width, "llama.feed_forward_length": inner,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.unknown_token_id": 1, "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.seperator_token_id": 3, "tokenizer.ggml.eos_token_id": 3,
    }  # fmt: skip
    layer = {"attn_norm": (width,), "attn_q": (width, width), "attn_k": (width, width // 2), "attn_v": (width, width // 2),
             "attn_output": (width, width), "ffn_norm": (width,), "ffn_gate": (width, inner), "ffn_up": (width, inner),
             "ffn_down": (inner, width)}  # fmt: skip
    shapes = {f"{name}.weight": (width, len(tokens)) for name in ("token_embd", "output")}
    shapes |= {"output_norm.weight": (width,), **{f"blk.0.{name}.weight": shape for name, shape in layer.items()}}
    return of_weights(pairs, shapes, spread)


def projector(width: int) -> bytes:
    """What makes an image of 32 by 32 points into one token for a model of this width, as SmolVLM's does; it knows none."""
    inner, hidden, patch, image = 8, 16, 16, 32
    pairs = {
        "general.type": "mmproj", "general.architecture": "clip", "clip.has_vision_encoder": True,
        "clip.projector_type": "idefics3", "clip.vision.image_size": image, "clip.vision.patch_size": patch,
        "clip.vision.embedding_length": inner, "clip.vision.feed_forward_length": hidden, "clip.vision.block_count": 1,
        "clip.vision.projection_dim": width, "clip.vision.attention.head_count": 1,
        "clip.vision.attention.layer_norm_epsilon": 1e-6, "clip.vision.image_mean": [0.5] * 3,
        "clip.vision.image_std": [0.5] * 3, "clip.use_gelu": True, "clip.vision.projector.scale_factor": image // patch,
    }  # fmt: skip
    layer = {"attn_q": (inner, inner), "attn_k": (inner, inner), "attn_v": (inner, inner), "attn_out": (inner, inner),
             "ffn_up": (inner, hidden), "ffn_down": (hidden, inner), "ln1": (inner,), "ln2": (inner,)}  # fmt: skip
    shapes = {f"v.blk.0.{name}.{kind}": shape if kind == "weight" else shape[-1:]
              for name, shape in layer.items() for kind in ("weight", "bias")}  # fmt: skip
    patches = (image // patch) ** 2
    shapes |= {"v.patch_embd.weight": (patch, patch, 3, inner), "v.patch_embd.bias": (inner,), "v.post_ln.weight": (inner,),
               "v.position_embd.weight": (inner, patches), "v.post_ln.bias": (inner,),
               "mm.model.fc.weight": (inner * patches, width)}  # fmt: skip
    return of_weights(pairs, shapes, 0.1)


def split_into(folder: Path, whole: bytes, count: int, *, bare: bool = False) -> list[Path]:
    """The same in a folder, under the names that an engine looks for."""
    paths = [folder / f"m-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    for path, content in zip(paths, split(whole, count, bare=bare), strict=True):
        path.write_bytes(content)
    return paths


WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type


def split(whole: bytes, count: int, *, bare: bool = False) -> list[bytes]:
    """The files that llama.cpp's `gguf-split` makes of one; with `bare`, the first has properties only, as with
    `--no-tensor-first-split`."""
    _, tensors, pairs = struct.unpack_from("<IQQ", whole, 4)
    begin = _after_pairs(whole, 24, pairs)
    infos, end = _infos(whole, begin, tensors)
    data = end + -end % 32
    stops = [*(at for *_, at in infos[1:]), len(whole) - data]
    blocks = [(head, whole[data + at : data + stop]) for (head, at), stop in zip(infos, stops, strict=False)]
    full = count - bare
    groups = [[]] * bare + [blocks[len(blocks) * n // full : len(blocks) * (n + 1) // full] for n in range(full)]
    return [_part(group, number, count, tensors, (pairs, whole[24:begin]) if not number else (0, b""))
            for number, group in enumerate(groups)]  # fmt: skip


def _part(blocks: list, number: int, count: int, tensors: int, properties: tuple[int, bytes]) -> bytes:
    own = {"split.no": (2, "<H", number), "split.count": (2, "<H", count), "split.tensors.count": (5, "<i", tensors)}
    header = b"GGUF" + struct.pack("<IQQ", 3, len(blocks), properties[0] + len(own)) + properties[1]
    header += b"".join(text(name) + struct.pack("<I", kind) + struct.pack(form, found)
                       for name, (kind, form, found) in own.items())  # fmt: skip
    offset, content = 0, []
    for head, block in blocks:
        header += head + struct.pack("<Q", offset)
        content += [block, bytes(-len(block) % 32)]
        offset += len(block) + -len(block) % 32
    return b"".join([header, bytes(-len(header) % 32), *content])


def _after_pairs(whole: bytes, at: int, count: int) -> int:
    for _ in range(count):
        at += 8 + struct.unpack_from("<Q", whole, at)[0]
        at = _after_value(whole, at + 4, struct.unpack_from("<I", whole, at)[0])
    return at


def _after_value(whole: bytes, at: int, kind: int) -> int:
    if kind == 8:
        return at + 8 + struct.unpack_from("<Q", whole, at)[0]
    if kind != 9:
        return at + WIDTHS[kind]
    kind, count = struct.unpack_from("<IQ", whole, at)
    at += 12
    if kind in WIDTHS:
        return at + count * WIDTHS[kind]
    for _ in range(count):
        at = _after_value(whole, at, kind)
    return at


def _infos(whole: bytes, at: int, count: int) -> tuple[list[tuple[bytes, int]], int]:
    """What is said of each tensor up to where its data is, and that; and where this ends."""
    found = []
    for _ in range(count):
        start = at
        at += 8 + struct.unpack_from("<Q", whole, at)[0]
        at += 4 + 8 * struct.unpack_from("<I", whole, at)[0] + 4
        found.append((whole[start:at], struct.unpack_from("<Q", whole, at)[0]))
        at += 8
    return found, at
