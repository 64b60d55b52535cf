"""A node is told who has a file that it needs, with tickets; of other files, and by others, nothing is told."""

import logging
import time

import pytest
from cluster_data import add_model, model_named, node_named, ready_node, web_process

from localai_q.cluster.nodes import Node
from localai_q.cluster.tickets import is_valid
from localai_q.errors import InvalidValue, NotFound
from localai_q.services import holders, models, nodes, replicas, uploads
from localai_q.services.wiring import Services

FILE, OTHER = "a" * 64, "b" * 64
AT = "10.0.0.1"


@pytest.fixture
def asker(services: Services) -> Node:
    """A node that is to run a model of `FILE`."""
    add_model(services, source="https://host/m.gguf", sha256=FILE, size=1000, memory=1000)
    add_model(services, "other", source="https://host/o.gguf", sha256=OTHER, size=1000, memory=1000)
    found = ready_node(services)
    nodes.heartbeat(services, found, hardware={"ram_total": 10**9, "ram_available": 10**9, "files": []})
    replicas.place(services, model_named(services, "m"), found.id)
    return node_named(services, "n1")


def has(services: Services, name: str, *files: str, **told: object) -> Node:
    ready_node(services, name)
    hardware = {"files": list(files), "files_address": f"10.0.0.{name[1:]}:7000", **told}
    nodes.heartbeat(services, node_named(services, name), hardware=hardware)
    return node_named(services, name)


def test_holders_are_told_with_a_ticket_each(services: Services, asker: Node) -> None:
    busy, idle = has(services, "n2", FILE, transfers=3), has(services, "n3", FILE, OTHER)
    has(services, "n4", OTHER)
    found = holders.find(services, asker, FILE, called=AT)
    assert [holder["name"] for holder in found["holders"]] == ["n3", "n2"]
    assert found["holders"][0]["url"] == f"http://10.0.0.3:7000/blobs/{FILE}"
    assert found["stored"] is False
    first, second = (holder["ticket"] for holder in found["holders"])
    now = time.time()
    assert is_valid(first, idle.secret_hashes, idle.id, FILE, now=now)
    assert not is_valid(first, busy.secret_hashes, busy.id, FILE, now=now)
    assert not is_valid(second, busy.secret_hashes, busy.id, OTHER, now=now)


def test_only_what_the_node_is_to_run_is_told(services: Services, asker: Node) -> None:
    holder = has(services, "n2", FILE, OTHER)
    for node, sha256 in ((asker, OTHER), (asker, "c" * 64), (holder, FILE)):
        with pytest.raises(NotFound, match="nothing to do with the file"):
            holders.find(services, node, sha256, called=AT)
        with pytest.raises(NotFound, match="nothing to do with the file"):
            holders.blame(services, node, sha256, holder.id)
    with pytest.raises(InvalidValue, match="64 characters"):
        holders.find(services, asker, "../../etc/passwd", called=AT)
    models.remove(services, "m")
    with pytest.raises(NotFound):
        holders.find(services, asker, FILE, called=AT)


def test_a_file_that_was_uploaded_is_in_the_apis_own_store(services: Services, asker: Node) -> None:
    path = uploads.path_of(services, FILE)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert holders.find(services, asker, FILE, called=AT) == {"holders": [], "stored": True}


def test_a_holder_that_is_blamed_is_named_in_the_log(
    services: Services, asker: Node, caplog: pytest.LogCaptureFixture
) -> None:
    holder = has(services, "n2", FILE)
    with caplog.at_level(logging.WARNING):
        holders.blame(services, asker, FILE, holder.id)
    assert "node n1 got wrong bytes" in caplog.text
    assert "from node n2" in caplog.text
    with pytest.raises(NotFound, match="There is no node"):
        holders.blame(services, asker, FILE, "nobody")


def test_over_http_with_the_nodes_own_secret(services: Services, asker: Node) -> None:
    has(services, "n2", FILE, files_address="0.0.0.0:7000")
    path = f"/api/node/{asker.id}/holders/{FILE}"
    with web_process(services.settings) as app, app.test_client() as http:
        own = {"Authorization": "Bearer s", "Host": "api.lan:8080"}
        (holder,) = http.get(path, headers=own).get_json()["holders"]
        assert holder["url"] == f"http://api.lan:7000/blobs/{FILE}", "on the API's machine, as this node calls that"
        assert http.post(f"{path}/{holder['node']}/wrong", headers=own).status_code == 200
        assert http.get(path, headers={"Authorization": "Bearer x"}).status_code == 403
        assert http.get(path).status_code == 401
        assert http.get(f"/api/node/{asker.id}/holders/{OTHER}", headers=own).status_code == 404
        told = {"hardware": {"files_address": "http://10.0.0.1/"}, "replicas": []}
        assert http.post(f"/api/node/{asker.id}/heartbeat", json=told, headers=own).status_code == 400
