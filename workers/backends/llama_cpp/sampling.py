"""Chooses tokens: what a body says of sampling, as a chain of llama.cpp's samplers, and the grammar beside it.

Owns the parameters, their ranges and defaults, and the order in which they act. All are llama.cpp's server's, so that a
request means the same to both engines.
"""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import grpc
import llama_cpp as c
import numpy as np
from limits import LOOKING_BACK
from native import Model, what_it_said
from serving import Refusal

INT32 = 2**31 - 1
SEEDS = 2**32
MIROSTAT_CANDIDATES = 100
MOST_BIASES = 4096

Reader = Callable[[Any], Any]
Settings = SimpleNamespace


def _number(least: float = -math.inf, most: float = math.inf, *, above: bool = False) -> Reader:
    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError("must be a number")
        if not least <= value <= most or (above and value == least):
            raise ValueError(
                f"must be {'above' if above else 'from'} {least:g}{f' to {most:g}' if most < INT32 else ''}"
            )
        return float(value)

    return read


def _whole(least: int, most: int = INT32) -> Reader:
    def read(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"must be a whole number from {least}{f' to {most}' if most < INT32 else ''}")
        return value

    return read


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _texts(value: Any) -> list[str]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise ValueError("must be a list of strings that are not empty")
    return found


def _seed(value: Any) -> int:
    if type(value) is not int:
        raise ValueError("must be a whole number")
    return value % SEEDS


def _biases(value: Any) -> dict[int, float]:
    try:
        found = {int(token): float(bias) for token, bias in dict(value).items()}
    except (TypeError, ValueError) as error:
        raise ValueError("must be an object of token ids and numbers") from error
    if len(found) > MOST_BIASES or not all(math.isfinite(bias) for bias in found.values()):
        raise ValueError(f"must have finite numbers for {MOST_BIASES} tokens at most")
    return found


def _order(value: Any) -> list[str]:
    found = _texts(value)
    if unknown := set(found) - STAGES.keys():
        raise ValueError(f"has the unknown sampler {min(unknown)!r}; there are: {', '.join(STAGES)}")
    return found


# Of each parameter: how it is read, and what it is if it is not given.
PARAMETERS: dict[str, tuple[Reader, Any]] = {
    "temperature": (_number(0), 0.8),
    "dynatemp_range": (_number(0), 0.0),
    "dynatemp_exponent": (_number(0), 1.0),
    "top_k": (_whole(-1), 40),
    "top_p": (_number(0, 1), 0.95),
    "min_p": (_number(0, 1), 0.05),
    "min_keep": (_whole(0), 0),
    "typical_p": (_number(0, 1), 1.0),
    "top_n_sigma": (_number(-1), -1.0),
    "xtc_probability": (_number(0, 1), 0.0),
    "xtc_threshold": (_number(0, 1), 0.1),
    "repeat_last_n": (_whole(-1), 64),
    "repeat_penalty": (_number(0, above=True), 1.0),
    "presence_penalty": (_number(), 0.0),
    "frequency_penalty": (_number(), 0.0),
    "dry_multiplier": (_number(0), 0.0),
    "dry_base": (_number(1), 1.75),
    "dry_allowed_length": (_whole(0), 2),
    "dry_penalty_last_n": (_whole(-1), -1),
    "dry_sequence_breakers": (_texts, ["\n", ":", '"', "*"]),
    "mirostat": (_whole(0, 2), 0),
    "mirostat_tau": (_number(0), 5.0),
    "mirostat_eta": (_number(0), 0.1),
    "seed": (_seed, None),
    "logit_bias": (_biases, {}),
    "ignore_eos": (_flag, False),
    "samplers": (_order, None),
}


def read_settings(fields: Mapping[str, Any], model: Model, context_size: int) -> Settings:
    """The parameters of a request, each as an attribute.

    Raises:
        ValueError: one cannot be what it is; the message names it.
    """
    found = {}
    for name, (read, default) in PARAMETERS.items():
        value = fields.get(name)
        try:
            found[name] = default if value is None else read(value)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error
    model.check(list(found["logit_bias"]))
    if found["seed"] is None:
        found["seed"] = random.SystemRandom().randrange(SEEDS)
    for name in LOOKING_BACK:
        if found[name] == -1:
            found[name] = context_size
    return Settings(**found)


def _looks_back(settings: Settings) -> int:
    """How many of the tokens before the answer its choice depends on."""
    repeats = settings.repeat_penalty != 1 or settings.presence_penalty or settings.frequency_penalty
    return max(settings.repeat_last_n if repeats else 0, settings.dry_penalty_last_n if settings.dry_multiplier else 0)


def _dry(settings: Settings, model: Model) -> Any:
    breakers = [text.encode("utf-8", "replace") for text in settings.dry_sequence_breakers]
    array = (ctypes.c_char_p * len(breakers))(*breakers)
    return c.llama_sampler_init_dry(
        model.vocabulary, settings.dry_multiplier, settings.dry_base, settings.dry_allowed_length,
        settings.dry_penalty_last_n, array, len(breakers),
    )  # fmt: skip


