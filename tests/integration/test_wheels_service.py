"""What builders give to others: taken only from those that an admin has labelled, told to all, kept while it is needed."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster_data import add_model, node_named, ready_node, web_process
from toy_packages import package

from api import node as node_routes
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState, NodeState
from localai_q.cluster.wheels import Machine, WheelKey, wheel_key
from localai_q.config import Settings
from localai_q.errors import Conflict, Forbidden, InvalidValue, NotFound
from localai_q.gallery.catalog import Archive, BackendEntry, BuildEntry
from localai_q.names import WHEEL_HEADER
from localai_q.services import cleaning, fleet, galleries, holders, jobs, keys, models, nodes, uploads, wheels
from localai_q.services.uploads import Chunk, Received
from localai_q.services.wiring import Services
from localai_q.store import nodes as node_rows

CONTENT = b"what a builder has compiled"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HERE = Machine(python="cp311-cp311-linux_x86_64", libc="glibc-2.36", arch="x86_64", level="x86-64-v3")
LIKE = {"os": "linux", "arch": "x86_64"}


def entry(name: str = "toy", **settings: str) -> BackendEntry:
    archive = Archive(source="https://host/toy.tgz", sha256="0" * 64)
    build = BuildEntry(archive=archive, compiled=(package(**settings),))
    return BackendEntry(name=name, version="1", description="d", capabilities=("chat",), builds={"cpu": build})


def key(**settings: str) -> WheelKey:
    return wheel_key("toy-package", "1.0", settings, None, "cpu", HERE)


@pytest.fixture
def gallery(tmp_path: Path) -> Callable[..., None]:
    """Has the gallery list these backends."""

    def write(*entries: BackendEntry) -> None:
        records = [one.model_dump(mode="json") for one in entries]
        (tmp_path / "gallery.yaml").write_text(json.dumps(records))
        galleries._of_backends.clear()

    write(entry(), entry("flagged", word="x"))
    return write


@pytest.fixture
def settings(settings: Settings, tmp_path: Path, gallery: Callable[..., None]) -> Settings:
    return settings.model_copy(update={"backend_galleries": str(tmp_path / "gallery.yaml")})


@pytest.fixture
def builder(services: Services) -> Node:
    return labelled(services, like(services, "n1"))


def like(services: Services, name: str, **hardware: str) -> Node:
    """A ready node on a machine as all others."""
    found = ready_node(services, name)
    nodes.heartbeat(services, found, hardware={**LIKE, **hardware})
    return node_named(services, name)


def labelled(services: Services, node: Node, value: str = "true") -> Node:
    fleet.give_labels(services, node.name, {"builder": value}, keep=True)
    return node_named(services, node.name)


def give(services: Services, giver: Node, wheel: WheelKey | None = None, content: bytes = CONTENT) -> dict[str, Any]:
    """The wheel as it is listed then."""
    wheel = wheel or key()
    assert take(services, giver, wheel.digest, wheel, hashlib.sha256(content).hexdigest(), content).whole
    return next(one for one in wheels.listed(services) if one["id"] == wheel.digest)


def take(
    services: Services, giver: Node, digest: str, wheel: WheelKey, sha256: str, content: bytes = CONTENT
) -> Received:
    chunk = Chunk(size=len(content), total=len(content))
    return wheels.take(services, giver, digest, wheel, sha256, io.BytesIO(content), chunk)


def stored(services: Services) -> list[bytes]:
    return sorted(path.read_bytes() for path in (services.settings.home / "files").glob("*"))


def test_what_a_builder_gives_is_told_to_all(services: Services, builder: Node) -> None:
    other = like(services, "n2")
    assert wheels.told(services, other, key().digest, "toy") == {"wheel": None, "builder": False, "awaited": None}
    assert wheels.told(services, builder, key().digest, "toy")["builder"] is True
    given = give(services, builder)
    assert (given["id"], given["sha256"], given["size"], given["node"]) == (key().digest, SHA256, len(CONTENT), "n1")
    assert given["backends"] == ["toy"]
    told = wheels.told(services, other, key().digest, "toy")
    assert told["wheel"] == {"sha256": SHA256, "size": len(CONTENT), "node": "n1"}
    assert wheels.told(services, other, key(word="x").digest, "toy")["wheel"] is None
    assert stored(services) == [CONTENT]
    assert holders.find(services, other, SHA256, called="api")["stored"] is True


@pytest.mark.parametrize("value", ["", "false", "no", "0", "FALSE"])
def test_who_has_no_label_from_an_admin_gives_nothing(services: Services, value: str) -> None:
    node = like(services, "n1")
    if value:
        node = labelled(services, node, value)
    with pytest.raises(Forbidden, match="localai-q nodes label n1 builder=true"):
        give(services, node)
    assert stored(services) == []
    assert wheels.listed(services) == []


def test_a_node_cannot_give_itself_the_label(services: Services) -> None:
    ready_node(services)
    secret = {"Authorization": "Bearer s"}
    node_id = node_named(services, "n1").id
    with web_process(services.settings) as app, app.test_client() as http:
        for hardware in ({"labels": {"builder": "true"}}, {"builder": "true"}, {"given_labels": {"builder": "true"}}):
            http.post(f"/api/node/{node_id}/heartbeat", json={"hardware": hardware}, headers=secret)
        told = {"hardware": {}, "labels": {"builder": "true"}}
        assert http.post(f"/api/node/{node_id}/heartbeat", json=told, headers=secret).status_code == 400
        assert http.patch("/api/nodes/n1/labels", json={"builder": "true"}, headers=secret).status_code == 401
    with pytest.raises(Forbidden):
        give(services, node_named(services, "n1"))


def test_only_what_some_backend_needs_is_taken(services: Services, builder: Node) -> None:
    with pytest.raises(Conflict, match=r"No backend needs toy-package 1\.0 compiled like that"):
        give(services, builder, key(word="other"))
    for changes in ({"version": "1.1"}, {"package": "mine"}, {"build": "cuda12"}):
        with pytest.raises(Conflict, match="No backend needs"):
            give(services, builder, key().model_copy(update=changes))
    assert stored(services) == []


def test_what_is_not_what_it_says_is_refused(
    services: Services, builder: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidValue, match=f"SHA-256 is {SHA256}, not"):
        take(services, builder, key().digest, key(), "0" * 64)
    with pytest.raises(InvalidValue, match="64 characters"):
        take(services, builder, key().digest, key(), "../../etc/passwd")
    with pytest.raises(InvalidValue, match="not the one of the path"):
        take(services, builder, "0" * 64, key(), SHA256)
    monkeypatch.setattr(wheels, "MOST", 0)
    with pytest.raises(Conflict, match="0 wheels already"):
        give(services, builder)
    assert stored(services) == []
    assert wheels.listed(services) == []


def test_the_first_that_was_given_stays_as_long_as_its_file_is_there(services: Services, builder: Node) -> None:
    give(services, builder)
    assert give(services, builder, content=b"another")["sha256"] == SHA256
    assert stored(services) == [CONTENT]
    uploads.path_of(services, SHA256).unlink()
    assert give(services, builder, content=b"another")["sha256"] == hashlib.sha256(b"another").hexdigest()
    assert stored(services) == [b"another"]
    assert len(wheels.listed(services)) == 1


def test_a_wheel_goes_when_no_backend_needs_it_any_more(
    services: Services, builder: Node, gallery: Callable[..., None], tmp_path: Path
) -> None:
    give(services, builder)
    give(services, builder, key(word="x"), b"flagged")
    nodes.heartbeat(services, builder, hardware={**LIKE, "files": [SHA256, "a" * 64]})
    assert cleaning.unnamed_on(services, node_named(services, "n1")) == ["a" * 64]
    cleaning.tidy(services)
    assert len(wheels.listed(services)) == 2
    gallery(entry("flagged", word="x"))
    (tmp_path / "gallery.yaml").rename(tmp_path / "away")
    cleaning.tidy(services)
    assert len(wheels.listed(services)) == 2, "a gallery that cannot be read says nothing"
    (tmp_path / "away").rename(tmp_path / "gallery.yaml")
    galleries._of_backends.clear()
    cleaning.tidy(services)
    assert [wheel["settings"] for wheel in wheels.listed(services)] == [{"word": "x"}]
    assert stored(services) == [b"flagged"]
    assert cleaning.unnamed_on(services, node_named(services, "n1")) == sorted(["a" * 64, SHA256])


def test_an_upload_that_is_a_wheel_too_stays_when_its_model_goes(services: Services, builder: Node) -> None:
    give(services, builder)
    add_model(services, source=f"store:{SHA256}", sha256=SHA256)
    models.remove(services, "m")
    assert stored(services) == [CONTENT]
    add_model(services, source=f"store:{SHA256}", sha256=SHA256)
    wheels.remove(services, key().digest)
    assert stored(services) == [CONTENT], "the model needs it"
    with pytest.raises(NotFound, match="localai-q backends wheels"):
        wheels.remove(services, key().digest)


# --- waiting for a builder


def install_on(services: Services, node: Node, backend: str = "toy", kind: str = "install_backend") -> str:
    request = {"kind": kind, "backend": backend}
    return jobs.submit_node_job(services, kind=kind, node_id=node.id, model_id=None, request=request)


def awaited(services: Services, asker: Node, backend: str = "toy") -> str | None:
    found = wheels.told(services, asker, key().digest, backend)["awaited"]
    return found["node"] if found else None


def test_a_builder_that_makes_the_same_backend_is_waited_for(services: Services, builder: Node) -> None:
    asker = like(services, "n2")
    job_id = install_on(services, builder)
    assert wheels.told(services, asker, key().digest, "toy")["awaited"] == {"node": "n1", "percentage": 0.0}
    assert awaited(services, asker, "flagged") is None, "that is another backend"
    assert awaited(services, builder) is None, "no two wait for each other"
    assert awaited(services, labelled(services, asker)) is None
    with services.db.transaction() as db:
        node_rows.move(db, builder.id, NodeState.OFFLINE)
    assert awaited(services, like(services, "n3")) is None, "it is away"
    with services.db.transaction() as db:
        node_rows.move(db, builder.id, NodeState.READY)
    assert awaited(services, like(services, "n3")) == "n1"
    give(services, builder)
    assert awaited(services, like(services, "n3")) is None, "it is there"
    assert job_id


def test_who_makes_something_else_or_for_others_is_not_waited_for(services: Services, builder: Node) -> None:
    asker = like(services, "n2")
    install_on(services, builder, kind="delete_backend")
    assert awaited(services, asker) is None
    install_on(services, builder, kind="upgrade_backend")
    assert awaited(services, asker) == "n1"
    assert awaited(services, like(services, "n3", arch="aarch64")) is None


def test_a_builder_whose_job_has_ended_is_waited_for_no_more(services: Services, builder: Node) -> None:
    asker, job_id = like(services, "n2"), install_on(services, builder)
    assert awaited(services, asker) == "n1"
    admin, _ = keys.create(services, name="a", role="admin")
    assert jobs.cancel(services, job_id, admin) == "cancelled"
    jobs.apply_ends(services)
    assert jobs.show(services, job_id, admin)["state"] is JobState.CANCELLED
    assert awaited(services, asker) is None


# --- over HTTP


@pytest.fixture
def http(services: Services):
    with web_process(services.settings) as app, app.test_client() as client:
        yield client


OWN = {"Authorization": "Bearer s"}


def put(http: Any, node: Node, wheel: WheelKey | None = None, content: bytes = CONTENT, **headers: str) -> Any:
    wheel = wheel or key()
    headers = {**OWN, WHEEL_HEADER: json.dumps(wheel.model_dump()), **headers}
    sha256 = hashlib.sha256(content).hexdigest()
    return http.put(f"/api/node/{node.id}/wheels/{wheel.digest}?sha256={sha256}", data=content, headers=headers)


def test_nodes_give_and_ask_with_their_own_secret(services: Services, http: Any, builder: Node) -> None:
    other = like(services, "n2")
    assert put(http, other).status_code == 403
    assert put(http, builder, Authorization="Bearer x").status_code == 403
    assert put(http, builder, Authorization="").status_code == 401
    assert put(http, builder).status_code == 201
    assert put(http, builder).status_code == 201, "it is there already"
    path = f"/api/node/{other.id}/wheels/{key().digest}?backend=toy"
    assert http.get(path, headers=OWN).get_json()["wheel"]["sha256"] == SHA256
    assert http.get(path).status_code == 401
    assert http.get(f"/api/node/{other.id}/files/{SHA256}", headers=OWN).data == CONTENT


def test_a_wheel_comes_in_parts_and_counts_when_it_is_whole(services: Services, http: Any, builder: Node) -> None:
    def part(start: int, end: int) -> int:
        path = f"/api/node/{builder.id}/wheels/{key().digest}?sha256={SHA256}"
        headers = {**OWN, WHEEL_HEADER: json.dumps(key().model_dump()),
                   "Content-Range": f"bytes {start}-{end - 1}/{len(CONTENT)}"}  # fmt: skip
        return http.put(path, data=CONTENT[start:end], headers=headers).status_code

    assert (part(0, 9), part(10, 12)) == (308, 416)
    assert wheels.listed(services) == []
    assert part(9, len(CONTENT)) == 201
    assert wheels.listed(services)[0]["sha256"] == SHA256


@pytest.mark.parametrize(
    "header", ["", "{", "[]", '{"package": "a"}', json.dumps({**key().model_dump(), "package": "../x"}),
               json.dumps({**key().model_dump(), "more": 1})],
)  # fmt: skip
def test_a_key_that_is_none_is_refused(http: Any, builder: Node, header: str) -> None:
    assert put(http, builder, **{WHEEL_HEADER: header}).status_code == 400


def test_what_is_too_large_is_refused(
    services: Services, http: Any, builder: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_routes, "LARGEST_WHEEL", 10)
    assert put(http, builder).status_code == 413
    assert put(http, builder, **{"Content-Range": f"bytes 0-0/{len(CONTENT)}"}, content=CONTENT[:1]).status_code == 413
    assert stored(services) == []


def test_admins_see_and_forget_them(services: Services, http: Any, builder: Node) -> None:
    give(services, builder)
    admin = {"Authorization": f"Bearer {keys.create(services, name='a', role='admin')[1]}"}
    user = {"Authorization": f"Bearer {keys.create(services, name='u', role='user')[1]}"}
    assert http.get("/api/wheels", headers=user).status_code == 403
    (shown,) = http.get("/api/wheels", headers=admin).get_json()["wheels"]
    assert shown["id"] == key().digest
    assert {
        "package": "toy-package",
        "version": "1.0",
        "cpu": "x86-64-v3",
        "node": "n1",
        "backends": ["toy"],
    }.items() <= (shown.items())
    assert http.delete(f"/api/wheels/{shown['id']}", headers=user).status_code == 403
    assert http.delete(f"/api/wheels/{shown['id']}", headers=admin).status_code == 200
    assert http.delete(f"/api/wheels/{shown['id']}", headers=admin).status_code == 404
    assert stored(services) == []
