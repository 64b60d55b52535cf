"""What a node may do on Redis: the rules of the user that it is there. Pure.

It reaches the queues, lines and channels that are its own or of models that it has a replica of. Journals and hashes of
jobs bear no node's name, since a job may move from one node to another: whoever knows a job's id reaches these. Nothing
is granted by which a node could list such ids, or hear them.
"""

from __future__ import annotations

from collections.abc import Iterable

from localai_q import names

COMMANDS = tuple(
    f"+{command}"
    for purpose in (
        "hello auth ping select client|setinfo client|setname",  # connections
        "brpop lpush rpush llen ltrim expire multi exec watch unwatch discard",  # queues, by kombu and by us
        "sadd srem smembers zadd zrem zrange zrangebyscore zrevrangebyscore",
        "evalsha script|load script|exists subscribe unsubscribe publish",
        "hset hget hmget hgetall hdel hincrby zscore zcard xadd xrange xrevrange",  # within our scripts
        "get set del exists pexpire pexpireat time",
    )
    for command in purpose.split()
)


# What every node may say, and none may hear: tokens to web processes, ends to control, events to Flower.
SPEAKS_ON = (names.web_channel("*"), names.ENDS_CHANNEL, names.EVENTS_CHANNELS)


def rights(node_id: str, *, model_ids: Iterable[str] = (), replica_ids: Iterable[str] = ()) -> frozenset[str]:
    """The patterns of keys (`~…`) and of the channel that it hears (`&…`) of a node with replicas of these models."""
    queues = [names.node_queue(node_id), names.node_jobs_queue(node_id), *map(names.model_queue, model_ids),
              *map(names.replica_queue, replica_ids)]  # fmt: skip
    keys = [key for queue in queues for key in names.keys_of_queue(queue)]
    keys += [names.unacked_key(node_id), names.unacked_index_key(node_id), names.unacked_mutex_key(node_id)]
    keys += [names.ends_key(node_id), names.EPOCH, names.job_key("*"), names.journal_key("*")]
    return frozenset([*(f"~{key}" for key in keys), f"&{names.cancel_channel(node_id)}"])
