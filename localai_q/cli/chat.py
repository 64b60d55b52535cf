"""`localai-q chat`: talk to a model in the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from localai_q.cli.client import Api, connect
from localai_q.cli.show import prose
from localai_q.errors import LocalAIError, NotFound


def chat(
    prompt: Annotated[str, typer.Argument(help="Ask this and end; without it, talk until Ctrl-D.")] = "",
    model: Annotated[str, typer.Option(help="The model. Default: the cluster's, or the first that there is.")] = "",
    system: Annotated[str, typer.Option(help="What the model is told before you speak.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="How long an answer may be.")] = 512,
) -> None:
    """Talk to a model. Ctrl-C ends an answer, Ctrl-D the talk.

    Examples:

        localai-q chat

        localai-q chat "Name three rivers." --model smollm2-135m-instruct
    """
    api = connect()
    name = model or _first_model(api)
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    if prompt:
        _say(api, name, [*messages, {"role": "user", "content": prompt}], max_tokens)
        return
    print(f"Talking to {name}. Ctrl-C ends an answer, Ctrl-D the talk.")
    while (text := _ask()) is not None:
        if text.strip():
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": _say(api, name, messages, max_tokens)})


def _ask() -> str | None:
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def _say(api: Api, model: str, messages: list[dict[str, str]], max_tokens: int) -> str:
    """Print the answer as it comes; what was said before a Ctrl-C is kept, as the model has said it."""
    said = ""
    try:
        for piece in answer(api, model, messages, max_tokens):
            said += piece
            print(prose(piece), end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()
    return said


def answer(api: Api, model: str, messages: list[dict[str, str]], max_tokens: int) -> Iterator[str]:
    """The pieces of the model's answer.

    Raises:
        LocalAIError: the API refused, or the generation failed.
    """
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True}
    with api.errors(), api.http.stream("POST", "/v1/chat/completions", json=body) as response:
        api.check(response)
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise LocalAIError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                yield choice["delta"].get("content") or ""


def _first_model(api: Api) -> str:
    found = api.call("GET", "/v1/models")["data"]
    if not found:
        raise NotFound("there is no model yet: localai-q models add NAME --file my.gguf")
    return str(found[0]["id"])
