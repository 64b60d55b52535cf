"""llama.cpp through llama-cpp-python's C functions, as Python would have it: a model, and one sequence of tokens in it.

Owns every pointer, the cache of the last prompt, and the checks without which a wrong value would end this process: the
library aborts on token ids that do not exist. Which token comes next is `sampling`'s.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import llama_cpp as c
import numpy as np
from serving import LoadFailure, Refusal

ERROR_LEVEL = 3  # of llama.cpp's log
PIECE = 64  # bytes that a token's text usually fits into

_said: deque[str] = deque(maxlen=1)  # the last error of llama.cpp's log


@c.llama_log_callback
def _listen(level: int, text: bytes, _: Any) -> None:
    if level == ERROR_LEVEL and (line := text.decode("utf-8", "replace").strip()):
        _said.append(line)
        print(line, flush=True)


c.llama_log_set(_listen, ctypes.c_void_p(0))
c.llama_backend_init()


def what_it_said() -> str:
    """The last error that llama.cpp has logged, to be added to a message; empty if there was none."""
    return f": {_said.pop()}" if _said else ""


class Stopped(Exception):
    """Whoever asked wants no more of it."""


class Model:
    """The weights and the vocabulary of a file."""

    def __init__(self, path: str, gpu_layers: int | None) -> None:
        _said.clear()
        params = c.llama_model_default_params()
        if gpu_layers is not None:
            params.n_gpu_layers = gpu_layers
        self.pointer = c.llama_model_load_from_file(path.encode(), params)
        if not self.pointer:
            raise LoadFailure(
                f"llama.cpp cannot load {path}{what_it_said()}. The file is cut short or damaged, this version does not know"
                " the architecture, or there is not enough memory for it"
            )
        self.vocabulary = c.llama_model_get_vocab(self.pointer)
        self.size = c.llama_vocab_n_tokens(self.vocabulary)  # tokens of the vocabulary
        self.ends = frozenset(token for token in range(self.size) if c.llama_vocab_is_eog(self.vocabulary, token))
        self.begins_prompts = c.llama_vocab_get_add_bos(self.vocabulary)
        self.first = c.llama_vocab_bos(self.vocabulary)  # -1: there is none
        self.last = c.llama_vocab_eos(self.vocabulary)

    @property
    def template(self) -> str:
        """The chat template of the file; empty if it has none."""
        found = c.llama_model_chat_template(self.pointer, None)
        return found.decode("utf-8", "replace") if found else ""

    def tokens_of(self, text: str, *, special: bool) -> list[int]:
        """The tokens of a text, whose special ones are read as such.

        Args:
            text: the text.
            special: whether the tokens that begin and end a prompt are added, where the model wants them.
        """
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        for _ in range(2):
            tokens = (c.llama_token * room)()
            count = c.llama_tokenize(self.vocabulary, data, len(data), tokens, room, special, True)
            if count >= 0:
                return list(tokens[:count])
            room = -count
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "llama.cpp cannot make tokens of this text")

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token; they need not be whole characters. Those of a special one only if `special`."""
        self.check([token])
        room = PIECE
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = c.llama_token_to_piece(self.vocabulary, token, buffer, room, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return b"".join(self.piece(token, special=True) for token in tokens).decode("utf-8", "replace")

    def check(self, tokens: Sequence[int]) -> None:
        """Refuse tokens that are not in the vocabulary."""
        for token in tokens:
            if not 0 <= token < self.size:
                known = f"this model's are 0 to {self.size - 1}"
                raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"the token {token} does not exist: {known}")

    def close(self) -> None:
        c.llama_model_free(self.pointer)


class Context:
    """One sequence of tokens that the model has read."""

    def __init__(self, model: Model, params: Any) -> None:
        self._model = model
        self._batch = params.n_batch
        self._pointer = c.llama_init_from_model(model.pointer, params)
        if not self._pointer:
            raise LoadFailure(f"llama.cpp cannot make room for the context{what_it_said()}")
        self._memory = c.llama_get_memory(self._pointer)
        self.tokens: list[int] = []  # that the cache holds

    @property
    def pooling(self) -> int:
        """How embeddings are pooled, as llama.cpp numbers it."""
        return c.llama_pooling_type(self._pointer)

    def adapt(self, adapters: Sequence[tuple[str, float]]) -> None:
        """Let LoRA adapters, files and their scales, change what the model says. They go with the model."""
        loaded = []
        for path, _ in adapters:
            loaded.append(c.llama_adapter_lora_init(self._model.pointer, path.encode()))
            if not loaded[-1]:
                raise LoadFailure(f"llama.cpp cannot use the adapter {path}{what_it_said()}")
        scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
        array = (c.llama_adapter_lora_p_ctypes * len(adapters))(*loaded)
        if c.llama_set_adapters_lora(self._pointer, array, len(adapters), scales) != 0:
            raise LoadFailure(f"llama.cpp cannot use these LoraAdapters together{what_it_said()}")

    def read(self, prompt: Sequence[int], *, reuse: bool, after_batch: Callable[[int, int], bool]) -> int:
        """Have the model read a prompt, except for the beginning that it has read last.

        Args:
            prompt: at least one token.
            reuse: whether what the cache holds may be used again.
            after_batch: told how many tokens were read and how many of them were in the cache; True stops.

        Returns:
            The tokens that were in the cache.

        Raises:
            Stopped: `after_batch` said so.
        """
        kept = self._keep(_shared(self.tokens, prompt[:-1]) if reuse else 0)
        for start in range(kept, len(prompt), self._batch):
            self.add(prompt[start : start + self._batch])
            if after_batch(len(self.tokens), kept):
                raise Stopped
        return kept

    def add(self, tokens: Sequence[int]) -> None:
        """Have the model read tokens, as many as a batch has at most."""
        array = (c.llama_token * len(tokens))(*tokens)
        self._decode(c.llama_batch_get_one(array, len(tokens)))
        self.tokens += tokens

    def logits(self) -> np.ndarray:
        """What the model makes of the last token: a number for each that could follow. A view, until the next `add`."""
        found = c.llama_get_logits_ith(self._pointer, -1)
        return np.ctypeslib.as_array(found, shape=(self._model.size,))

    def vector(self, tokens: Sequence[int]) -> np.ndarray:
        """The pooled embedding of tokens, as many as a batch has at most, of length 1."""
        self._keep(0)
        array = (c.llama_token * len(tokens))(*tokens)
        batch = c.llama_batch_get_one(array, len(tokens))
        batch.logits = (ctypes.c_int8 * len(tokens))(*[1] * len(tokens))  # every token counts in what is pooled
        self._decode(batch)
        found = c.llama_get_embeddings_seq(self._pointer, 0)
        vector = np.ctypeslib.as_array(found, shape=(c.llama_model_n_embd(self._model.pointer),)).astype(np.float64)
        self._keep(0)
        length = np.linalg.norm(vector)
        return vector / length if length else vector

    def close(self) -> None:
        c.llama_free(self._pointer)

    def _decode(self, batch: Any) -> None:
        status = c.llama_decode(self._pointer, batch)
        if status != 0:
            self._keep(0)
            raise RuntimeError(f"llama.cpp's decode ended with {status}{what_it_said()}")

    def _keep(self, count: int) -> int:
        """Forget what follows the first `count` tokens; how many are kept, for some models can only forget all."""
        if self._memory and not (count and c.llama_memory_seq_rm(self._memory, 0, count, -1)):
            c.llama_memory_clear(self._memory, True)
            count = 0
        del self.tokens[count:]
        return count


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens they begin with that are equal."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
