"""Waiting for what another process or thread will do."""

import time
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")


def wait_for(condition: Callable[[], Answer], seconds: float = 10.0, every: float = 0.01) -> Answer:
    """What `condition` returns once that is true; its last answer after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()) and time.monotonic() < deadline:
        time.sleep(every)
    return answer
