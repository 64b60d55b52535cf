"""What a model adds to a request that does not say it: parameters, and a system prompt. Pure.

It is done in one place, before the request is routed, so that whoever routes, stores or runs it sees the whole of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from localai_q.cluster.models import ModelConfig
from localai_q.cluster.requests import SEEDS, GenerationRequest

COMPLETION_TOKENS = (
    16  # of a completion, where neither it nor its model says how many, as at OpenAI; a chat ends by itself
)


def with_defaults(request: GenerationRequest, config: ModelConfig) -> GenerationRequest:
    """The request with all that it leaves to its model."""
    if request.kind == "embedding":
        return request
    defaults: dict[str, Any] = config.parameters.model_dump(exclude_none=True)
    if "seed" in defaults:
        defaults["seed"] %= SEEDS
    if request.kind == "completion":
        defaults = {"max_tokens": COMPLETION_TOKENS, **defaults}
    body = {**defaults, **request.body}
    if request.kind == "chat" and config.system_prompt and not _has_system(body["messages"]):
        body["messages"] = [{"role": "system", "content": config.system_prompt}, *body["messages"]]
    return replace(request, body=body)


def _has_system(messages: list[dict[str, Any]]) -> bool:
    return any(message.get("role") == "system" for message in messages)
