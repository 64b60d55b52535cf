"""Which worker of gunicorn and which pool of Celery: `python -m bench.choices`.

Measures the alternatives under this project's rules, with two tiny applications on the embedded Valkey. Pools: does a
worker of four slots take exactly four messages, how long does a task of 50 ms take when the queue is full (12.5 ms is
ideal), what happens at SIGTERM. Workers of gunicorn: what a token costs and a stream holds at 200 streams, what happens
at SIGTERM and SIGQUIT. (gunicorn's sync worker is out: one stream is all that it serves at once.)

The decision and a table: docs/decisions/0007-worker-class-and-pool-by-measurement.md
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import redis
from celery import Celery

from bench.cluster import end_on_sigterm, undisturbed
from bench.tiny import CHANNEL
from localai_q import ports
from localai_q.embedded.valkey import Valkey
from localai_q.processes import has_ended, kill_group, spawn, tail

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SLOTS, TASKS, NAP = 4, 80, 0.050  # seconds
LONGEST = 10.0  # seconds for which a pool that stalls is watched
START = 30.0  # seconds that anything may take to start
LONG_NAP = 2.0  # seconds, of the tasks that a SIGTERM meets
STREAMS, PER_SECOND, SECONDS = 200, 5, 6.0  # tokens a second of each stream
GRACE = 3  # seconds that gunicorn gives its streams
POOLS = {
    "threads, early ack, no prefetch, wake hook": ("threads", "early", "off", "1"),
    "the same without the hook": ("threads", "early", "off", ""),
    "threads, late ack, prefetch 1": ("threads", "late", "1", ""),
    "threads, early ack, prefetch 1": ("threads", "early", "1", ""),
    "prefork, late ack, prefetch 1": ("prefork", "late", "1", ""),
    "gevent, late ack, prefetch 1": ("gevent", "late", "1", ""),
}
CLASSES = {"gevent": ["--worker-connections", "1000"], "gthread": ["--threads", str(STREAMS + 20)]}

Process = subprocess.Popen[bytes]


class Bench:
    """A folder, a Valkey, and what was started beside it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.valkey = Valkey(home, port=ports.choose(), password="bench")
        self.valkey.start()
        self.valkey.wait_ready()
        self.redis = redis.Redis.from_url(self.valkey.url)

    def start(self, argv: list[str], **settings: str) -> Process:
        env = {"PATH": f"{BIN}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "BENCH_BROKER": self.valkey.url, **settings}
        return spawn(argv, env=env, log=self.home / "log", cwd=self.home)

    def until(self, probe: Any, seconds: float, what: str) -> bool:
        """Whether the probe came true in time; raises if `what` had to happen."""
        deadline = time.monotonic() + seconds
        while not probe():
            if time.monotonic() > deadline:
                if what:
                    raise RuntimeError(f"{what}: not within {seconds:.0f} s\n{tail(self.home / 'log')}")
                return False
            time.sleep(0.005)
        return True


@contextmanager
def benching() -> Iterator[Bench]:
    """A bench that nothing is left of when the block ends."""
    end_on_sigterm()
    home = Path(tempfile.mkdtemp(prefix="lqchoice"))
    bench = Bench(home)
    try:
        yield bench
    finally:
        with undisturbed():
            bench.valkey.stop(2.0)
            shutil.rmtree(home, ignore_errors=True)


def family(process: Process) -> list[psutil.Process]:
    """The process and its children."""
    try:
        main = psutil.Process(process.pid)
        return [main, *main.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def spent(processes: list[psutil.Process]) -> float:
    """Seconds of processor time so far."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def end(processes: list[psutil.Process], process: Process) -> None:
    """Kill all of them."""
    for each in processes:
        with suppress(psutil.Error):
            each.kill()
    kill_group(process)


@contextmanager
def worker(bench: Bench, pool: tuple[str, str, str, str], naps: int, seconds: float) -> Iterator[Process]:
    """A worker before a queue that is full already."""
    bench.redis.flushall()
    sender = Celery("sender", broker=bench.valkey.url)
    for _ in range(naps):
        sender.send_task("nap", (seconds,))
    kind, ack, prefetch, hook = pool
    argv = [str(BIN / "celery"), "-A", "bench.tiny", "worker", "-P", kind, "-c", str(SLOTS), "--without-gossip",
            "--without-mingle"]  # fmt: skip
    process = bench.start(argv, BENCH_ACK=ack, BENCH_PREFETCH=prefetch, BENCH_HOOK=hook)
    try:
        bench.until(lambda: bench.redis.llen("begun"), START, "a first task")
        yield process
    finally:
        end(family(process), process)


def measure_pool(bench: Bench, pool: tuple[str, str, str, str]) -> dict[str, Any]:
    """Saturation, then a SIGTERM."""
    most, began = 0, time.monotonic()
    with worker(bench, pool, TASKS, NAP) as process:
        while time.monotonic() - began < LONGEST:
            queued, done = bench.redis.pipeline().llen("celery").llen("done").execute()
            most = max(most, TASKS - queued - done)
            if done == TASKS:
                break
            time.sleep(0.002)
        processes = family(process)
        first, last = float(bench.redis.lindex("begun", 0)), float(bench.redis.lindex("done", -1))
        found = {"taken_at_most": most, "ms_per_task": 1000 * (last - first) / done, "done": done,
                 "mb": sum(each.memory_info().rss for each in processes) / 1e6}  # fmt: skip
    with worker(bench, pool, 3 * SLOTS, LONG_NAP) as process:
        bench.until(lambda: bench.redis.llen("begun") >= SLOTS, 15, "")
        began_before = bench.redis.llen("begun")
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        ended = bench.until(lambda: has_ended(process), 3 * LONG_NAP, "")
        return {
            **found,
            "sigterm": {
                "ended_after_s": time.monotonic() - began if ended else None,
                "had_begun": began_before,
                "done": bench.redis.llen("done"),
                "queued": bench.redis.llen("celery"),
                "unacked": bench.redis.hlen("unacked"),
            },
        }


class Reader:
    """Holds streams open and reads them, in a thread."""

    def __init__(self, port: int) -> None:
        self.tokens = 0
        self.open = 0
        self._selector = selectors.DefaultSelector()
        for number in range(STREAMS):
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
            connection.sendall(f"GET /{number} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
            self._selector.register(connection, selectors.EVENT_READ)
            self.open += 1
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while self.open:
            for key, _ in self._selector.select(1.0):
                data = b""
                with suppress(OSError):
                    data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                self.tokens += data.count(b"data: ")
                if not data:
                    self.open -= 1
                    self._selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]


@contextmanager
def web(bench: Bench, kind: str) -> Iterator[tuple[Process, Reader, float]]:
    """gunicorn with one worker and all its streams open, and the bytes that it held before."""
    bench.redis.flushall()
    port = ports.choose()
    argv = [str(BIN / "gunicorn"), "bench.tiny:serve", "-b", f"127.0.0.1:{port}", "-w", "1", "-k", kind,
            "--graceful-timeout", str(GRACE), "--no-control-socket", *CLASSES[kind]]  # fmt: skip
    process = bench.start(argv)
    everyone: list[psutil.Process] = []
    try:
        bench.until(lambda: not ports.is_free("127.0.0.1", port) and len(family(process)) > 1, START, "gunicorn")
        time.sleep(1.5)
        before = _rss(process)
        reader = Reader(port)
        bench.until(lambda: reader.tokens >= STREAMS, START, "all streams")
        everyone = family(process)
        yield process, reader, before
    finally:
        end(everyone or family(process), process)


def _rss(process: Process) -> float:
    return float(sum(each.memory_info().rss for each in family(process)[1:]))


def measure_class(bench: Bench, kind: str) -> dict[str, Any]:
    """Tokens, then a SIGTERM; a SIGQUIT to another one."""
    with web(bench, kind) as (process, reader, before):
        held = _rss(process) - before
        workers = family(process)[1:]
        cpu, said, until = spent(workers), reader.tokens, time.monotonic() + SECONDS
        while time.monotonic() < until:
            pipe = bench.redis.pipeline(transaction=False)
            for number in range(STREAMS):
                pipe.publish(CHANNEL, f"{number} token")
            pipe.execute()
            time.sleep(1 / PER_SECOND)
        time.sleep(0.3)
        found: dict[str, Any] = {
            "us_per_token": 1e6 * (spent(workers) - cpu) / (reader.tokens - said),
            "kb_per_stream": held / 1e3 / STREAMS,
            "threads": max(each.num_threads() for each in workers),
        }
        found["SIGTERM"] = _stop(bench, process, reader, signal.SIGTERM)
    with web(bench, kind) as (process, reader, _):
        return {**found, "SIGQUIT": _stop(bench, process, reader, signal.SIGQUIT)}


def _stop(bench: Bench, process: Process, reader: Reader, how: signal.Signals) -> dict[str, Any]:
    everyone = family(process)
    process.send_signal(how)
    began = time.monotonic()
    ended = bench.until(lambda: has_ended(process), GRACE + 5.0, "")
    took = time.monotonic() - began
    time.sleep(1.0)
    return {
        "master_ended_after_s": took if ended else None,
        "workers_left": sum(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in everyone[1:]),
        "streams_left": reader.open,
        "finally_ran": bench.redis.llen("finally"),
    }


def show(pools: dict[str, Any], classes: dict[str, Any]) -> None:
    """Print both as tables in Markdown."""
    print(f"| pool, {SLOTS} slots | took at most | ms per 50 ms task (ideal {1000 * NAP / SLOTS:.1f}) | MB | "
          f"at SIGTERM, with {SLOTS} tasks of {LONG_NAP:g} s under way |\n|---|---|---|---|---|")  # fmt: skip
    for name, each in pools.items():
        term = each["sigterm"]
        after = "has not ended" if term["ended_after_s"] is None else f"ends after {term['ended_after_s']:.1f} s"
        stalled = "" if each["done"] == TASKS else f" ({each['done']} of {TASKS} done in {LONGEST:.0f} s)"
        print(f"| {name} | {each['taken_at_most']} | {each['ms_per_task']:.1f}{stalled} | {each['mb']:.0f} | {after}: "
              f"{term['done']} done, {term['queued']} queued, {term['unacked']} unacknowledged |")  # fmt: skip
    print(f"\n| gunicorn worker, {STREAMS} streams | µs per token | KB per stream | threads | at SIGTERM | "
          "at SIGQUIT |\n|---|---|---|---|---|---|")  # fmt: skip
    for name, each in classes.items():
        print(f"| {name} | {each['us_per_token']:.0f} | {each['kb_per_stream']:.0f} | {each['threads']} | "
              f"{_told(each['SIGTERM'])} | {_told(each['SIGQUIT'])} |")  # fmt: skip


def _told(stop: dict[str, Any]) -> str:
    took = stop["master_ended_after_s"]
    after = "has not ended" if took is None else f"ends after {took:.1f} s"
    return f"{after}; workers left {stop['workers_left']}; `finally` ran for {stop['finally_ran']} of {STREAMS}"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    options = parser.parse_args()
    os.chdir(ROOT)
    with benching() as bench:
        pools = {name: measure_pool(bench, pool) for name, pool in POOLS.items()}
        classes = {kind: measure_class(bench, kind) for kind in CLASSES}
    show(pools, classes)
    if options.json:
        options.json.write_text(json.dumps({"pools": pools, "gunicorn": classes}, indent=2) + "\n")


if __name__ == "__main__":
    main()
