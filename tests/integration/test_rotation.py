"""A node goes from one secret to the next: whenever it dies, it is let in again, and the one before is worth nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import redis
from cluster_data import SECRET, api_over_http, claim, join, node_named
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import text

from localai_q import names
from localai_q.bus import users
from localai_q.bus.connection import client
from localai_q.bus.leases import Append
from localai_q.cluster.states import NodeState
from localai_q.config import load_settings
from localai_q.errors import Conflict, Forbidden, StartupError
from localai_q.services import fleet, jobs, node_users, nodes
from localai_q.services.wiring import Services, make_leases
from localai_q.store import nodes as node_rows
from workers.identity import Identity, digest
from workers.node import api
from workers.node.worker import Node

NEXT = "ab" * 32


@pytest.fixture
def url(services: Services) -> Iterator[str]:
    with api_over_http(services) as found:
        yield found


class Machine:
    """A node of this machine, without children. To start it again is all that is left after it was killed."""

    def __init__(self, services: Services, url: str, home: Path) -> None:
        self.services = services
        self.url = url
        self.home = home
        self.file = home / "identity.json"

    def start(self) -> None:
        self.identity = Identity(self.file)
        token = self.services.settings.registration_token
        answer = api.register(self.url, token, "n1", self.identity, {})
        self.id = answer["id"]
        self.redis_url = answer["redis_url"]
        cfg = load_settings(home=self.home, register_to=self.url, node_name="n1")
        self.node = Node(cfg, answer, self.identity)

    def beat(self) -> bool:
        """Report once; whether that made it go on to another secret."""
        answer = self.node._api.heartbeat({}, [])
        return self.node._renew_secret(asked=bool(answer.get("rotate")))

    def own_redis(self) -> redis.Redis:
        return client(self.redis_url, self.identity.secret)

    def is_let_in(self, secret: str) -> bool:
        """Whether this secret opens anything: the API, a new connection to Redis."""
        headers = {"Authorization": f"Bearer {secret}"}
        status = httpx.post(f"{self.url}/api/node/{self.id}/heartbeat", json={}, headers=headers).status_code
        assert status in (200, 403)
        try:
            on_redis = self.as_thief(secret).ping()
        except redis.AuthenticationError:
            on_redis = False
        assert on_redis is (status == 200)
        return on_redis

    def as_thief(self, secret: str) -> redis.Redis:
        parts = urlsplit(self.services.settings.redis_url)
        return redis.Redis(host=parts.hostname, port=parts.port, username=names.node_user(self.id), password=secret,
                           retry=Retry(NoBackoff(), 0))  # fmt: skip


@pytest.fixture
def machine(services: Services, url: str, tmp_path: Path) -> Machine:
    found = Machine(services, url, tmp_path)
    join(services, secret=Identity(found.file).secret())
    nodes.approve(services, "n1")
    found.start()
    return found


def test_an_admin_has_a_node_make_a_new_secret_and_what_it_works_on_goes_on(
    services: Services, machine: Machine
) -> None:
    line, old = names.node_jobs_queue(machine.id), machine.identity.secret()
    job_id = jobs.submit_node_job(services, kind="fetch_model", node_id=machine.id, model_id=None, request={"a": 1})
    own = make_leases(machine.own_redis(), services.settings)
    lease = own.claim(job_id, line, owner="r", node_id=machine.id)
    thief = machine.as_thief(old)
    assert thief.ping()
    assert not machine.beat()
    assert nodes.ask_to_rotate(services, "n1") == {"id": machine.id, "name": "n1", "rotate": True}
    assert machine.beat()
    new = machine.identity.secret()
    assert new != old
    assert own.renew([lease]) == [Append.WRITTEN]
    assert not machine.beat()
    assert own.renew([lease]) == [Append.WRITTEN], "its connection was ended, and made again with the new secret"
    assert machine.is_let_in(new)
    assert not machine.is_let_in(old)
    with pytest.raises((redis.AuthenticationError, redis.ConnectionError)):
        thief.ping()
    assert not machine.beat()
    assert json.loads(machine.file.read_text()).keys() == {"secret", "since"}
    assert machine.file.stat().st_mode & 0o077 == 0
    node = node_named(services, "n1")
    assert (node.secret_hashes, node.rotate) == ((digest(new),), False)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_node_that_dies_between_two_steps_is_let_in_again_and_finishes_the_change(
    services: Services, machine: Machine, steps: int
) -> None:
    old = machine.identity.secret()
    following = [
        machine.identity.prepare,
        lambda: machine.node._api.announce_secret(machine.identity.prepare()),  # and the answer is lost
        machine.identity.adopt,
        lambda: machine.node._api.heartbeat({}, []),
    ]
    for step in following[:steps]:
        step()
    machine.start()
    assert machine.own_redis().ping()
    while machine.beat() or machine.identity.begun:
        assert machine.own_redis().ping()
    new = machine.identity.secret()
    assert new != old
    assert machine.is_let_in(new)
    assert not machine.is_let_in(old)
    machine.start()
    assert machine.identity.secret() == new


def test_a_node_whose_new_secret_the_api_has_lost_goes_back_to_the_one_before(
    services: Services, machine: Machine
) -> None:
    old = machine.identity.secret()
    machine.node._api.announce_secret(machine.identity.prepare())
    machine.identity.adopt()
    with services.db.transaction() as db:
        db.execute(text("UPDATE nodes SET next_secret_hash = ''"))
    machine.start()
    assert machine.identity.secret() == old
    assert machine.beat()
    assert not machine.beat()
    assert not machine.is_let_in(old)


def test_a_name_that_belongs_to_another_is_refused_with_either_secret(machine: Machine, tmp_path: Path) -> None:
    other = Identity(tmp_path / "other.json")
    other.prepare()
    token = machine.services.settings.registration_token
    with pytest.raises(Exception, match="LOCALAI_NODE_NAME"):
        api.register(machine.url, token, "n1", other, {})


def test_a_secret_that_is_old_is_changed_without_being_asked(machine: Machine) -> None:
    record = json.loads(machine.file.read_text())
    machine.file.write_text(json.dumps({**record, "since": record["since"] - 29 * 86400}))
    assert not machine.beat()
    machine.file.write_text(json.dumps({**record, "since": record["since"] - 31 * 86400}))
    assert machine.beat()
    assert not machine.beat()


def test_a_call_on_its_way_while_the_secret_changes_is_made_again(machine: Machine) -> None:
    other = Identity(machine.file)
    answers = iter([other.secret()])
    machine.node._api.announce_secret(other.prepare())
    other.adopt()
    machine.node._api.heartbeat({}, [])
    late = api.NodeApi(machine.url, machine.id, other)
    read = other.secret
    other.secret = lambda: next(answers, None) or read()
    assert late.heartbeat({}, [])["state"] == "ready"


def test_nobody_is_asked_or_announces_before_approval(services: Services) -> None:
    join(services, "n2")
    with pytest.raises(Conflict, match="approve"):
        nodes.ask_to_rotate(services, "n2")
    with pytest.raises(Forbidden, match="approve"):
        nodes.authenticate(services, node_named(services, "n2").id, SECRET)


def test_a_node_that_is_offline_changes_its_secret_when_it_is_back(services: Services, machine: Machine) -> None:
    with services.db.transaction() as db:
        node_rows.move(db, machine.id, NodeState.OFFLINE)
    nodes.ask_to_rotate(services, "n1")
    old = machine.identity.secret()
    machine.start()
    assert machine.beat()
    assert not machine.beat()
    assert not machine.is_let_in(old)


def test_who_was_let_in_by_a_secret_that_is_withdrawn_meanwhile_announces_none(
    services: Services, machine: Machine
) -> None:
    late = nodes.authenticate(services, machine.id, machine.identity.secret())
    nodes.ask_to_rotate(services, "n1")
    assert machine.beat()
    assert not machine.beat()
    nodes.announce_secret(services, late, machine.identity.hash)  # its own call, which was long on its way
    with pytest.raises(Forbidden, match="withdrawn"):
        nodes.announce_secret(services, late, NEXT)
    assert node_named(services, "n1").secret_hashes == (machine.identity.hash,)
    assert machine.is_let_in(machine.identity.secret())


def test_another_secret_than_the_announced_one_is_told_of(
    services: Services, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    node = nodes.authenticate(services, machine.id, machine.identity.secret())
    nodes.announce_secret(services, node, machine.identity.prepare())
    nodes.announce_secret(services, node, machine.identity.prepare())
    assert not caplog.records
    nodes.announce_secret(services, node_named(services, "n1"), NEXT)
    assert "n1 announces another new secret than before" in caplog.text


def test_a_node_with_the_disk_of_long_ago_is_told_what_to_do(services: Services, machine: Machine) -> None:
    image = machine.file.read_text()
    nodes.ask_to_rotate(services, "n1")
    assert machine.beat()
    assert not machine.beat()
    machine.file.write_text(image)
    with pytest.raises(StartupError, match="localai-q nodes delete n1"):
        machine.start()
    nodes.remove(services, "n1", force=True)
    join(services, secret=machine.identity.secret())
    nodes.approve(services, "n1")
    machine.start()
    assert machine.is_let_in(machine.identity.secret())


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"secret": 5}', '{"secret": ""}', "\udcff"])
def test_a_file_that_is_no_identity_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "identity.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(StartupError, match=r"identity\.json: .*Delete it to register anew"):
        Identity(path)
    assert path.read_bytes() == content.encode(errors="surrogateescape")


def test_what_redis_should_not_know_any_more_is_withdrawn_by_control(services: Services, machine: Machine) -> None:
    old = machine.identity.secret()
    thief = machine.as_thief(old)
    assert thief.ping()
    with services.db.transaction() as db:
        db.execute(text("UPDATE nodes SET secret_hash = :new"), {"new": NEXT})
    node_users.restore(services)
    assert users.known(services.redis)[machine.id] >= {f"#{NEXT}"}
    with pytest.raises((redis.AuthenticationError, redis.ConnectionError)):
        thief.ping()
    assert not machine.is_let_in(old)


def test_no_hash_of_a_secret_is_shown(services: Services, machine: Machine) -> None:
    machine.node._api.announce_secret(machine.identity.prepare())
    shown = json.dumps(fleet.show(services, "n1"), default=str)
    assert not [each for each in node_named(services, "n1").secret_hashes if each in shown]


def test_a_job_of_a_thief_is_not_to_be_had(services: Services, machine: Machine) -> None:
    old = machine.identity.secret()
    nodes.ask_to_rotate(services, "n1")
    assert machine.beat()
    assert not machine.beat()
    job_id = jobs.submit_node_job(services, kind="fetch_model", node_id=machine.id, model_id=None, request={"a": 1})
    line = names.node_jobs_queue(machine.id)
    with pytest.raises(redis.AuthenticationError):
        make_leases(machine.as_thief(old), services.settings).claim(job_id, line, owner="t", node_id=machine.id)
    claim(services, job_id, line, machine.id)
