"""How a generation goes on when the replica that began it is gone. Pure.

What an earlier attempt emitted was shown to the client, so it is neither sent again nor contradicted: the next attempt
asks the engine to go on from it. A request of which nobody saw anything starts anew.

An engine that continues evaluates the emitted text as a prompt, which rounds differently from generating it; so the
rest is what that engine gives for prompt and emitted text together, and can part from the uninterrupted answer where two
tokens are nearly equally likely.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from localai_q.cluster.events import Delta, Event, Finish
from localai_q.errors import GenerationFailed


@dataclass(frozen=True, kw_only=True)
class Said:
    """What earlier attempts emitted of one choice."""

    text: str = ""
    tokens: int = 0
    more_than_text: bool = False  # reasoning or tool calls, which no prompt can carry
    finished: bool = False


def said_so_far(events: Iterable[Event]) -> dict[int, Said]:
    """What a journal says was emitted, by choice."""
    found: dict[int, Said] = {}
    for event in events:
        if isinstance(event, Delta):
            before = found.get(event.choice, Said())
            found[event.choice] = replace(
                before,
                text=before.text + event.text,
                tokens=before.tokens + event.tokens,
                more_than_text=before.more_than_text or bool(event.reasoning or event.tool_calls),
            )
        elif isinstance(event, Finish):
            found[event.choice] = replace(found.get(event.choice, Said()), finished=True)
    return found


def continued(kind: str, body: dict[str, Any], said: Said) -> dict[str, Any]:
    """The engine's body that goes on from what was said.

    Raises:
        GenerationFailed: it cannot; the message says why.
    """
    why = _obstacle(kind, body, said)
    if why:
        raise GenerationFailed(f"The replica that produced this stream died, and it cannot be continued: {why}.")
    if kind == "chat":
        going_on = {**body, "messages": [*body["messages"], {"role": "assistant", "content": said.text}]}
    else:
        going_on = {**body, "prompt": body["prompt"] + said.text}
    if body.get("max_tokens") is not None:
        going_on["max_tokens"] = body["max_tokens"] - said.tokens
    return going_on


def exhausted(body: dict[str, Any], said: Said) -> bool:
    """Whether nothing may be added: the answer had as many tokens as were allowed."""
    most = body.get("max_tokens")
    return most is not None and said.tokens >= most


def _obstacle(kind: str, body: dict[str, Any], said: Said) -> str:
    if said.more_than_text:
        return "it had sent reasoning or tool calls"
    if body.get("grammar") or (body.get("response_format") or {}).get("type", "text") != "text":
        return "its output follows a grammar, whose place is lost"
    if kind == "chat" and body.get("tools"):
        return "it may call tools"
    if kind == "chat" and body["messages"][-1]["role"] == "assistant":
        return "it continued an answer already"
    if kind == "completion" and not isinstance(body["prompt"], str):
        return "its prompt is a list of tokens"
    return ""
