"""What a client asked a model for, once it was checked: the request that travels with a job. A pure value.

It owns the stored form of a request and how a request becomes one body for the engine per choice. `api.openai.schemas`
makes requests from what clients send and answers for their validity; `workers.replica` runs the bodies.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

Kind = Literal["chat", "completion", "embedding"]
Input = str | tuple[int, ...]  # a text, or the model's own token ids

# The engine takes 32 bits of a seed, and takes the highest value for "choose one".
SEEDS = 0xFFFF_FFFF


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One request of a client to one model, complete and valid.

    `body` is OpenAI-shaped and holds what the engine needs and nothing else: messages (chat), sampling, tools,
    response format. Never the model, `n`, streaming, or a field without effect on the output. The prompts of a
    completion and the texts to embed stand in `inputs` instead.
    """

    kind: Kind
    model: str  # the name that the client used
    body: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[Input, ...] = ()  # completion: prompts; embedding: texts; chat: empty
    n: int = 1  # choices for each prompt
    stream: bool = False
    background: bool = False  # goes on when its client has left
    include_usage: bool = False  # in a stream: whether a last chunk tells the usage
    logprobs: int | None = None  # alternatives to show for each token; None: no log probabilities at all
    echo: bool = False  # completion: whether the answer begins with the prompt
    encoding_format: Literal["float", "base64"] = "float"  # embedding: how vectors are written

    def bodies(self) -> list[dict[str, Any]]:
        """The engine's body of every choice, in the order of OpenAI's choice index: all of the first prompt first.

        A choice after the first of its prompt gets the next seed, where one is given. The bodies share their parts:
        whoever changes one copies it first.
        """
        parts: list[dict[str, Any]] = [{}]
        if self.kind == "completion":
            parts = [{"prompt": _plain(prompt)} for prompt in self.inputs]
        elif self.kind == "embedding":
            parts = [{"input": _plain(text)} for text in self.inputs]
        return [{**self.body, **part, **self._seed(choice)} for part in parts for choice in range(self.n)]

    @property
    def count(self) -> int:
        """How many choices (or vectors) the answer has."""
        return self.n * (1 if self.kind == "chat" else len(self.inputs))

    def prompt_of(self, choice: int) -> Input:
        """The prompt that the choice of this index continues; empty for a chat."""
        return self.inputs[choice // self.n] if self.inputs else ""

    def outline(self) -> GenerationRequest:
        """What the form of the answer depends on, without what was asked: prompts only where the answer shows them."""
        return replace(self, body={}, inputs=self.inputs if self.echo else ("",) * len(self.inputs))

    def to_json(self) -> dict[str, Any]:
        """The request as plain JSON values, which `from_json` reads. Shares its body with the request."""
        record = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {**record, "inputs": [_plain(value) for value in self.inputs]}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> GenerationRequest:
        """The request that `to_json` wrote. What a newer version has added is left out.

        Raises:
            ValueError: the record is no request.
        """
        if record.get("kind") not in get_args(Kind) or not isinstance(record.get("model"), str):
            raise ValueError("this is not a stored generation request")
        known = {entry.name: record[entry.name] for entry in fields(cls) if entry.name in record}
        inputs = tuple(tuple(value) if isinstance(value, list) else value for value in record.get("inputs", ()))
        return cls(**{**known, "inputs": inputs})

    def _seed(self, choice: int) -> dict[str, int]:
        seed = self.body.get("seed")
        return {} if seed is None or not choice else {"seed": (seed + choice) % SEEDS}


def _plain(value: Input) -> str | list[int]:
    return value if isinstance(value, str) else list(value)
