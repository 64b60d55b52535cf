"""Clients that hardly read: they cost their connection and little more, and nobody else notices."""

import json
from collections.abc import Callable

import psutil
from callers import Caller, counted, numbers
from ledger import Ledger
from victims import Web

STALLED = 3.0  # seconds without a byte taken
WORD = "x" * 100_000  # a token that fills the buffers of a connection quickly
Ask = Callable[..., Caller]


def blocked(ask: Ask, words: int, delay: int, **more: object) -> Caller:
    """A client that has seen the first words of a long answer, and reads no more."""
    text = f"[[echo delay_ms={delay}]] " + " ".join([WORD] * words)
    caller = ask(text, max_tokens=words, **more).until_said(1)
    caller.reading.clear()
    return caller


def test_a_client_that_reads_nothing_is_disconnected_and_its_job_cancelled(ledger: Ledger, ask: Ask) -> None:
    neighbour = ask(numbers(200, delay_ms=40))
    caller = blocked(ask, 150, 80)
    assert ledger.row(caller.job)["state"] == "cancelled"
    caller.reading.set()
    assert not caller.wait().complete
    assert neighbour.whole() == counted(200)


def test_a_client_that_reads_very_slowly_costs_little_memory_and_gets_it_all(
    ledger: Ledger, ask: Ask, start_web: Callable[..., Web]
) -> None:
    web = start_web(LOCALAI_Q_STALLED_CLIENT="60")
    [worker] = psutil.Process(web.process.pid).children()
    caller = blocked(ask, 90, 10, address=web.address)
    assert ledger.row(caller.job)["state"] == "done"
    before = worker.memory_info().rss
    # Announcements far beyond what it has read: as many as a fast engine would make in an hour.
    piece = json.dumps({"k": "d", "n": 1, "t": "y" * 4000})
    [channel] = [
        name for name, _ in ledger.redis.pubsub_numsub(*ledger.redis.pubsub_channels("web:*"))
        if name.decode().partition(":")[2] in ledger.redis.hget(f"job:{caller.job}", "watch").decode().split()
    ]  # fmt: skip
    for start in range(0, 20_000, 500):
        with ledger.redis.pipeline(transaction=False) as pipe:
            for number in range(start, start + 500):
                pipe.publish(channel, f"{caller.job} 1-{100_000 + number} {piece}")
            pipe.execute()
    neighbour = ask(numbers(20, delay_ms=30), address=web.address)
    assert neighbour.whole() == counted(20)
    assert worker.memory_info().rss - before < 20 << 20
    caller.reading.set()
    whole = caller.whole(60) == " ".join([WORD] * 90)
    assert whole
