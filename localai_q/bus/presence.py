"""Which processes are there. Owns the keys by which they say so, and what may be concluded from their absence.

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
JUDGED = 5.0  # seconds between two looks at leases beyond which something was away; a lease outlives that by far


def announce(client: redis.Redis, watcher: str) -> None:
    """This web process is there."""
    client.set(names.web_alive_key(watcher), "1", px=int(LIVES * 1000))


def gone(client: redis.Redis, watchers: Collection[str]) -> set[str]:
    """Those of these web processes that have been missed long enough to be believed dead."""
    with broker_errors():
        missing = [watcher for watcher in watchers if not client.exists(names.web_alive_key(watcher))]
        for watcher in set(watchers) - set(missing):
            client.delete(names.web_missed_key(watcher))
        at = now(client)
        for watcher in missing:
            client.set(names.web_missed_key(watcher), at, nx=True, px=int(2 * LIVES * 1000))
        since = {watcher: client.get(names.web_missed_key(watcher)) for watcher in missing}
    return {watcher for watcher, first in since.items() if first and at - float(first) >= MISSED}


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
        at = now(client)
        client.set(names.SERVED_SINCE, at, nx=True)
        client.pexpire(names.SERVED_SINCE, int(REFRESHED * 1000))
        return at - float(client.get(names.SERVED_SINCE) or at)  # type: ignore[arg-type]


def watched_for(client: redis.Redis) -> float:
    """For how many seconds leases have been judged without a break of `JUDGED`, this look included.

    There is none while whoever judges, what it needs, and Redis with its data have all been there; so owners could renew.
    """
    with broker_errors():
        at = now(client)
        client.set(names.WATCHED_SINCE, at, nx=True)
        client.pexpire(names.WATCHED_SINCE, int(JUDGED * 1000))
        return at - float(client.get(names.WATCHED_SINCE) or at)  # type: ignore[arg-type]


def now(client: redis.Redis) -> float:
    """Seconds since the epoch by Redis' clock."""
    seconds, micros = client.time()  # type: ignore[misc]
    return int(seconds) + int(micros) / 1e6
