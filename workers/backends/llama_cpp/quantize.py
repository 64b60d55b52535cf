"""Quantizes a GGUF file, and measures what that has cost: `python quantize.py`, a program of its own.

Reads the order from stdin, one line of JSON, and writes lines of JSON to stdout: `{"progress": …}` as it goes, and at the
end `{"result": …}` or `{"error": …}`, with `"here": true` where another machine may be able to. It works at the lowest
priority, and ends when its stdin does. What is quantized where, and what becomes of the file, is the business of whoever
starts it.

The order: `source`, `result` (paths), `type` (as "q4_k_m"), `threads`, `text` (the path of a text to measure with; None: the
one beside this program), `embeddings` (whether the model is for vectors; others are, too, whose header says so), `pooling` (how
these are made, as "mean"; None: as the header says), and `options`: fields of the library's `llama_model_quantize_params`, as `TYPES` and `FLAGS` name
them, with `imatrix` (a path), `tensor_types` ({pattern: type}) and `prune_layers` (numbers).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import textwrap
import threading
from collections import deque
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import imatrix
import llama_cpp
import numpy as np

NICE = 19  # the priority of its reads and writes follows from that
TEXT = Path(__file__).with_name("quantize_text.txt")
LONGEST_TEXT = 1 << 20  # bytes
TOKENS = 256  # of the text, at most
LEAST_TOKENS = 32
LOGITS = 64 << 20  # numbers that are kept of the source: fewer tokens of a large vocabulary are measured
BATCH = 64  # tokens between two reports
CHUNKS = 16  # of the text, at most, whose vectors are compared
CHUNK = 100  # characters of one
USELESS = 1e18  # figures from here on say only that nothing is left of the model
BUFFER = 1 << 30  # bytes of a tensor that are kept in memory at once
ERROR = 4  # the level of a line of the library's log

TYPES = ("output_tensor_type", "token_embedding_type")
POOLING = {name: getattr(llama_cpp, f"LLAMA_POOLING_TYPE_{name.upper()}") for name in ("mean", "cls", "last")}
FLAGS = ("allow_requantize", "quantize_output_tensor", "pure", "only_copy")

_TENSOR = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")


class Failed(Exception):
    """It cannot be done; the message says why."""


class Log:
    """What the library says: its progress is passed on, and the last errors are kept."""

    def __init__(self, output: int) -> None:
        self.errors: deque[str] = deque(maxlen=3)
        self._output = output
        self._callback = llama_cpp.llama_log_callback(self._hear)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def say(self, **message: Any) -> None:
        try:
            os.write(self._output, (json.dumps(message) + "\n").encode())
        except OSError:  # nobody is there to hear it
            os._exit(1)

    def progress(self, stage: str, done: int, total: int, unit: str) -> None:
        self.say(progress={"stage": stage, "done": done, "total": total, "unit": unit})

    def reason(self, otherwise: str) -> str:
        """The last errors of the library."""
        return " | ".join(self.errors) or otherwise

    def _hear(self, level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace")
        sys.stderr.write(line)
        if level == ERROR and line.strip():
            self.errors.append(line.strip()[:500])
        elif found := _TENSOR.match(line.strip()):
            self.progress("quantizing", int(found[1]), int(found[2]), "tensors")


def quantize(order: dict[str, Any], log: Log) -> None:
    """Write the quantized file."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = order["threads"]
    params.ftype = file_type(order["type"])
    params.max_buf_size = BUFFER
    options = dict(order["options"])
    kept = []  # what the library's struct points to
    for name in FLAGS:
        setattr(params, name, options.pop(name, getattr(params, name)))
    for name in TYPES:
        if name in options:
            setattr(params, name, tensor_type(options.pop(name)))
    if path := options.pop("imatrix", None):
        kept.append(imatrix.read(Path(path)))
        params.imatrix = kept[-1]
    if patterns := options.pop("tensor_types", None):
        rows = [(pattern.encode(), tensor_type(name)) for pattern, name in patterns.items()]
        kept.append((llama_cpp.llama_model_tensor_override * (len(rows) + 1))(*rows))
        params.tt_overrides = kept[-1]
    if layers := options.pop("prune_layers", None):
        kept.append((ctypes.c_int32 * (len(layers) + 1))(*layers, -1))
        params.prune_layers = kept[-1]
    if options:
        raise Failed(f"this version of the quantizer does not know the option {min(options)!r}")
    code = llama_cpp.llama_model_quantize(
        os.fsencode(order["source"]), os.fsencode(order["result"]), ctypes.byref(params)
    )
    if code != 0:
        raise Failed(f"the library cannot quantize it: {log.reason(f'it ended with {code}')}")


