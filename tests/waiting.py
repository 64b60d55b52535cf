"""Waiting for what another process or thread will do.

How long that takes says nothing about the code where a machine is crowded: limits are there to end a test that has failed.
"""

import time
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")

LIMIT = 60.0  # seconds


def wait_for(condition: Callable[[], Answer], seconds: float = LIMIT, every: float = 0.01) -> Answer:
    """What `condition` returns once that is true; its last answer after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()) and time.monotonic() < deadline:
        time.sleep(every)
    return answer
