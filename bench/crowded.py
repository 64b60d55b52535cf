"""An engine beside other work: `python -m bench.crowded FILE.gguf [--rounds N]`.

The threads of llama.cpp wait for each other at every step of a token. How long they do that busily before they sleep
(`GOMP_SPINCOUNT`, turns) is what costs tokens where other processes want the cores. The ways take turns: libgomp's own,
what our backends set, and no busy waiting; alone, and beside a busy loop for each core and one more. Prints tokens/s as
medians, and each way's ratio to libgomp's own in the same round.
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

WAYS = {"libgomp's own": {"GOMP_SPINCOUNT": "300000"}, "our backends": {}, "asleep": {"GOMP_SPINCOUNT": "0"}}
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


def tokens_per_second(file: Path, environment: dict[str, str]) -> float:
    """Of one answer, by the engine's own clock."""
    body = {"prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
    ask = backend_pb2.PredictOptions(OpenAIBody=json.dumps(body), OpenAIKind="completion")
    with loaded(file, {"ContextSize": 512, "Threads": os.cpu_count()}, **environment) as (stub, _):
        stub.Predict(ask)  # warms it up
        answer = stub.Predict(ask)
    return float(answer.tokens / answer.timing_token_generation * 1000)


def main() -> None:
    """Print a line for each way, alone and in a crowd."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for others in (0, (os.cpu_count() or 1) + 1):
        rates: dict[str, list[float]] = {way: [] for way in WAYS}
        with crowd(others):
            for _ in range(options.rounds):
                for way, environment in WAYS.items():
                    rates[way].append(tokens_per_second(options.file, environment))
        own = rates["libgomp's own"]
        for way, found in rates.items():
            ratio = median(mine / base for mine, base in zip(found, own, strict=True))
            print(f"beside {others} busy loops, {way}: {median(found):.1f} tokens/s, {ratio:.2f} times libgomp's own")


if __name__ == "__main__":
    main()
