"""Which web processes are there. Owns the keys by which they say so, and what may be concluded from their absence.

A missing key alone proves nothing: Redis may have lost its data, or have slept for longer than a key lives while its
clients could not write. So only an absence that has lasted while we looked counts.
"""

from __future__ import annotations

from collections.abc import Collection

import redis

from localai_q import names
from localai_q.bus.connection import broker_errors

REFRESHED = 5.0  # seconds between two signs of life of a web process
LIVES = 15.0  # seconds for which one is believed
MISSED = 10.0  # seconds for which a process must have been missed: it would have shown itself twice
SLACK = 2.0  # seconds by which a sign of life may come late


def announce(client: redis.Redis, watcher: str) -> None:
    """This web process is there."""
    client.set(names.web_alive_key(watcher), "1", px=int(LIVES * 1000))


def gone(client: redis.Redis, watchers: Collection[str]) -> set[str]:
    """Those of these web processes that have been missed long enough to be believed dead."""
    with broker_errors():
        missing = [watcher for watcher in watchers if not client.exists(names.web_alive_key(watcher))]
        for watcher in set(watchers) - set(missing):
            client.delete(names.web_missed_key(watcher))
        now = _now(client)
        for watcher in missing:
            client.set(names.web_missed_key(watcher), now, nx=True, px=int(2 * LIVES * 1000))
        since = {watcher: client.get(names.web_missed_key(watcher)) for watcher in missing}
    return {watcher for watcher, first in since.items() if first and now - float(first) >= MISSED}


def served_for(client: redis.Redis) -> float:
    """For how many seconds some web process has been there without a break, as far as those who called this have seen.

    To be called at least every `REFRESHED` seconds: who looks less often sees a break.
    """
    with broker_errors():
        keys = list(client.scan_iter(match=names.web_alive_key("*"), count=1000))
        youngest = max((int(client.pttl(key)) for key in keys), default=-1)  # type: ignore[arg-type]
        if youngest < (LIVES - REFRESHED - SLACK) * 1000:
            client.delete(names.SERVED_SINCE)
            return 0.0
        now = _now(client)
        client.set(names.SERVED_SINCE, now, nx=True)
        client.pexpire(names.SERVED_SINCE, int(REFRESHED * 1000))
        return now - float(client.get(names.SERVED_SINCE) or now)  # type: ignore[arg-type]


def _now(client: redis.Redis) -> float:
    seconds, micros = client.time()  # type: ignore[misc]
    return int(seconds) + int(micros) / 1e6
