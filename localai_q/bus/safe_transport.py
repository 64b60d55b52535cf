"""What stands between a queue and a worker, so that no item on a queue can end the worker or keep it from its work.

A queue is a list that others can push onto. The stock transport and consumer of kombu and Celery 5.7 raise on several
malformed items, which ends the worker; one of them goes back onto the queue and ends the next worker, too. Here an item
is checked twice, its envelope by the channel and its task by the consumer, and what is refused goes to a bounded list,
`names.dead_letters`, for a person to look at.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import redis
from celery.worker.consumer import Consumer
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis
from kombu.utils.json import loads

from localai_q import names

log = logging.getLogger(__name__)

CREDENTIALS = "credentials"  # the option of the transport that holds `bus.connection.Credentials`
KEPT = 1000  # items of one list of dead letters
LARGEST = 256 << 10  # bytes of an item that is kept or read; ours have a few hundred
SHOWN = 200  # characters of a refused item in the log


class SafeChannel(kombu_redis.Channel):
    """Delivers an item only if kombu can make a message of it, and keeps the client that it talks to Redis with."""

    _kept: redis.Redis | None = None

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        """As the base's, with a password that is looked up at each connection where the options say how."""
        found: dict[str, Any] = super()._connparams(asynchronous=asynchronous)
        self._process_credential_provider(self.connection.client.transport_options.get(CREDENTIALS), found)
        return found

    @contextmanager
    def conn_or_acquire(self, client: redis.Redis | None = None) -> Iterator[redis.Redis]:
        """As the base's, which builds a client for each command: a tenth of a worker's time."""
        if client is None:
            if self._kept is None or self._kept.connection_pool is not self.pool:
                self._kept = self._create_client()
            client = self._kept
        yield client

    def _brpop_read(self, **options: Any) -> bool:
        """As the base's, with a check between reading and delivering."""
        try:
            try:
                popped = self.client.parse_response(self.client.connection, "BRPOP", **options)
            except self.connection_errors:
                self.client.connection.disconnect()
                raise
            if not popped:
                raise kombu_redis.Empty
            queue, item = popped[0].decode(), popped[1]
            queue = queue.rsplit(self.sep, 1)[0]
            self._queue_cycle.rotate(queue)
            try:
                payload = envelope(item)
            except Exception as error:  # noqa: BLE001  (whatever reading garbage raises is the reason why it is refused)
                self.bury(queue, item, error)
            else:
                self.connection._deliver(payload, queue)
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    def bury(self, queue: str, item: bytes, why: Exception) -> None:
        """Put a refused item where it can be looked at and does no harm."""
        log.error("an item on queue %s is no message of ours (%s) and was put aside: %.*r", queue, why, SHOWN, item)
        key = names.dead_letters(queue)
        try:
            with self.conn_or_acquire() as client:
                client.pipeline().lpush(key, item[:LARGEST]).ltrim(key, 0, KEPT - 1).execute()
        except redis.RedisError as error:
            log.warning("it could not be kept in %s: %s", key, error)


class SafeTransport(kombu_redis.Transport):
    """kombu's Redis transport with a channel that checks what it delivers."""

    Channel = SafeChannel


class SafeConsumer(Consumer):
    """Celery's consumer with a handler that refuses what is no task of ours and survives what it did not foresee."""

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        handle = super().create_task_handler(*args, **kwargs)

        def guarded(message: Any) -> None:
            try:
                check_task(message)
                handle(message)
            except (redis.RedisError, OSError):
                raise  # the broker's connection, and Celery's to deal with
            except Exception as error:  # noqa: BLE001  (one message must not end the worker)
                queue = str(message.delivery_info.get("routing_key"))
                message.channel.bury(queue, json.dumps(message._raw).encode(), error)
                message.reject_log_error(log, self.connection_errors)

        return guarded


def envelope(item: bytes) -> dict[str, Any]:
    """The item as kombu's message, with everything that kombu takes for granted.

    Raises:
        Exception: it is none; what reading it raised.
    """
    if len(item) > LARGEST:
        raise ValueError(f"it has {len(item)} bytes")
    payload: dict[str, Any] = loads(item.decode())
    _need(isinstance(payload, dict), "it is no object")
    headers = _dict(payload, "headers")
    properties = _dict(payload, "properties")
    address = _dict(properties, "delivery_info")
    _need("compression" not in headers, "it is compressed")
    _need(properties.get("body_encoding") == "base64", "its body's encoding is unknown")
    texts = (payload, "body"), (properties, "delivery_tag"), (address, "exchange"), (address, "routing_key")
    for where, name in texts:
        _need(isinstance(where.get(name), str), f"it has no {name}")
    base64.b64decode(payload["body"], validate=True).decode()
    for name in ("content-type", "content-encoding"):
        _need(isinstance(payload.get(name), str), f"it has no {name}")
    return payload


def check_task(message: Any) -> None:
    """Refuse a message that is no task in the form in which our processes send them.

    Raises:
        Exception: why not.
    """
    headers = message.headers
    _need(message.content_type == "application/json", f"its content is {message.content_type}")
    for name in ("task", "id"):
        _need(isinstance(headers.get(name), str), f"it names no {name}")
    body = json.loads(message.body)
    _need(isinstance(body, list) and len(body) == 3, "its body is not [args, kwargs, embed]")
    args, kwargs, embed = body
    shapes = isinstance(args, list) and isinstance(kwargs, dict) and isinstance(embed, dict)
    _need(shapes, "its body is not [args, kwargs, embed]")


def install(app: Any) -> None:
    """Have every worker and producer of this process use the checked transport."""
    ours = f"{__name__}:{SafeTransport.__name__}"
    TRANSPORT_ALIASES.update({"redis": ours, "rediss": ours})
    app.conf.worker_consumer = f"{__name__}:{SafeConsumer.__name__}"


def _dict(where: dict[str, Any], name: str) -> dict[str, Any]:
    found = where.get(name)
    if not isinstance(found, dict):
        raise ValueError(f"it has no {name}")
    return found


def _need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
