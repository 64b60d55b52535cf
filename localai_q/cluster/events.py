"""What a journal holds: the events that a job emits, from its first token to its end. Pure values.

A job's journal is a list of entries; an entry is one event as JSON, numbered `<attempt>-<index>` by the bus. The keys
are short because there is one entry per token or few tokens. `localai_q.bus` stores and announces entries; `api`
formats them for clients; `workers` makes them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

LARGEST = 1e18  # of any amount
ENDS = ("done", "failed", "cancelled")


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """A piece of one choice of a generation."""

    choice: int = 0
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()  # OpenAI's `delta.tool_calls` items
    logprobs: tuple[dict[str, Any], ...] = ()  # OpenAI's `logprobs.content` items
    tokens: int = 0  # how many tokens of the engine this piece stands for

    def joins(self, later: Delta) -> bool:
        """Whether `later` may be appended to this piece without a reader noticing."""
        return self.choice == later.choice and not self.tool_calls and not later.tool_calls

    def join(self, later: Delta) -> Delta:
        """Both pieces as one."""
        return Delta(
            choice=self.choice,
            text=self.text + later.text,
            reasoning=self.reasoning + later.reasoning,
            logprobs=self.logprobs + later.logprobs,
            tokens=self.tokens + later.tokens,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """One choice of a generation is complete."""

    choice: int = 0
    reason: str = "stop"  # stop | length | tool_calls | content_filter


@dataclass(frozen=True, kw_only=True, slots=True)
class Vector:
    """One embedding."""

    index: int
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a long job has come."""

    stage: str  # e.g. "downloading"
    done: float = 0.0
    total: float = 0.0  # 0: not known
    unit: str = ""  # "bytes", "packages", or nothing
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens that a generation used."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0  # prompt tokens that were found in the engine's cache

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt=self.prompt + other.prompt,
            completion=self.completion + other.completion,
            cached=self.cached + other.cached,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """The one end of a job."""

    state: str  # one of `ENDS`
    usage: Usage = field(default_factory=Usage)
    timings: dict[str, float] = field(default_factory=dict)  # seconds by phase
    error: dict[str, Any] | None = None  # `errors.to_record`, when it failed
    result: dict[str, Any] | None = None  # what a job that is not a generation leaves behind


Event = Delta | Finish | Vector | Progress | End


def encode(event: Event) -> str:
    """The event as compact JSON: `d` delta, `f` finish, `v` vector, `p` progress, `e` end."""
    match event:
        case Delta():
            body: dict[str, Any] = {"k": "d", "n": event.tokens}
            if event.choice:
                body["i"] = event.choice
            if event.text:
                body["t"] = event.text
            if event.reasoning:
                body["r"] = event.reasoning
            if event.tool_calls:
                body["c"] = event.tool_calls
            if event.logprobs:
                body["l"] = event.logprobs
        case Finish():
            body = {"k": "f", "i": event.choice, "r": event.reason}
        case Vector():
            body = {"k": "v", "i": event.index, "v": event.values}
        case Progress():
            body = {"k": "p", "s": event.stage, "d": event.done, "t": event.total, "u": event.unit, "n": event.note}
        case End():
            usage = [event.usage.prompt, event.usage.completion, event.usage.cached]
            body = {"k": "e", "s": event.state, "u": usage, "t": event.timings, "x": event.error, "r": event.result}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))


def decode(text: str | bytes) -> Event | None:
    """The event that `encode` wrote; None for a marker, which carries no event.

    A node may have written anything: what is no amount is 0.

    Raises:
        ValueError: it is no event.
    """
    try:
        return _decoded(text)
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"this is no event: {str(text)[:100]!r}") from error


def _decoded(text: str | bytes) -> Event | None:
    body = json.loads(text)
    match body.get("k"):
        case "d":
            return Delta(
                choice=body.get("i", 0),
                text=body.get("t", ""),
                reasoning=body.get("r", ""),
                tool_calls=tuple(body.get("c", ())),
                logprobs=tuple(body.get("l", ())),
                tokens=body.get("n", 0),
            )
        case "f":
            return Finish(choice=body["i"], reason=body["r"])
        case "v":
            return Vector(index=body["i"], values=tuple(body["v"]))
        case "p":
            return Progress(stage=str(body["s"]), done=_amount(body["d"]), total=_amount(body["t"]), unit=str(body["u"]),
                            note=str(body["n"]))  # fmt: skip
        case "e":
            prompt, completion, cached = body["u"]
            usage = Usage(prompt=prompt, completion=completion, cached=cached)
            timings = {name: _amount(seconds) for name, seconds in body["t"].items()}
            if body["s"] not in ENDS or not all(isinstance(part, dict | None) for part in (body["x"], body["r"])):
                raise ValueError("this is no end")
            return End(state=body["s"], usage=usage, timings=timings, error=body["x"], result=body["r"])
        case _:
            return None


def _amount(value: Any) -> float:
    return value if isinstance(value, int | float) and 0 <= value <= LARGEST else 0.0
