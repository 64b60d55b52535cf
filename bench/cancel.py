"""How long after a client's word a job has let go of its slot: cancelled by DELETE, and by hanging up.

The end of a job is when its owner has written it and says so on Redis' channel `ends`: the engine's call has ended by
then. A second look asks the next in line: how long until it has its first token from the slot that was freed.
"""

from __future__ import annotations

import http.client
import json
import queue
import socket
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

from bench.cluster import Cluster

SLOTS = 64
RUNNING = "[[echo tokens=100000 delay_ms=50]]"
PAUSE = 0.05  # seconds between two cancellations
PATIENCE = 10.0


class Stream:
    """One open stream."""

    def __init__(self, cluster: Cluster, model: str) -> None:
        self._connection = cluster.connection()
        body = {"model": model, "messages": [{"role": "user", "content": RUNNING}], "stream": True}
        self._connection.request("POST", "/v1/chat/completions", json.dumps(body), cluster.headers())
        self._answer = self._connection.getresponse()
        self._socket: socket.socket = self._answer.fp.raw._sock  # type: ignore[attr-defined]
        self.job = self._answer.getheader("X-LocalAI-Job") or ""
        if self._answer.status != http.client.OK:
            raise RuntimeError(self._answer.read().decode())

    def hang_up(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._answer.close()
        self._connection.close()

    def tell_first(self, told: queue.SimpleQueue[tuple[float, Stream]]) -> None:
        """Say when the first token comes, and read on."""
        try:
            for line in self._answer:
                if b'"content":"0"' in line:
                    told.put((time.perf_counter(), self))
        except (OSError, http.client.HTTPException, ValueError, AttributeError):
            return


class Ends:
    """Hears that jobs have ended."""

    def __init__(self, cluster: Cluster) -> None:
        self._redis = cluster.redis()
        self._heard: queue.SimpleQueue[float] = queue.SimpleQueue()
        pubsub = self._redis.pubsub(ignore_subscribe_messages=True)
        pubsub.subscribe(ends=self._note)
        self._thread = pubsub.run_in_thread(sleep_time=0.2, daemon=True)

    def close(self) -> None:
        self._thread.stop()
        self._thread.join(2.0)

    def _note(self, message: Any) -> None:
        self._heard.put(time.perf_counter())

    def seconds(self, job: str, cancel: Callable[[], Any]) -> float:
        """From the cancellation to the end of the job."""
        began = time.perf_counter()
        cancel()
        while True:
            heard = self._heard.get(timeout=PATIENCE)
            if self._redis.hget(f"job:{job}", "state") == "ended":
                return heard - began


def measure(cluster: Cluster, number: int) -> dict[str, list[float]]:
    """Seconds of each cancellation, by what was cancelled and how."""
    cluster.add_model("busy", backend="echo", slots=SLOTS)
    cluster.add_model("one", backend="echo", slots=1)
    ends = Ends(cluster)
    first = Stream(cluster, "one")
    found = {}
    for state, model in (("running", "busy"), ("waiting", "one")):
        for how in ("DELETE", "hang up"):
            found[f"{state}, {how}"] = [_cancel(cluster, ends, each, how) for each in _open(cluster, model, number)]
    ends.close()
    found["slot taken again, DELETE"] = _taken_again(cluster, first, number)
    return found


def _open(cluster: Cluster, model: str, number: int) -> list[Stream]:
    """So many streams at once: those that wait are given their headers after two seconds."""
    made: list[Stream] = []
    threads = [threading.Thread(target=lambda: made.append(Stream(cluster, model))) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(made) < number:
        raise RuntimeError(f"{number - len(made)} streams were refused")
    return made


def _cancel(cluster: Cluster, ends: Ends, stream: Stream, how: str) -> float:
    time.sleep(PAUSE)
    if how == "hang up":
        return ends.seconds(stream.job, stream.hang_up)
    took = ends.seconds(stream.job, lambda: cluster.call("DELETE", f"/api/jobs/{stream.job}"))
    stream.hang_up()
    return took


def _taken_again(cluster: Cluster, running: Stream, number: int) -> list[float]:
    """From a DELETE of the job that runs to the first token of the next, on a model of one slot."""
    told: queue.SimpleQueue[tuple[float, Stream]] = queue.SimpleQueue()
    for stream in _open(cluster, "one", number):
        threading.Thread(target=stream.tell_first, args=(told,), daemon=True).start()
    found = []
    for _ in range(number):
        time.sleep(PAUSE)
        began = time.perf_counter()
        cluster.call("DELETE", f"/api/jobs/{running.job}")
        at, running = told.get(timeout=PATIENCE)
        found.append(at - began)
    cluster.call("DELETE", f"/api/jobs/{running.job}")
    return found


def show(found: dict[str, list[float]]) -> None:
    """Print median, 95th percentile and the worst of each, in milliseconds."""
    print("from the request to the end of the job:")
    for what, seconds in found.items():
        ordered = sorted(seconds)
        p95 = ordered[min(int(len(ordered) * 0.95), len(ordered) - 1)]
        print(f"    {what}: median {1000 * statistics.median(ordered):.1f} ms, p95 {1000 * p95:.1f} ms, worst "
              f"{1000 * ordered[-1]:.1f} ms ({len(ordered)} jobs)")  # fmt: skip
