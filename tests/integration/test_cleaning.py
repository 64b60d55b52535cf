"""Files that no model names leave the nodes, also those that were away; and models learn what their file is."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cluster_data import add_model, api_over_http, claim, model_named, node_named, ready_node

from localai_q import names
from localai_q.cluster.events import End
from localai_q.cluster.models import ModelConfig
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState, NodeState
from localai_q.errors import Conflict, Forbidden, InvalidValue
from localai_q.services import cleaning, jobs, models, nodes, replicas
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from localai_q.store import nodes as node_rows
from localai_q.store import replicas as replica_rows
from workers.child import ChildSpec
from workers.identity import Identity
from workers.node.job_child import JobOrder, clean_models
from workers.node.store import Store

A, B = "a" * 64, "b" * 64
HUB = "huggingface://o/r/m.gguf"


@pytest.fixture
def node(services: Services) -> Node:
    return has(services, ready_node(services), [])


def has(services: Services, node: Node, files: list[str]) -> Node:
    nodes.heartbeat(services, node, hardware={"files": files, "disk_total": 1 << 40, "disk_free": 1 << 39})
    return node_named(services, node.name)


def cleanings(services: Services, node: Node) -> list[dict]:
    """What the node is to clean, the newest first; None of those that have ended."""
    with services.db.transaction() as db:
        found = job_rows.newest(db, kind="clean_models", line=names.node_jobs_queue(node.id), limit=9)
        return [job_rows.request(db, job.id) for job in found]


def done(services: Services, node: Node, result: dict, kind: str = "clean_models") -> None:
    """The node ends its job of this kind."""
    line = names.node_jobs_queue(node.id)
    with services.db.transaction() as db:
        (job_id,) = [job.id for job in job_rows.open_in(db, line) if job.kind == kind]
    lease = claim(services, job_id, line, node.id)
    assert services.leases.finish(lease, 1, End(state=JobState.DONE, result=result), node_id=node.id)
    jobs.apply_ends(services)


def test_what_a_model_names_stays_and_what_none_names_goes(services: Services, node: Node) -> None:
    add_model(services, source="file:/m.gguf", sha256=A)
    has(services, node, [A])
    cleaning.tidy(services)
    assert cleanings(services, node) == []
    has(services, node, [A, B])
    cleaning.tidy(services)
    cleaning.tidy(services)
    (request,) = cleanings(services, node)
    assert request == {"kind": "clean_models", "grace": 600.0, "floor": 1 << 30, "dry_run": False}
    assert cleaning.unnamed_on(services, node_named(services, "n1")) == [B]
    models.remove(services, "m")
    done(services, node, {"removed": [{"sha256": B, "size": 1, "age": 2}], "kept": []})
    cleaning.tidy(services)
    assert cleanings(services, node)[0]
    assert cleaning.unnamed_on(services, node_named(services, "n1")) == [A, B]


def test_what_a_node_keeps_for_a_time_is_not_asked_for_all_the_time(services: Services, node: Node) -> None:
    has(services, node, [B])
    cleaning.tidy(services)
    done(services, node, {"removed": [], "kept": [B], "dry_run": False})
    cleaning.tidy(services)
    assert cleanings(services, node) == [None]


def test_a_node_that_was_away_is_cleaned_when_it_is_back(services: Services, node: Node) -> None:
    has(services, node, [B])
    with services.db.transaction() as db:
        node_rows.move(db, node.id, NodeState.OFFLINE)
    cleaning.tidy(services)
    assert cleanings(services, node) == []
    has(services, node, [B])
    cleaning.tidy(services)
    assert len(cleanings(services, node)) == 1


def test_by_hand_and_dry(services: Services, node: Node) -> None:
    node = has(services, node, [B])
    answer = cleaning.clean(services, node, dry_run=True)
    assert (answer["files"], answer["dry_run"]) == (1, True)
    done(services, node, {"removed": [{"sha256": B}], "kept": [], "dry_run": True})
    cleaning.tidy(services)
    assert cleanings(services, node)[0]["dry_run"] is False, "a dry run is no cleaning"
    with pytest.raises(Conflict, match="'n1' is offline: it is cleaned when it is back"):
        cleaning.clean(services, replace(node, state=NodeState.OFFLINE), dry_run=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A node's folder with two files."""
    found = Store(tmp_path)
    found.folder.mkdir()
    for sha256 in (A, B):
        found.part(sha256).write_bytes(b"12345")
        found.keep(found.part(sha256), sha256)
        os.utime(found.part(sha256, "used"), (time.time() - 100,) * 2)
    return found


