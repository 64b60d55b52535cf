"""What a node can do on Redis as the user that it is there: its own work, and nothing of anybody else's."""

import logging
from urllib.parse import urlsplit

import pytest
import redis
from cluster_data import SECRET, add_model, join, node_named, ready_node

from localai_q import names
from localai_q.bus import users
from localai_q.bus.connection import credentials
from localai_q.bus.leases import CONTROL, Append, Lease, Leases, Submission
from localai_q.cluster.capacity import Booking
from localai_q.cluster.events import Delta, End
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState
from localai_q.services import node_users, nodes
from localai_q.services.wiring import Services, make_leases
from localai_q.store import replicas


@pytest.fixture(autouse=True)
def no_users_left(services: Services):
    yield
    for node_id in users.known(services.redis):
        users.remove(services.redis, node_id)
    node_users._complain.cache_clear()


def as_node(services: Services, node: Node, secret: str = SECRET) -> redis.Redis:
    parts = urlsplit(services.settings.redis_url)
    return redis.Redis(host=parts.hostname, port=parts.port, username=names.node_user(node.id), password=secret,
                       decode_responses=True)  # fmt: skip


def give_model(services: Services, node: Node, name: str = "m") -> str:
    """A replica of a model on the node, whose rights it has; the model's line."""
    model_id = add_model(services, name)
    with services.db.transaction() as db:
        replicas.place(db, model_id=model_id, node_id=node.id, number=1, revision=1, slots=1, booking=Booking())
    node_users.extend(services, node.id)
    return names.model_queue(model_id)


def submit(services: Services, job_id: str, line: str) -> None:
    services.leases.submit(Submission(job_id=job_id, line=line, request={}, watcher="w1"), longest_line=9)


def test_a_node_claims_the_loads_of_its_own_replicas_only(services: Services, node: Node) -> None:
    give_model(services, node)
    thief = ready_node(services, "n2", "other")
    with services.db.transaction() as db:
        (own,) = replicas.every(db)
    line = names.replica_queue(own.id)
    submit(services, "load", line)
    with pytest.raises(redis.exceptions.NoPermissionError):
        make_leases(as_node(services, thief, "other"), services.settings).claim(
            "load", line, owner="x", node_id=thief.id
        )
    lease = make_leases(as_node(services, node), services.settings).claim("load", line, owner="x", node_id=node.id)
    assert isinstance(lease, Lease)


def test_a_node_is_handed_a_user_and_no_password(services: Services, node: Node) -> None:
    url = join(services)["redis_url"]
    assert urlsplit(url).password is None
    assert credentials(url, lambda: "s/e?c").get_credentials() == (names.node_user(node.id), "s/e?c")
    assert credentials("redis://:shared@h/0", lambda: "x") is None
    assert as_node(services, node).ping()
    with pytest.raises(redis.AuthenticationError):
        as_node(services, node, "wrong").ping()
    with pytest.raises(redis.AuthenticationError):
        as_node(services, node, node.secret_hash).ping()


def test_who_is_not_approved_is_no_user(services: Services) -> None:
    before = users.known(services.redis)
    join(services)
    node_users.restore(services)
    assert set(users.known(services.redis)) <= set(before)


@pytest.mark.parametrize(
    "command",
    [
        "KEYS *", "SCAN 0", "FLUSHALL", "FLUSHDB", "CONFIG GET requirepass", "ACL LIST", "ACL WHOAMI", "CLIENT LIST",
        "CLIENT KILL ID 1", "MONITOR", "INFO", "SHUTDOWN", "EVAL return(1) 0", "FUNCTION LIST", "SAVE",
        "SWAPDB 0 1", "RENAME epoch x", "REPLICAOF h 1", "PUBSUB CHANNELS", "SCRIPT FLUSH", "RESTORE epoch 0 x", "DBSIZE",
        "BRPOP node.{other} 1", "LPUSH node.{other} x", "LLEN node.{other}.jobs", "LPUSH node.{other}.jobs x",
        "BRPOP model.{theirs} 1", "LPUSH model.{theirs} x", "ZRANGE waiting:model.{theirs} 0 -1",
        "ZRANGE leases:model.{theirs} 0 -1", "HGETALL ends:{other}", "HSET ends:{other} j x", "HSET ends:control j x",
        "HGETALL unacked.{other}", "HGETALL unacked", "SMEMBERS _kombu.binding.node.{other}", "LPUSH control x",
        "SUBSCRIBE cancel:{other}", "PUBLISH cancel:{other} x", "PUBLISH wake x", "SUBSCRIBE wake", "PSUBSCRIBE *", "PSUBSCRIBE web:*",
        "PUBLISH /0.celery.pidbox x", "PUBLISH admin x", "SUBSCRIBE admin", "GET served-since", "SET watched-since 0",
        "GET web-alive:x", "SUBSCRIBE web:x", "SUBSCRIBE ends", "SUBSCRIBE /0.celeryev/task.multi",
        "PSUBSCRIBE /0.celeryev/*", "SMEMBERS ends", "DEL ends",
        "SUBSCRIBE prefixes", "PUBLISH prefixes x", "GET pressure:{theirs}", "SET pressure:{theirs} 9",
    ],
)  # fmt: skip
def test_a_node_reaches_nothing_of_anybody_else(services: Services, node: Node, command: str) -> None:
    other = ready_node(services, "n2")
    give_model(services, node, "mine")
    theirs = give_model(services, other, "theirs").removeprefix("model.")
    words = command.format(other=other.id, theirs=theirs).split()
    with as_node(services, node) as client, pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*words)


