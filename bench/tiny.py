"""The two tiny applications that `bench.choices` measures: a Celery worker that naps, and a web process that streams.

What differs between two choices comes from the environment and the command line; the code is the same for all.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import redis
from celery import Celery

URL = os.environ.get("BENCH_BROKER", "")
CHANNEL = "web"

app = Celery("tiny", broker=URL)
app.conf.update(
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
    task_acks_late=os.environ.get("BENCH_ACK") == "late",
    worker_disable_prefetch=os.environ.get("BENCH_PREFETCH") == "off",
)
if os.environ.get("BENCH_HOOK"):
    from localai_q.bus import celery_guards

    celery_guards.install(app)

_clients: dict[int, redis.Redis] = {}


def _client() -> redis.Redis:
    """This process's client: a child that was forked must not share its parent's."""
    return _clients.setdefault(os.getpid(), redis.Redis.from_url(URL))


@app.task(name="nap")
def nap(seconds: float) -> None:
    """Hold a slot for so long, as a generation does, and note both ends."""
    _client().rpush("begun", time.time())
    time.sleep(seconds)
    _client().rpush("done", time.time())


_inboxes: dict[str, queue.Queue[str]] = {}
_listening = threading.Lock()


def _listen() -> None:
    """One connection for all streams of this process, as `localai_q.bus.journal` has it."""
    pubsub = redis.Redis.from_url(URL, decode_responses=True).pubsub(ignore_subscribe_messages=True)
    pubsub.subscribe(CHANNEL)
    for message in pubsub.listen():
        stream, _, text = message["data"].partition(" ")
        if stream in _inboxes:
            _inboxes[stream].put(text)


def _frames(stream: str) -> Iterator[bytes]:
    inbox: queue.Queue[str] = queue.Queue(maxsize=256)
    _inboxes[stream] = inbox
    try:
        yield b"data: hello\n\n"
        while True:
            try:
                yield f"data: {inbox.get(timeout=1.0)}\n\n".encode()
            except queue.Empty:
                continue
    finally:
        _inboxes.pop(stream, None)
        _client().rpush("finally", stream)


def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
    """A WSGI application: every path is a stream of that name."""
    if _listening.acquire(blocking=False):
        threading.Thread(target=_listen, daemon=True).start()
    start_response("200 OK", [("Content-Type", "text/event-stream")])
    return _frames(environ["PATH_INFO"].strip("/"))
