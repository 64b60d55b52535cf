"""What a token costs on its way from the backend to the client, in processor time of each process that it passes.

Beside it, in the same run: the bare engine (the echo backend asked over gRPC, as a replica asks it) and a plain loop of
Redis' PUBLISH and one subscriber, a token a message.
"""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import redis

from bench.cluster import Cluster
from bench.sockets import Helper, request_for
from localai_q import ports
from localai_q.embedded.valkey import Valkey
from localai_q.processes import kill_group, spawn

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("backend", "replica", "valkey", "web", "publisher")  # what a token passes; the rest is "others"
PAYLOAD = '{"k":"d","t":" 1234","n":1}'  # of a token in the plain loop, about as long as ours
WARM = 200  # tokens of each stream before anything is measured
SLOTS = 192
CASES = (("flat out", 8, 0.0), ("paced", 64, 25.0), ("crowded", SLOTS, 25.0))  # title, streams, ms between two tokens


def cpu(processes: Sequence[psutil.Process]) -> float:
    """Seconds of processor time so far."""
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def measure(cluster: Cluster, seconds: float) -> list[dict[str, Any]]:
    """Both ways and the loop, flat out and paced."""
    cluster.add_model("echo", backend="echo", slots=SLOTS)
    found = []
    for title, streams, delay in CASES:
        with Helper(cluster.host, cluster.port) as client:
            ours = _through_cluster(cluster, client, streams, delay, seconds)
        found += [{"case": title, "way": "cluster", **ours},
                  {"case": title, "way": "bare engine", **_bare_engine(streams, delay, seconds)}]  # fmt: skip
    return [*found, {"case": "flat out", "way": "plain PUBLISH", **_plain_loop(seconds)}]


def _order(tokens: int, delay: float) -> str:
    return f"[[echo tokens={tokens} delay_ms={delay:g}]]"


def _through_cluster(cluster: Cluster, client: Helper, streams: int, delay: float, seconds: float) -> dict[str, Any]:
    warm = client.drink(request_for(cluster, "echo", _order(WARM, delay)), streams)[0]
    tokens = max(int(WARM * seconds / warm), WARM)
    processes = {**cluster.processes(), "client": [psutil.Process(client.pid)]}
    processes.pop("up")
    before = {role: cpu(each) for role, each in processes.items()}
    took, events = client.drink(request_for(cluster, "echo", _order(tokens, delay)), streams)
    spent = {role: cpu(each) - before[role] for role, each in processes.items()}
    return _result(spent, streams, tokens, took, events)


def _result(spent: Mapping[str, float], streams: int, tokens: int, took: float, events: int) -> dict[str, Any]:
    every = streams * tokens
    micros = {role: 1e6 * seconds / every for role, seconds in spent.items()}
    client = micros.pop("client")
    return {
        "streams": streams,
        "tokens_per_s": every / took,
        "tokens_per_event": every / max(events, 1),
        "us_per_token": {role: micros[role] for role in micros if role in SHOWN},
        "us_others": sum(value for role, value in micros.items() if role not in SHOWN),
        "us_all": sum(micros.values()),
        "us_client": client,
    }


@contextmanager
def _engine(slots: int) -> Iterator[tuple[psutil.Process, str]]:
    """The echo backend alone: its process and its address."""
    folder = Path(tempfile.mkdtemp(prefix="lqecho"))
    address = f"unix:{folder / 'echo.sock'}"
    server = str(ROOT / "workers" / "backends" / "echo" / "server.py")
    argv = [sys.executable, server, "--addr", address, "--threads", str(slots + 16)]
    process = spawn(argv, env={"PATH": "/usr/bin:/bin"}, log=folder / "log")
    try:
        yield psutil.Process(process.pid), address
    finally:
        kill_group(process)
        shutil.rmtree(folder, ignore_errors=True)


def _bare_engine(streams: int, delay: float, seconds: float) -> dict[str, Any]:
    with _engine(streams) as (server, address), _child(_engine_client, address, streams) as (client, pipe):
        warm = _order_to(pipe, WARM, delay)
        tokens = max(int(WARM * seconds / warm), WARM)
        before = cpu([server]), cpu([client])
        took = _order_to(pipe, tokens, delay)
        spent = {"backend": cpu([server]) - before[0], "client": cpu([client]) - before[1]}
    return _result(spent, streams, tokens, took, streams * tokens)