def test_a_node_does_its_own_work(services: Services, node: Node) -> None:
    line = give_model(services, node)
    for job_id in ("j1", "j2", "j3"):
        submit(services, job_id, line)
    client = as_node(services, node)
    own: Leases = make_leases(client, services.settings)
    leases = [own.claim(job_id, line, owner="r.1", node_id=node.id) for job_id in ("j1", "j2", "j3")]
    assert all(isinstance(lease, Lease) for lease in leases)
    assert own.append([(leases[0], 1, [Delta(choice=0, text="a")])]) == [Append.WRITTEN]
    assert own.renew(leases) == [Append.WRITTEN] * 3
    assert own.restore(leases[0], [Delta(choice=0, text="a")]) is not None
    assert own.finish(leases[0], 2, End(state=JobState.DONE), node_id=node.id) is Append.WRITTEN
    assert own.release(leases[1]) is Append.WRITTEN
    assert own.abort("j2", line, End(state=JobState.CANCELLED), by=node.id) == "ended"
    assert services.leases.ends([node.id])[node.id].keys() == {"j1", "j2"}
    with client.pubsub() as pubsub:
        pubsub.subscribe(names.cancel_channel(node.id))
        assert pubsub.get_message(timeout=60)["type"] == "subscribe"
    assert client.lpush(names.dead_letters(line), "x") == 1


def test_a_job_whose_owner_died_on_another_node_is_ended_without_calling_that(services: Services, node: Node) -> None:
    line = give_model(services, node)
    submit(services, "j1", line)
    services.leases.claim("j1", line, owner="dead.1", node_id="other")
    services.redis.delete(names.leases_key(line))
    own = make_leases(as_node(services, node), services.settings)
    assert own.abort("j1", line, End(state=JobState.CANCELLED), by=node.id) == "ended"
    assert CONTROL not in services.leases.ends([node.id])


def test_a_node_may_not_take_what_it_has_no_replica_of(services: Services, node: Node) -> None:
    line = give_model(services, ready_node(services, "n2"))
    submit(services, "j1", line)
    with pytest.raises(redis.exceptions.NoPermissionError):
        make_leases(as_node(services, node), services.settings).claim("j1", line, owner="r", node_id=node.id)
    assert services.leases.waiting(line) == ["j1"]


def test_users_that_redis_lost_are_made_again_and_strangers_removed(services: Services, node: Node) -> None:
    line = give_model(services, node)
    before = users.known(services.redis)
    users.remove(services.redis, node.id)
    users.make(services.redis, "stranger", ["ab" * 32], [])
    node_users.restore(services)
    assert users.known(services.redis) == before
    assert as_node(services, node).llen(line) == 0


def test_rights_that_are_missing_are_added_and_none_taken_before_the_node_begins_anew(
    services: Services, node: Node
) -> None:
    line = give_model(services, node)
    with services.db.transaction() as db:
        replicas.forget(db, replicas.every(db)[0].id)
    node_users.restore(services)
    assert as_node(services, node).llen(line) == 0, "its replica may still finish what it holds"
    join(services)
    with pytest.raises(redis.exceptions.NoPermissionError):
        as_node(services, node).llen(line)


def test_a_deleted_node_is_cut_off(services: Services, node: Node) -> None:
    client = as_node(services, node)
    assert client.ping()
    nodes.remove(services, "n1", force=True)
    with pytest.raises(redis.AuthenticationError):
        client.ping()


def test_where_no_users_can_be_made_nodes_share_ours_and_it_is_said_once(
    services: Services, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    admin = services.redis
    admin.execute_command("ACL", "SETUSER", "weak", "reset", "on", ">pw", "~*", "&*", "+@all", "-acl")
    try:
        parts = urlsplit(services.settings.redis_url)
        weak = redis.Redis(host=parts.hostname, port=parts.port, username="weak", password="pw", decode_responses=True)
        poor = type(services)(services.settings, services.db, weak, services.leases, services.doorbells)
        with caplog.at_level(logging.ERROR, node_users.__name__):
            answer = join(poor)
            node_users.restore(poor)
            node_users.extend(poor, node.id)
            users.remove(admin, node.id)
            node_users.withdraw(poor, node.id)
            node_users.dismiss(poor, node)
        assert urlsplit(answer["redis_url"]).password == "tests"
        (said,) = caplog.records
        assert "EVERY NODE REACHES REDIS" in said.message
    finally:
        admin.execute_command("ACL", "DELUSER", "weak")


def test_a_node_that_comes_back_has_its_own_secret_only(services: Services, node: Node) -> None:
    users.extend(services.redis, node.id, ["ab" * 32], [])
    assert "#" + "ab" * 32 in users.known(services.redis)[node.id]
    join(services)
    assert {rule for rule in users.known(services.redis)[node.id] if rule.startswith("#")} == {f"#{node.secret_hash}"}
    assert node_named(services, "n1").secret_hash == node.secret_hash
