"""Waiting for what another process or thread will do.

How long that takes says nothing about the code where a machine is crowded: limits are there to end a test that has failed.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import redis

Answer = TypeVar("Answer")

LIMIT = 60.0  # seconds


def wait_for(condition: Callable[[], Answer], seconds: float = LIMIT, every: float = 0.01) -> Answer:
    """What `condition` returns once that is true; its last answer after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()) and time.monotonic() < deadline:
        time.sleep(every)
    return answer


@contextmanager
def listening(client: redis.Redis, *channels: str) -> Iterator[Callable[[], list[tuple[str, str]]]]:
    """Yields what tells everything that was announced on these channels since: pairs of channel and words."""
    last = "that was all"
    with client.pubsub() as pubsub:
        pubsub.subscribe(*channels)
        for _ in channels:
            assert pubsub.get_message(timeout=LIMIT)

        def heard() -> list[tuple[str, str]]:
            for channel in channels:
                client.publish(channel, last)
            found: list[tuple[str, str]] = []
            while [words for _, words in found].count(last) < len(channels):
                message = pubsub.get_message(timeout=LIMIT)
                assert message, f"announcements are lost behind {found}"
                found.append((message["channel"], message["data"]))
            return [(channel, words) for channel, words in found if words != last]

        yield heard