def file_type(name: str) -> int:
    """The library's number of a type of file."""
    known = {"f32": "LLAMA_FTYPE_ALL_F32"}
    return _number(known.get(name, f"LLAMA_FTYPE_MOSTLY_{name.upper()}"), name)


def tensor_type(name: str) -> int:
    """The library's number of a type of tensor."""
    return _number(f"GGML_TYPE_{name.upper()}", name)


def _number(constant: str, name: str) -> int:
    found = getattr(llama_cpp, constant, None)
    if not isinstance(found, int):
        raise Failed(f"this version of the quantizer does not know the type {name!r}")
    return found


def comparison(order: dict[str, Any], log: Log) -> Callable[[], dict[str, Any]]:
    """What compares the result with the source, once it is there: by what both are for."""
    text = Path(order["text"] or TEXT).read_bytes()[:LONGEST_TEXT].decode("utf-8", "replace").strip()
    with closing(_loaded("source", order["source"], log, vocab_only=True)) as engine:
        pooling = pooling_of(order, engine.metadata)
        tokens = engine.tokenize(text.encode())[: min(TOKENS, max(LOGITS // engine.n_vocab(), LEAST_TOKENS))]
    if len(tokens) < LEAST_TOKENS:
        raise Failed(f"the text to measure with has {len(tokens)} tokens, and {LEAST_TOKENS} are needed")
    if pooling is None:
        return lambda: compare(order, tokens, log)
    chunks = textwrap.wrap(text, CHUNK)[:CHUNKS]
    return lambda: compare_vectors(order, chunks, pooling, log)


def pooling_of(order: dict[str, Any], header: dict[str, str]) -> int | None:
    """How the source makes vectors, as the library numbers it, if it is for these; None of one that generates text."""
    architecture = header.get("general.architecture")
    told = header.get(f"{architecture}.pooling_type")
    sees_all = header.get(f"{architecture}.attention.causal") == "false"  # each token does: it was not made to go on
    known = {str(number): number for number in POOLING.values()}
    if told == str(llama_cpp.LLAMA_POOLING_TYPE_RANK):
        raise Failed("the source ranks documents, and only models that generate text or embed can be compared")
    if not (order["embeddings"] or sees_all or told in known):
        return None
    if (named := order["pooling"]) and named not in POOLING:
        raise Failed(f"the model's pooling {named!r} is none of {', '.join(POOLING)}")
    return POOLING[named] if named else known.get(told, llama_cpp.LLAMA_POOLING_TYPE_MEAN)


def compare(order: dict[str, Any], tokens: list[int], log: Log) -> dict[str, Any]:
    """Load the source, then the result, and read the same text with both.

    Returns `perplexity` and `bits_per_weight` of both, `source_…` of the source, the mean `kl_divergence` of what the
    result expects of each next token from what the source does, in nats, and the `tokens` that were measured.
    """
    source, expected = _read("source", order, tokens, log)
    result, found = _read("result", order, tokens, log)
    divergence = 0.0
    for ours, theirs in zip(found, expected, strict=True):  # row by row: a vocabulary is large
        divergence += float(np.sum(np.exp(theirs) * (theirs - ours)))
    divergence /= len(expected)
    for name, figure, value in (("source", "perplexity", source["perplexity"]),
                                ("result", "perplexity", result["perplexity"]),
                                ("result", "divergence from the source", divergence)):  # fmt: skip
        if not abs(value) < USELESS:  # so is what is no number
            raise Failed(f"the {name} is of no use: its {figure} is {value}")
    return {**result, **{f"source_{name}": value for name, value in source.items()},
            "kl_divergence": max(divergence, 0.0), "tokens": len(tokens)}  # fmt: skip


def compare_vectors(order: dict[str, Any], chunks: list[str], pooling: int, log: Log) -> dict[str, Any]:
    """Load the source, then the result, and have both make vectors of the same texts.

    Returns the mean `cosine_similarity` of what the result and the source make of a text, 1 where it points in the same
    direction, `bits_per_weight` of both, `source_…` of the source, and how many `texts` there were.
    """
    source_bits, expected = _embedded("source", order, chunks, pooling, log)
    bits, found = _embedded("result", order, chunks, pooling, log)
    similarity = np.mean(np.sum(expected * found, axis=1))
    return {"cosine_similarity": min(float(similarity), 1.0), "bits_per_weight": bits,
            "source_bits_per_weight": source_bits, "texts": len(chunks)}  # fmt: skip


def _embedded(name: str, order: dict[str, Any], chunks: list[str], pooling: int, log: Log) -> tuple[float, Any]:
    """The bits of a weight, and the vectors of the texts, a row of length 1 for each."""
    threads = order["threads"]
    with closing(_loaded(name, order[name], log, n_ctx=TOKENS, n_batch=TOKENS, n_ubatch=TOKENS, n_threads=threads,
                         n_threads_batch=threads, n_gpu_layers=0, embedding=True, pooling_type=pooling)) as engine:  # fmt: skip
        most = llama_cpp.llama_model_n_ctx_train(engine.model)
        engine.n_batch = min(engine.n_batch, most or engine.n_batch)  # it cuts texts off there
        rows = []
        for number, chunk in enumerate(chunks):
            log.progress(f"reading with the {name}", number, len(chunks), "texts")
            try:
                rows.append(engine.embed(chunk))
            except RuntimeError as error:
                raise Failed(f"the {name} cannot read the text: {log.reason(str(error))}") from error
        log.progress(f"reading with the {name}", len(chunks), len(chunks), "texts")
        found = np.asarray(rows, dtype=np.float64)
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        if not (np.isfinite(lengths).all() and lengths.all()):
            raise Failed(f"the {name} is of no use: its vectors are no numbers")
        return _bits(engine), found / lengths


def _read(name: str, order: dict[str, Any], tokens: list[int], log: Log) -> tuple[dict[str, float], Any]:
    """Read the text: figures, and for each token but the last the logarithms of what may come next."""
    threads = order["threads"]
    engine = _loaded(name, order[name], log, n_ctx=TOKENS, n_batch=BATCH, n_ubatch=BATCH, n_threads=threads,
                     n_threads_batch=threads, n_gpu_layers=0, logits_all=True)  # fmt: skip
    try:
        log.progress(f"reading with the {name}", 0, len(tokens), "tokens")
        for begin in range(0, len(tokens), BATCH):
            engine.eval(tokens[begin : begin + BATCH])
            log.progress(f"reading with the {name}", engine.n_tokens, len(tokens), "tokens")
        rows = engine.scores[: len(tokens) - 1]
        for row in rows:
            row -= row.max()
            row -= np.log(np.sum(np.exp(row, dtype=np.float64)))
        likely = rows[np.arange(len(rows)), tokens[1:]].astype(np.float64)
        return {"perplexity": float(np.exp(-likely.mean())), "bits_per_weight": _bits(engine)}, rows
    except RuntimeError as error:
        raise Failed(f"the {name} cannot read the text: {log.reason(str(error))}") from error
    finally:
        engine.close()


def _bits(engine: llama_cpp.Llama) -> float:
    """What a weight of the model takes."""
    return 8 * llama_cpp.llama_model_size(engine.model) / max(llama_cpp.llama_model_n_params(engine.model), 1)


def _loaded(name: str, path: str, log: Log, **options: Any) -> llama_cpp.Llama:
    log.errors.clear()
    try:
        return llama_cpp.Llama(path, verbose=False, **options)
    except (ValueError, RuntimeError) as error:
        raise Failed(f"the {name} cannot be loaded: {log.reason(str(error))}") from error


def _end_with_stdin() -> None:
    """Whoever has started this is gone: nobody wants the rest."""
    os.read(0, 1)
    os._exit(1)


def main() -> None:
    """Do what the order says."""
    os.nice(NICE)
    log = Log(os.dup(1))
    os.dup2(2, 1)  # whatever else is printed is no message
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        compared = comparison(order, log)
        quantize(order, log)
        log.say(result=compared())
    except Failed as error:
        log.say(error=str(error))
    except imatrix.Damaged as error:
        log.say(error=f"the imatrix cannot be read: {error}")
    except (OSError, MemoryError) as error:  # of this machine
        log.say(error=str(error) or "there is not enough memory", here=True)
    os._exit(0)  # the library's destructors have nothing to save


if __name__ == "__main__":
    main()
