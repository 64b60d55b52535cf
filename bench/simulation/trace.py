"""Who asks for what, when: conversations whose turns repeat what was said before them.

Conversations begin at random, more of them around noon: one run is one day. Each has one of its model's system prompts,
and its later turns begin with all that came before. The times are fixed in advance, whatever the cluster takes to
answer, so that every policy gets the same requests.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from bench.simulation.fleet import PROMPT_FACTOR, Scenario, asked, make_models, token_seconds
from localai_q.cluster.models import Model

WAVE = 0.4  # by how much of the mean the requests at noon are more, at midnight fewer
TURNS = 3.0  # of a conversation, on average
SYSTEMS = 8  # system prompts of a model
SYSTEM = (400.0, 0.5)  # tokens: median and spread (of the logarithm), like the next two
MESSAGE = (80.0, 0.8)
ANSWER = (150.0, 0.7)
PAUSE = (20.0, 0.6)  # seconds from an answer to the next message
READING = 20.0  # tokens/s at which an answer is taken to come, for the time of the next message
CONTEXT = 8192  # tokens that a conversation may reach
BEFORE = 180.0  # seconds before the first request from which on conversations are under way
CACHED = 0.5  # of a prompt, the part that is taken to be cached when the load is computed


class Request(NamedTuple):
    """One turn of a conversation. All lengths in tokens."""

    at: float  # seconds since the start
    model_id: str
    conversation: int
    system: int  # which of all system prompts
    system_length: int
    history: int  # of the prompt, what the turns before had: system prompt, messages and answers
    prompt: int
    answer: int


def make_trace(scenario: Scenario) -> list[Request]:
    """All requests, by time."""
    chance = random.Random(f"trace {scenario.seed}")
    models = make_models(scenario)
    systems = [int(_length(chance, SYSTEM)) for _ in range(SYSTEMS * len(models))]
    weights = list(accumulate(asked(scenario)))
    found: list[Request] = []
    for number, start in enumerate(_starts(chance, scenario, rate(scenario) / TURNS)):
        rank = chance.choices(range(len(models)), cum_weights=weights)[0]
        system = rank * SYSTEMS + min(int(chance.expovariate(0.5)), SYSTEMS - 1)
        found += _conversation(chance, models[rank], number, start, system, systems[system], scenario.seconds)
    found.sort()
    return found


def rate(scenario: Scenario) -> float:
    """Requests/s that keep the scenario's part of the slots at work."""
    history = SYSTEM[0] + (TURNS - 1) * (_mean(MESSAGE) + _mean(ANSWER))
    tokens = _mean(ANSWER) + (history + _mean(MESSAGE)) * (1 - CACHED) / PROMPT_FACTOR
    seconds = tokens * token_seconds(scenario)
    return scenario.load * scenario.nodes * scenario.copies * scenario.slots / seconds


def _starts(chance: random.Random, scenario: Scenario, mean: float) -> Iterator[float]:
    now = -BEFORE
    while (now := now + chance.expovariate(mean * (1 + WAVE))) < scenario.seconds:
        height = 1 - WAVE * math.cos(2 * math.pi * now / scenario.seconds)
        if chance.random() * (1 + WAVE) < height:
            yield now


def _conversation(
    chance: random.Random, model: Model, number: int, start: float, system: int, system_length: int, end: float
) -> Iterator[Request]:
    now, history = start, system_length
    while True:
        message, answer = int(_length(chance, MESSAGE)), int(_length(chance, ANSWER))
        prompt = history + message
        if now >= end or prompt + answer > CONTEXT:
            return
        if now >= 0:
            yield Request(now, model.id, number, system, system_length, history, prompt, answer)
        if chance.random() < 1 / TURNS:
            return
        history = prompt + answer
        now += answer / READING + _length(chance, PAUSE)


def _length(chance: random.Random, shape: Sequence[float]) -> float:
    return 1 + chance.lognormvariate(math.log(shape[0]), shape[1])


def _mean(shape: Sequence[float]) -> float:
    return shape[0] * math.exp(shape[1] ** 2 / 2)
