"""Clients of Redis. Owns how connections are made and how their failures become our errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from localai_q.errors import Unavailable

CONNECT_TIMEOUT = 3.0
SOCKET_TIMEOUT = 10.0


Secret = Callable[[], str]


class Credentials(redis.CredentialProvider):
    """A user and how his password is found, which may be another one at each connection."""

    def __init__(self, user: str, secret: Secret) -> None:
        self._user = user
        self._secret = secret

    def get_credentials(self) -> tuple[str, str]:
        return self._user, self._secret()


def credentials(url: str, secret: Secret | None) -> Credentials | None:
    """Whom to be at this URL, where it names a user without a password."""
    parts = urlsplit(url)
    return Credentials(parts.username, secret) if secret and parts.username and not parts.password else None


@cache
def client(url: str, secret: Secret | None = None) -> redis.Redis:
    """The process's pooled client for this URL. Replies are text.

    Args:
        secret: the password of the user whom the URL names without one; asked for at each connection.
    """
    found = credentials(url, secret)
    parts = urlsplit(url)
    return redis.Redis.from_url(
        urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if found else url,
        credential_provider=found,
        decode_responses=True,
        encoding_errors="replace",  # what a node has written may be anything
        socket_connect_timeout=CONNECT_TIMEOUT,
        socket_timeout=SOCKET_TIMEOUT,
        socket_keepalive=True,
        health_check_interval=15,
        max_connections=256,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=2),
    )


def answers(pipe: Any) -> list[Any]:
    """What a pipeline is answered; None where a key holds something of another type than it should.

    Nodes can write to some keys, and what one has made of its own holds up nobody who reads those of all.
    """
    found = pipe.execute(raise_on_error=False)
    for answer in found:
        if isinstance(answer, Exception) and not str(answer).startswith("WRONGTYPE"):
            raise answer
    return [None if isinstance(answer, Exception) else answer for answer in found]


@contextmanager
def broker_errors() -> Iterator[None]:
    """Turn the driver's connection errors into `Unavailable`, keeping the cause."""
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError) as error:
        raise Unavailable("The queue (Redis) cannot be reached at the moment. Try again soon.") from error
    except redis.OutOfMemoryError as error:
        raise Unavailable("The queue (Redis) is out of memory. Raise its maxmemory, or wait.") from error
