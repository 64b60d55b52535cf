"""The estimate of a model's memory beside what the real backend takes: `python -m bench.memory FILE.gguf`.

For each context and number of slots the backend loads the model and answers one prompt that fills most of its context.
RSS is that of the backend's process, so the estimate is compared without the prompt cache, which is off here, and
without the replica's own process.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from bench.engine import loaded
from localai_q.cluster.memory import PROMPT_CACHE, REPLICA, need
from localai_q.cluster.models import ModelConfig
from localai_q.gguf import read_facts
from localai_q.proto import backend_pb2

CASES = ((512, 1), (4096, 4), (8192, 4))  # context of one request, slots
MIB = 1 << 20


def measure(file: Path, config: ModelConfig) -> tuple[int, int]:
    """Bytes of RSS of the backend with this model: once it is loaded, and after a long prompt."""
    options = {"ContextSize": config.context_size, "CacheTypeKey": config.cache_type,
               "CacheTypeValue": config.cache_type, "Options": [f"parallel:{config.slots}", "cache_ram:0"]}  # fmt: skip
    with loaded(file, options) as (stub, pid):
        time.sleep(0.5)
        before = psutil.Process(pid).memory_info().rss
        _fill(stub, config.context_size)
        return before, psutil.Process(pid).memory_info().rss


def _fill(stub: Any, context_size: int) -> None:
    body = {"prompt": "word " * min(context_size - 64, 1500), "max_tokens": 8}
    for _ in stub.PredictStream(backend_pb2.PredictOptions(OpenAIBody=json.dumps(body), OpenAIKind="completion")):
        pass


def main() -> None:
    """Print the table."""
    file = Path(sys.argv[1])
    facts = read_facts(file)
    print(f"{file.name}: {facts}")
    print(
        f"{'context':>8} {'slots':>6} {'cache':>6} {'estimate':>9} {'loaded':>8} {'used':>8}  MiB, error of the estimate"
    )
    for cache_type in ("f16", "q8_0"):
        for context_size, slots in CASES:
            config = ModelConfig(context_size=context_size, slots=slots, cache_type=cache_type)  # type: ignore[arg-type]
            estimate = need(config, facts, 0)
            assert estimate is not None
            told = estimate.memory.ram - PROMPT_CACHE - REPLICA
            before, used = measure(file, config)
            print(f"{context_size:8} {slots:6} {cache_type:>6} {told // MIB:9} {before // MIB:8} {used // MIB:8}"
                  f"  {(told - used) / used:+.0%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