@pytest.fixture
def clean(services: Services, store: Store, tmp_path: Path) -> Iterator[Callable[..., dict]]:
    """Cleans as the node's process does, which asks the API over HTTP."""
    identity = Identity(tmp_path / "identity.json")
    node = has(services, ready_node(services, secret=identity.secret()), [A, B])
    spec = ChildSpec(node_id=node.id, node_name="n", redis_url="", lease=1, journal_ttl=1, journal_max=1, load_stall=1,
                     status_fd=-1, backends=tmp_path, models=tmp_path, identity=identity.path,
                     api_url="")  # fmt: skip
    with api_over_http(services) as url:

        def cleaned(**changes: object) -> dict:
            request = {"grace": 600.0, "floor": 0, "dry_run": False, **changes}
            order = JobOrder(spec=spec.model_copy(update={"api_url": url}), request=request, fd=-1)
            return clean_models(order, lambda _: None)

        yield cleaned


def test_what_the_node_does_about_it(services: Services, store: Store, clean: Callable[..., dict]) -> None:
    add_model(services, source="file:/m.gguf", sha256=A)
    assert clean() == {"removed": [], "kept": [B], "freed": 0, "dry_run": False}
    assert [blob["sha256"] for blob in clean(grace=0.0, dry_run=True)["removed"]] == [B]
    assert (store.folder / B).exists()
    found = clean(grace=0.0)
    assert (found["freed"], found["kept"], store.find(B)) == (5, [], None)
    assert (store.folder / A).exists()
    models.remove(services, "m")
    assert [blob["sha256"] for blob in clean(floor=1 << 60)["removed"]] == [A]


def test_a_model_that_came_after_the_order_to_clean_keeps_its_file(
    services: Services, store: Store, clean: Callable[..., dict]
) -> None:
    cleaning.tidy(services)
    (request,) = cleanings(services, node_named(services, "n1"))
    add_model(services, source="file:/m.gguf", sha256=A)  # while the order waits for its turn
    assert [blob["sha256"] for blob in clean(**{**request, "grace": 0.0})["removed"]] == [B]
    assert (store.folder / A).exists()


def test_a_file_whose_model_learns_of_it_at_this_moment_stays_on_a_full_disk(
    store: Store, clean: Callable[..., dict]
) -> None:
    store.part(A, "used").touch()
    assert [blob["sha256"] for blob in clean(floor=1 << 60)["removed"]] == [B]


def test_a_node_that_cannot_ask_removes_nothing(services: Services, store: Store, clean: Callable[..., dict]) -> None:
    with services.db.transaction() as db:
        node_rows.remove(db, node_named(services, "n1").id)
    with pytest.raises(Forbidden):
        clean(grace=0.0)
    assert store.files() == [A, B]


# --- what a model's file is


def test_sources_are_checked_when_a_model_is_added(services: Services) -> None:
    def add(**config: object) -> None:
        models.add(services, "m", ModelConfig(**{"backend": "xllamacpp", **config}))

    for config, message, field in (
        ({"source": "ftp://x/m", "sha256": A}, "is no source of a model's file", "source"),
        ({"source": "https://x/m"}, "needs its SHA-256", "sha256"),
        ({"source": "s3://bucket/m"}, "needs its SHA-256", "sha256"),
        ({"source": f"store:{A}", "sha256": A}, "has not been uploaded", "source"),
        ({"source": HUB, "mirrors": ["https://x/m"]}, "go with a source of the form https", "mirrors"),
        ({"backend": "echo", "mirrors": ["https://x/m"]}, "go with a source of the form https", "mirrors"),
    ):
        with pytest.raises(InvalidValue, match=message) as caught:
            add(**config)
        assert caught.value.param == field
    add(source="https://x/m", sha256=A, mirrors=["https://y/m"])


def staged(services: Services, node: Node, result: dict) -> None:
    """A node has fetched the file of the model `m`."""
    add_model(services, source=HUB, min_replicas=1)
    replicas.reconcile(services)
    replicas.reconcile(services)
    done(services, node, {}, "install_backend")
    replicas.reconcile(services)
    done(services, node, result, "fetch_model")
    replicas.reconcile(services)


def test_what_the_source_knew_is_noted_in_the_model(services: Services, node: Node) -> None:
    staged(services, node, {"sha256": A, "size": 1000, "facts": None})
    model = model_named(services, "m")
    assert (model.config.sha256, model.config.size, model.config.source, model.revision) == (A, 1000, HUB, 1)
    with services.db.transaction() as db:
        (replica,) = replica_rows.every(db)
    assert nodes.replica_spec(services, node, replica.id)["model"]["sha256"] == A


@pytest.mark.parametrize("result", [{"sha256": "x", "size": 1}, {"sha256": A, "size": -1}, {"sha256": 5, "size": None}])
def test_what_cannot_be_is_not_noted(services: Services, node: Node, result: dict) -> None:
    staged(services, node, result)
    assert model_named(services, "m").config.sha256 is None
