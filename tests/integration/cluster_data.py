"""Rows and messages that tests of the services begin with, made by the services themselves."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from flask import Flask
from werkzeug.serving import make_server

from api.app import create_app
from localai_q import names
from localai_q.bus import presence, users
from localai_q.bus.leases import Lease
from localai_q.cluster.models import Facts, ModelConfig
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.reports import Report
from localai_q.config import Settings
from localai_q.services import models, nodes
from localai_q.services.wiring import Services
from localai_q.store import models as model_rows
from localai_q.store import nodes as node_rows
from localai_q.store.keys import digest

SECRET = "s"
FACTS = Facts(architecture="llama", blocks=30, context_length=8192, embedding_length=576, heads=9, kv_heads=90,
              key_length=64, value_length=64, vocabulary=49152, file_size=98362432, layer_bytes=66493440,
              other_bytes=30083328)  # fmt: skip


def add_model(services: Services, name: str = "m", **config: object) -> str:
    """A model of the echo backend; its id."""
    return models.add(services, name, ModelConfig(**{"backend": "echo", **config}))["id"]


def model_named(services: Services, name: str):
    with services.db.transaction() as db:
        return model_rows.by_name(db, name)


def join(
    services: Services, name: str = "n1", secret: str = SECRET, *, host: str = "10.0.0.5", token: str | None = None
):
    """A machine asks to join; the answer that it gets."""
    token = services.settings.registration_token if token is None else token
    return nodes.register(services, token=token, name=name, secret_hash=digest(secret), version="1", hardware={"cpus": 2},
                          host=host)  # fmt: skip


def ready_node(services: Services, name: str = "n1", secret: str = SECRET) -> Node:
    """A node that was approved and has come back for it."""
    join(services, name, secret)
    nodes.approve(services, name)
    join(services, name, secret)
    return node_named(services, name)


@contextmanager
def web_process(settings: Settings) -> Iterator[Flask]:
    """The application of a web process, whose threads end with it."""
    app = create_app(settings)
    try:
        yield app
    finally:
        app.extensions["localai_q"].stop()


@contextmanager
def api_over_http(services: Services) -> Iterator[str]:
    """The API, as nodes call it: its URL. Users that nodes were on Redis go at the end."""
    with web_process(services.settings) as app:
        server = make_server("127.0.0.1", 0, app, threaded=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
    for node_id in users.known(services.redis):
        users.remove(services.redis, node_id)


def node_named(services: Services, name: str) -> Node:
    with services.db.transaction() as db:
        found = node_rows.by_name(db, name)
    assert found is not None
    return found


def reported(replica: Replica, **values: object) -> Report:
    """What a node says of a process that serves this replica."""
    told = {"id": replica.id, "model_id": replica.model_id, "revision": replica.revision, "number": replica.number,
            "state": "ready", "slots": replica.slots}  # fmt: skip
    return Report(**{**told, **values})


def rung(services: Services, queue: str) -> list[str]:
    """`task(argument)` of every doorbell on a queue, the first first."""
    items = [json.loads(item) for item in services.redis.lrange(queue, 0, -1)]
    told = [(item["headers"]["task"], json.loads(base64.b64decode(item["body"]))[0]) for item in reversed(items)]
    return [f"{task.removeprefix('localai_q.')}({','.join(args)})" for task, args in told]


def claim(services: Services, job_id: str, line: str, node_id: str = "n1") -> Lease:
    lease = services.leases.claim(job_id, line, owner="owner", node_id=node_id, revision=1)
    assert isinstance(lease, Lease), lease
    return lease


def expire(services: Services, job_id: str, line: str) -> None:
    """Let a lease run out now."""
    assert services.redis.zadd(names.leases_key(line), {job_id: 1}, xx=True, ch=True)


def watched(services: Services, seconds: float = 3600.0) -> None:
    """Let leases have been judged for so long without a break."""
    services.redis.set(names.WATCHED_SINCE, presence.now(services.redis) - seconds, px=60_000)
