"""An engine beside other work: `python -m bench.crowded FILE.gguf [--rounds N] [--turns N ...]`.

The threads of llama.cpp wait for each other at every step of a token. How long they do that busily before they sleep
(`GOMP_SPINCOUNT`, turns) is what costs tokens where other processes want the cores. Asks in turns with libgomp's own
300,000, what our backends set, and others; alone, and beside a busy loop for each core and one more. Prints tokens/s as
medians, and their ratio to the first one's in the same round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from bench.engine import loaded
from localai_q.proto import backend_pb2

TURNS = (300_000, 10_000, 3_000, 1_000, 0)
TOKENS = 48


def work() -> None:
    """Something else that needs a core."""
    while True:
        pass


@contextmanager
def crowd(size: int) -> Iterator[None]:
    """So many busy loops."""
    others = [multiprocessing.Process(target=work, daemon=True) for _ in range(size)]
    for other in others:
        other.start()
    yield
    for other in others:
        other.kill()
        other.join()


def tokens_per_second(file: Path, turns: int) -> float:
    """Of one answer, by the engine's own clock."""
    body = {"prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
    ask = backend_pb2.PredictOptions(OpenAIBody=json.dumps(body), OpenAIKind="completion")
    with loaded(file, {"ContextSize": 512, "Threads": os.cpu_count()}, GOMP_SPINCOUNT=str(turns)) as (stub, _):
        stub.Predict(ask)  # warms it up
        answer = stub.Predict(ask)
    return float(answer.tokens / answer.timing_token_generation * 1000)


def main() -> None:
    """Print a line for each number of turns, alone and in a crowd."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, nargs="+", default=TURNS, help="of busy waiting")
    options = parser.parse_args()
    for others in (0, (os.cpu_count() or 1) + 1):
        rates: dict[int, list[float]] = {turns: [] for turns in options.turns}
        with crowd(others):
            for _ in range(options.rounds):
                for turns, found in rates.items():
                    found.append(tokens_per_second(options.file, turns))
        first = rates[options.turns[0]]
        for turns, found in rates.items():
            ratio = median(mine / base for mine, base in zip(found, first, strict=True))
            print(
                f"beside {others} busy loops, {turns} turns: {median(found):.1f} tokens/s, {ratio:.2f} times the first"
            )


if __name__ == "__main__":
    main()