def _penalties(settings: Settings, model: Model) -> Any:
    return c.llama_sampler_init_penalties(
        model.size, settings.repeat_last_n, settings.repeat_penalty, settings.frequency_penalty,
        settings.presence_penalty,
    )  # fmt: skip


# In the order in which they act.
STAGES: dict[str, Callable[[Settings, Model], Any]] = {
    "penalties": _penalties,
    "dry": _dry,
    "top_n_sigma": lambda s, _: c.llama_sampler_init_top_n_sigma(s.top_n_sigma),
    "top_k": lambda s, _: c.llama_sampler_init_top_k(s.top_k),
    "typ_p": lambda s, _: c.llama_sampler_init_typical(s.typical_p, s.min_keep),
    "top_p": lambda s, _: c.llama_sampler_init_top_p(s.top_p, s.min_keep),
    "min_p": lambda s, _: c.llama_sampler_init_min_p(s.min_p, s.min_keep),
    "xtc": lambda s, _: c.llama_sampler_init_xtc(s.xtc_probability, s.xtc_threshold, s.min_keep, s.seed),
    "temperature": lambda s, _: c.llama_sampler_init_temp_ext(s.temperature, s.dynatemp_range, s.dynatemp_exponent),
}

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)], align=True)


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, model: Model, settings: Settings, grammar: str | None, prompt: Sequence[int]) -> None:
        self._grammar = _grammar(model, grammar)
        self._chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        for stage in _stages(model, settings):
            c.llama_sampler_chain_add(self._chain, stage)
        for token in prompt[max(len(prompt) - _looks_back(settings), 0) :]:
            c.llama_sampler_accept(self._chain, token)
        self._candidates = np.zeros(model.size, dtype=_CANDIDATE)
        self._ids = np.arange(model.size, dtype=np.int32)
        self._bias = _bias(model, settings)

    def choose(self, logits: np.ndarray) -> int | None:
        """The next token; None if the grammar allows none.

        The grammar looks at one token first, and at all only if that one is not allowed: it is slow.
        """
        if self._bias is not None:
            logits = logits + self._bias
        token = self._draw(logits, bound=False)
        if self._grammar and not self._allows(token):
            token = self._draw(logits, bound=True)
            if not self._allows(token):
                return None
        return token

    def accept(self, token: int) -> None:
        """It is part of the answer."""
        c.llama_sampler_accept(self._chain, token)
        if self._grammar:
            c.llama_sampler_accept(self._grammar, token)

    def close(self) -> None:
        c.llama_sampler_free(self._chain)
        if self._grammar:
            c.llama_sampler_free(self._grammar)

    def _draw(self, logits: np.ndarray, *, bound: bool) -> int:
        candidates = self._candidates
        candidates["id"], candidates["logit"] = self._ids, logits
        array = _array(candidates)
        if bound:
            c.llama_sampler_apply(self._grammar, ctypes.byref(array))
        c.llama_sampler_apply(self._chain, ctypes.byref(array))
        if not 0 <= array.selected < array.size:
            raise ValueError("with these parameters of sampling no token is left to choose from")
        return int(array.data[array.selected].id)

    def _allows(self, token: int) -> bool:
        one = np.array([(token, 0.0, 0.0)], dtype=_CANDIDATE)
        c.llama_sampler_apply(self._grammar, ctypes.byref(_array(one)))
        return bool(np.isfinite(one["logit"][0]))


def _array(candidates: np.ndarray) -> Any:
    data = candidates.ctypes.data_as(c.llama_token_data_p)
    return c.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)


def _stages(model: Model, settings: Settings) -> list[Any]:
    if not settings.mirostat:
        chosen = [STAGES[name](settings, model) for name in settings.samplers or STAGES]
        return [*chosen, c.llama_sampler_init_dist(settings.seed)]
    seed, tau, eta = settings.seed, settings.mirostat_tau, settings.mirostat_eta
    warm = c.llama_sampler_init_temp(settings.temperature)
    if settings.mirostat == 1:
        return [warm, c.llama_sampler_init_mirostat(model.size, seed, tau, eta, MIROSTAT_CANDIDATES)]
    return [warm, c.llama_sampler_init_mirostat_v2(seed, tau, eta)]


def _bias(model: Model, settings: Settings) -> np.ndarray | None:
    """What is added to the logits."""
    if not settings.logit_bias and not settings.ignore_eos:
        return None
    bias = np.zeros(model.size, dtype=np.float32)
    for token, value in settings.logit_bias.items():
        bias[token] = value
    if settings.ignore_eos:
        bias[list(model.ends)] = -np.inf
    return bias


def _grammar(model: Model, grammar: str | None) -> Any:
    if grammar is None:
        return None
    found = c.llama_sampler_init_grammar(model.vocabulary, grammar.encode("utf-8", "replace"), b"root")
    if not found:
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"llama.cpp cannot read the grammar{what_it_said()}")
    return found
