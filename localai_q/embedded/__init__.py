"""The servers that `localai-q up` brings along: Postgres and Valkey, from wheels, as supervised children of ours.

Each keeps its data and its address across restarts, also after a kill -9. Who calls `start` owns the process: the
server dies with the thread that started it (see `localai_q.processes.spawn`). Nothing here decides when to restart.
"""

from __future__ import annotations

import subprocess
from typing import Protocol


class Server(Protocol):
    """What the supervisor needs to know of an embedded server."""

    process: subprocess.Popen[bytes] | None

    @property
    def url(self) -> str:
        """By what the server is reached; the same after a restart."""

    def start(self) -> subprocess.Popen[bytes]:
        """Start the server, also again after it died; `wait_ready` tells when it answers.

        Raises:
            StartupError: it cannot start; the message names the fix.
        """

    def wait_ready(self, timeout: float) -> None:
        """Return when the server answers.

        Raises:
            StartupError: it ended, or did not answer within `timeout` seconds.
        """

    def stop(self, grace: float) -> None:
        """Stop the server cleanly within `grace` seconds, else kill it."""
