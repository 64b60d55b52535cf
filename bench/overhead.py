"""What the cluster costs beside its engine: `python -m bench.overhead`.

In one run and in turns: the bare engine (xllamacpp called in its own process, no HTTP) and the whole cluster (HTTP,
queue, worker, gRPC backend), with the same model, settings and prompts, at 1 and at 8 streams. Prints tokens/s, their
ratio, and the time to first token with what the cluster adds. Then, with the echo backend, which costs next to nothing,
requests/s of one web process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.cluster import Cluster, running
from localai_q.gallery import catalog

SLOTS = 8
CONTEXT = 1024
TOKENS = 48
PROMPTS = [f"Write a short story about {subject}." for subject in (
    "a lighthouse", "an old clock", "the sea", "a fox", "winter", "a train", "two friends", "a garden")]  # fmt: skip

Ask = Callable[[int, dict[str, Any]], tuple[float, int]]  # worker, body -> (seconds to first token, tokens)


@dataclass
class Round:
    """What one way gave at one number of streams."""

    firsts: list[float] = field(default_factory=list)  # seconds
    rates: list[float] = field(default_factory=list)  # tokens/s of all streams together


def body(prompt: str, tokens: int = TOKENS) -> dict[str, Any]:
    """A request that always gives as many tokens, and the same ones."""
    return {"model": "bench", "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0,
            "seed": 1, "ignore_eos": True, "cache_prompt": False}  # fmt: skip


def measure(ask: Ask, streams: int, each: int, into: Round) -> None:
    """`streams` workers ask `each` times, all at once."""
    firsts: list[float] = []
    counts: list[int] = []
    barrier = threading.Barrier(streams + 1)

    def work(worker: int) -> None:
        barrier.wait()
        for turn in range(each):
            first, tokens = ask(worker, body(PROMPTS[(worker + turn) % len(PROMPTS)]))
            firsts.append(first)
            counts.append(tokens)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(streams)]
    for thread in threads:
        thread.start()
    barrier.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    into.rates.append(sum(counts) / (time.perf_counter() - started))
    into.firsts += firsts


def engine_process(path: str, threads: int, pipe: Any) -> None:
    """The bare engine: answers `(streams, each)` with a `Round`."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_parallel, params.n_ctx, params.verbosity = SLOTS, CONTEXT * SLOTS, 0
    params.n_batch = params.n_ubatch = 256  # as the backend has it on a CPU
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def ask(worker: int, asked: dict[str, Any]) -> tuple[float, int]:
        started = time.perf_counter()
        first, tokens = 0.0, 0

        def chunk(piece: Any) -> bool:
            nonlocal first, tokens
            if piece and not first and piece.get("choices") and piece["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - started
            if piece and piece.get("usage"):
                tokens = piece["usage"]["completion_tokens"]
            return False

        server.handle_chat_completions({**asked, "stream": True, "stream_options": {"include_usage": True}}, chunk)
        return first, tokens

    while order := pipe.recv():
        found = Round()
        measure(ask, *order, found)
        pipe.send(found)


def cluster_asker(cluster: Cluster) -> Ask:
    """Asks over one kept connection for each worker."""
    connections = {worker: cluster.connection() for worker in range(64)}
    return lambda worker, asked: cluster.chat(connections[worker], asked)


def compare(cluster: Cluster, pipe: Any, streams: int, each: int, rounds: int) -> dict[str, Any]:
    """Both ways in turns."""
    ask = cluster_asker(cluster)
    engine, whole = Round(), Round()
    for turn in range(rounds + 1):
        pipe.send((streams, each))
        bare: Round = pipe.recv()
        mine = Round()
        measure(ask, streams, each, mine)
        if turn:  # the first turn warms both up
            for target, found in ((engine, bare), (whole, mine)):
                target.firsts += found.firsts
                target.rates += found.rates
    ratios = [mine / bare for mine, bare in zip(whole.rates, engine.rates, strict=True)]
    return {
        "streams": streams,
        "engine_tokens_per_s": statistics.median(engine.rates),
        "cluster_tokens_per_s": statistics.median(whole.rates),
        "ratio_median": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "engine_ttft_ms": quantiles(engine.firsts),
        "cluster_ttft_ms": quantiles(whole.firsts),
        "added_ttft_p50_ms": 1000 * (statistics.median(whole.firsts) - statistics.median(engine.firsts)),
    }


def requests_per_second(cluster: Cluster, streams: int, seconds: float) -> dict[str, Any]:
    """Whole requests against the echo backend: what the queue and the web process can carry."""
    ask = cluster_asker(cluster)
    asked = {"model": "echo", "messages": [{"role": "user", "content": "one two three four five six seven eight"}]}
    until = time.perf_counter() + seconds
    firsts: list[float] = []

    def work(worker: int) -> None:
        while time.perf_counter() < until:
            firsts.append(ask(worker, asked)[0])

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"streams": streams, "requests_per_s": len(firsts) / seconds, "ttft_ms": quantiles(firsts)}


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    return {
        "p50": 1000 * statistics.median(ordered),
        "p99": 1000 * ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)],
    }


