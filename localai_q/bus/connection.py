"""Clients of Redis. Owns how connections are made and how their failures become our errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from localai_q.errors import Unavailable

CONNECT_TIMEOUT = 3.0
SOCKET_TIMEOUT = 10.0


@cache
def client(url: str) -> redis.Redis:
    """The process's pooled client for this URL. Replies are text."""
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        socket_connect_timeout=CONNECT_TIMEOUT,
        socket_timeout=SOCKET_TIMEOUT,
        socket_keepalive=True,
        health_check_interval=15,
        max_connections=256,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=2),
    )


@contextmanager
def broker_errors() -> Iterator[None]:
    """Turn the driver's connection errors into `Unavailable`, keeping the cause."""
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError) as error:
        raise Unavailable("The queue (Redis) cannot be reached at the moment. Try again soon.") from error
    except redis.OutOfMemoryError as error:
        raise Unavailable("The queue (Redis) is out of memory. Raise its maxmemory, or wait.") from error
