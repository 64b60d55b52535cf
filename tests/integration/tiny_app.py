"""A Celery worker with the configuration of ours and tasks that leave marks in Redis.

Run as `celery -A tiny_app worker`. TINY_HOOK=0 leaves the wake hook out, TINY_SAFE=0 the checked transport,
TINY_EVENTS=0 the task events, which wake the worker's loop, too. TINY_CLOCK=0 keeps the loop from waking because time has
passed. TINY_PROBE=<silence>,<patience> watches whether it takes tasks, and counts what it takes for that.
"""

import os
import time

import redis
from celery import signals

from localai_q import celery as ours
from localai_q.bus import safe_transport
from localai_q.bus.probe import Probe

URL = os.environ["LOCALAI_REDIS_URL"]
signals.celeryd_init.disconnect(ours.prepare)  # this worker has no role

if os.environ.get("TINY_SAFE") == "0":
    safe_transport.install = lambda app: None
    from kombu.transport import TRANSPORT_ALIASES

    TRANSPORT_ALIASES["redis"] = "kombu.transport.redis:Transport"
    ours.app = ours.make_app()

app = ours.app
app.conf.update(worker_concurrency=4, task_default_queue="tiny", broker_url=URL)
if os.environ.get("TINY_HOOK") == "0":
    app.steps["consumer"].clear()

if os.environ.get("TINY_EVENTS") == "0":
    app.conf.worker_send_task_events = False

store = redis.Redis.from_url(URL, decode_responses=True)


if os.environ.get("TINY_PROBE"):
    silence, patience = map(float, os.environ["TINY_PROBE"].split(","))
    probe = Probe(app, store, "tiny", slots=4, silence=silence, patience=patience)

    @signals.worker_ready.connect
    def watch(sender, **_: object) -> None:
        global consumer
        consumer = sender
        probe.start(lambda reason: store.set("deaf", reason))

    @signals.task_postrun.connect
    def count(task, **_: object) -> None:
        store.incr(f"done:{task.name}")


if os.environ.get("TINY_CLOCK") == "0":

    @signals.worker_ready.connect
    def stop_clock(sender, **_: object) -> None:
        hub, poll = sender.hub, sender.hub.poller.poll
        hub.timer.clear()
        hub.poller.poll = lambda timeout: poll(timeout if hub.timer.queue else 3600)


@app.task(name="tiny.deafen")
def deafen(how: str) -> None:
    """The consumer stays connected and takes nothing more, or its loop stands still."""
    consumer.hub.call_soon(consumer.cancel_task_queue, "tiny")
    if how == "hang":
        consumer.hub.call_soon(time.sleep, 60)


@app.task(name="tiny.work")
def work(number: str) -> None:
    """Fifty milliseconds of work, with marks of its begin and its end, and of what had begun and ended by then."""
    pipe = store.pipeline(transaction=True)
    pipe.sadd("running", number).llen("tiny").llen("ended")
    _, waiting, ended = pipe.execute()
    store.rpush("seen", f"{waiting} {ended}")
    time.sleep(0.05)
    store.pipeline(transaction=True).srem("running", number).rpush("ended", number).execute()


@app.task(name="tiny.mark")
def mark(name: str) -> None:
    """Leaves this worker's process id."""
    store.set(f"mark:{name}", os.getpid())


@app.task(name="tiny.hold")
def hold(name: str) -> None:
    """Runs until it is told to end, whatever becomes of the broker meanwhile."""
    run_until_released(name)


@app.task(name="tiny.hold_late", acks_late=True)
def hold_late(name: str) -> None:
    """The same, acknowledged at its end: a message without acknowledgement is what a dying broker trips over."""
    run_until_released(name)


def run_until_released(name: str) -> None:
    while True:
        try:
            store.set(f"held:{name}", os.getpid())
            if store.exists(f"release:{name}"):
                store.delete(f"held:{name}")
                return
        except redis.RedisError:
            pass
        time.sleep(0.02)