def model_file(cluster: Cluster, sha256: str) -> str:
    """Where the cluster's node keeps the model, for the bare engine to load the same file."""
    return str(next(Path(cluster.home).glob(f"worker/nodes/*/models/blobs/{sha256}")))


def show(result: dict[str, Any]) -> None:
    """A result as lines to read."""
    print(f"{result['streams']} streams: engine {result['engine_tokens_per_s']:.1f} tokens/s, cluster "
          f"{result['cluster_tokens_per_s']:.1f} tokens/s, ratio {result['ratio_median']:.3f} "
          f"({result['ratio_range'][0]:.3f} to {result['ratio_range'][1]:.3f})")  # fmt: skip
    for way in ("engine", "cluster"):
        found = result[f"{way}_ttft_ms"]
        print(f"    time to first token, {way}: p50 {found['p50']:.1f} ms, p99 {found['p99']:.1f} ms")
    print(f"    added to the median: {result['added_ttft_p50_ms']:.1f} ms")


def against_engine(cluster: Cluster, threads: int, rounds: int) -> list[dict[str, Any]]:
    """The cluster against the bare engine, each with so many threads."""
    entry = catalog.default_model()
    cluster.add_model("bench", source=entry.source, sha256=entry.sha256, slots=SLOTS, context_size=CONTEXT,
                      threads=threads)  # fmt: skip
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    path = model_file(cluster, entry.sha256)
    engine = context.Process(target=engine_process, args=(path, threads, there), daemon=True)
    engine.start()
    found = []
    print(f"engine with {threads} threads on {multiprocessing.cpu_count()} processors")
    for streams, each in ((1, 6), (8, 1)):
        found.append({"threads": threads, **compare(cluster, here, streams, each, rounds)})
        show(found[-1])
    here.send(None)
    engine.join(10)
    cluster.call("DELETE", "/api/models/bench")
    return found


def with_echo(cluster: Cluster, seconds: float) -> list[dict[str, Any]]:
    """Requests/s through one web process and one replica."""
    cluster.add_model("echo", backend="echo", slots=8)
    results = []
    for streams in (1, 8):
        found = requests_per_second(cluster, streams, seconds)
        print(f"echo, {streams} streams: {found['requests_per_s']:.0f} requests/s, time to first token p50 "
              f"{found['ttft_ms']['p50']:.1f} ms, p99 {found['ttft_ms']['p99']:.1f} ms")  # fmt: skip
        results.append(found)
    return results


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="counted turns of each way")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement with echo")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1], help="of the engine, one comparison for each")
    parser.add_argument("--json", action="store_true", help="print JSON too")
    options = parser.parse_args()
    with running() as cluster:
        engine = [result for threads in options.threads for result in against_engine(cluster, threads, options.rounds)]
        results = {"engine": engine, "echo": with_echo(cluster, options.seconds)}
    if options.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