def _order_to(pipe: Any, *order: Any) -> float:
    pipe.send(order)
    answer = pipe.recv()
    if isinstance(answer, Exception):
        raise answer
    return float(answer)


def _engine_client(pipe: Any, address: str, streams: int) -> None:
    """Asks the bare engine in as many threads as there are streams; answers each order with the seconds it took."""
    import grpc

    from localai_q.proto import backend_pb2, backend_pb2_grpc
    from workers.replica.options import predict_options

    stub = backend_pb2_grpc.BackendStub(grpc.insecure_channel(address))
    loaded = backend_pb2.ModelOptions(Model="echo", Options=[f"parallel:{streams}"])
    stub.LoadModel(loaded, wait_for_ready=True, timeout=30)
    while True:
        tokens, delay = pipe.recv()
        body = {"messages": [{"role": "user", "content": _order(tokens, delay)}]}
        options = predict_options("echo", "chat", body, "bench")

        def ask(options: Any = options) -> None:
            for _ in stub.PredictStream(options):
                pass

        threads = [threading.Thread(target=ask) for _ in range(streams)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pipe.send(time.perf_counter() - started)


def _plain_loop(seconds: float) -> dict[str, Any]:
    """One process publishes, one reads; the rate is the reader's."""
    folder = Path(tempfile.mkdtemp(prefix="lqloop"))
    valkey = Valkey(folder, port=ports.choose(), password="plain")
    server = valkey.start()
    try:
        valkey.wait_ready()
        with _child(_subscriber, valkey.url) as (reader, heard), _child(_publisher, valkey.url) as (writer, pipe):
            heard.recv()
            processes = {"publisher": [writer], "valkey": [psutil.Process(server.pid)], "client": [reader]}
            before = {role: cpu(each) for role, each in processes.items()}
            pipe.send(seconds)
            tokens, took = pipe.recv()[0], float(heard.recv())
            spent = {role: cpu(each) - before[role] for role, each in processes.items()}
    finally:
        valkey.stop(2.0)
        shutil.rmtree(folder, ignore_errors=True)
    return _result(spent, 1, tokens, took, tokens)


def _publisher(pipe: Any, url: str) -> None:
    client = redis.Redis.from_url(url)
    until, tokens = time.perf_counter() + pipe.recv(), 0
    while time.perf_counter() < until:
        for _ in range(100):
            client.publish("tokens", PAYLOAD)
        tokens += 100
    client.publish("tokens", "end")
    pipe.send((tokens,))
    pipe.recv()


def _subscriber(pipe: Any, url: str) -> None:
    pubsub = redis.Redis.from_url(url, decode_responses=True).pubsub()
    pubsub.subscribe("tokens")
    started = 0.0
    for message in pubsub.listen():
        if message["type"] == "subscribe":
            pipe.send("ready")
        started = started or (time.perf_counter() if message["type"] == "message" else 0.0)
        if message["data"] == "end":
            pipe.send(time.perf_counter() - started)


@contextmanager
def _child(target: Any, *args: Any) -> Iterator[tuple[psutil.Process, Any]]:
    """A process of this module's own that talks over a pipe."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()  # so that the child's end is heard
    try:
        yield psutil.Process(process.pid), ours
    finally:
        process.kill()
        process.join(5)


def show(results: list[dict[str, Any]]) -> None:
    """Print the results with their ratios to the bare engine."""
    bare = {each["case"]: each for each in results if each["way"] == "bare engine"}
    for each in results:
        parts = ", ".join(f"{role} {value:.0f}" for role, value in each["us_per_token"].items())
        if each["us_others"] >= 0.5:
            parts += f", others {each['us_others']:.0f}"
        print(f"{each['case']}, {each['streams']} streams, {each['way']}: {each['tokens_per_s']:.0f} tokens/s, "
              f"{each['tokens_per_event']:.1f} tokens an event")  # fmt: skip
        print(f"    µs of processor time a token: {each['us_all']:.0f} ({parts}); the client's {each['us_client']:.0f}")
        base = bare[each["case"]]
        if each is not base:
            whole, theirs = (one["us_all"] + one["us_client"] for one in (each, base))
            print(f"    against the bare engine and its client: {each['tokens_per_s'] / base['tokens_per_s']:.2f} "
                  f"of the tokens/s, {whole / theirs:.2f} times the processor time a token")  # fmt: skip
