"""How often load has kept requests from the replica that had read their beginning: web processes tell, control hears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import redis

from localai_q import names
from localai_q.bus.connection import broker_errors

LASTS = 60  # seconds after the latest of these requests


def add(client: redis.Redis, counts: Mapping[str, int]) -> None:
    """Count so many more requests, by model."""
    pipe = client.pipeline(transaction=False)
    for model_id, count in counts.items():
        pipe.incrby(names.pressure_key(model_id), count)
        pipe.expire(names.pressure_key(model_id), LASTS)
    with broker_errors():
        pipe.execute()


def read(client: redis.Redis, model_ids: Sequence[str]) -> dict[str, int]:
    """The requests that count at the moment, by model."""
    with broker_errors():
        found = client.mget([names.pressure_key(model_id) for model_id in model_ids]) if model_ids else []
    return {model_id: int(count or 0) for model_id, count in zip(model_ids, found, strict=True)}


def relieve(client: redis.Redis, model_id: str) -> None:
    """The model has got one more replica: what was counted has had its effect."""
    with broker_errors():
        client.delete(names.pressure_key(model_id))
