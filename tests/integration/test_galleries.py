"""Galleries of backends that settings name: what they add, and what of them is refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cluster_data import add_model, ready_node
from file_server import FileServer, Remote, serve

from localai_q import names
from localai_q.cluster.backends import Op
from localai_q.config import load_settings
from localai_q.errors import NotFound, StartupError
from localai_q.services import backends, galleries
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows

ENTRY = """
- name: mine
  version: "2"
  description: d
  capabilities: [chat]
  builds: {cpu: {archive: {source: "https://x.example/mine.tgz", sha256: "%s"}}}
""" % ("0" * 64)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve() as found:
        yield found


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(ENTRY)
    return path


def naming(services: Services, *places: object, **more: object) -> Services:
    """The services of a process whose settings name these galleries."""
    text = ", ".join(map(str, places))
    return replace(services, settings=services.settings.model_copy(update={"backend_galleries": text, **more}))


def error_of(services: Services) -> str:
    (shown,) = galleries.shown(services)
    return shown["error"] or ""


def test_a_gallerys_backend_can_be_used_by_models_and_its_entry_goes_with_the_job(
    services: Services, gallery: Path
) -> None:
    with pytest.raises(NotFound, match="no backend 'mine'"):
        add_model(services, "m", backend="mine", source="https://x.example/m.gguf", sha256="1" * 64)
    own = naming(services, gallery)
    add_model(own, "m", backend="mine", source="https://x.example/m.gguf", sha256="1" * 64)
    node = ready_node(own)
    job_id = backends.change(own, node, Op.INSTALL, "mine")
    with own.db.transaction() as db:
        request = job_rows.request(db, job_id)
    assert request["entry"]["builds"]["cpu"]["archive"]["source"] == "https://x.example/mine.tgz"
    backends.change_everywhere(own, Op.INSTALL, "mine")
    backends.fulfil(own)
    with own.db.transaction() as db:
        assert [job.id for job in job_rows.open_in(db, names.node_jobs_queue(node.id))] == [job_id]
    assert {"mine", "echo"} <= {entry["name"] for entry in backends.available(own)}
    assert galleries.record(own, "echo") is None


def test_a_gallery_on_the_web_is_read(services: Services, server: FileServer) -> None:
    own = naming(services, server.put("/list.yaml", Remote(ENTRY.encode())), allow_private_sources=True)
    assert galleries.backend(own, "mine").version == "2"
    assert error_of(own) == ""


def test_a_gallery_may_not_lead_to_the_cluster(services: Services, server: FileServer) -> None:
    own = naming(services, server.put("/list.yaml", Remote(ENTRY.encode())))
    assert "an address of this cluster" in error_of(own)
    assert server.seen == []
    with pytest.raises(NotFound):
        galleries.backend(own, "mine")


def test_what_was_read_stays_when_a_gallery_breaks(
    services: Services, gallery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(galleries, "FRESH", 0.0)
    own = naming(services, gallery)
    assert galleries.backend(own, "mine").version == "2"
    gallery.write_text("{")
    found = galleries.Gallery(str(gallery))
    found.entries = galleries.backends(own)[-1:]
    found.look(own.settings)
    assert "cannot read" in found.error
    assert [entry.name for entry in found.entries] == ["mine"]
    gallery.write_text(ENTRY.replace('"2"', '"3"'))
    found._look(own.settings)
    assert (found.error, found.entries[0].version) == ("", "3")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot read"),
        ("[" * 100_000, "cannot read"),
        ("a: b", "must be a list"),
        (ENTRY.replace("mine", "echo", 1), "there is already: 'echo'"),
        (ENTRY * 2, "there is already: 'mine'"),
        (ENTRY + "  default: true\n", "not for galleries"),
        (ENTRY.partition("  builds")[0] + "  source: echo\n", "not for galleries"),
        (ENTRY.replace("0000", "zzzz"), "wrong at 'mine', builds.cpu.archive.sha256"),
        (ENTRY.replace("https:", "gopher:"), "wrong at 'mine', builds.cpu.archive.source"),
        (ENTRY.replace("name: mine", "name: ../mine"), "wrong at '../mine', name"),
        ("\x00", "cannot read"),
        ("x" * ((4 << 20) + 1), "more than 4 MiB"),
    ],
)
def test_a_wrong_gallery_adds_nothing_and_says_why(services: Services, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    own = naming(services, tmp_path / "wrong.yaml")
    assert says in error_of(own)
    assert [entry.name for entry in galleries.backends(own)] == [entry.name for entry in galleries.backends(services)]


def test_a_gallery_that_is_not_there_is_named(services: Services, tmp_path: Path) -> None:
    assert "No such file" in error_of(naming(services, tmp_path / "none.yaml"))


@pytest.mark.parametrize("value", ["list.yaml", "ftp://x/y", "https://", "/a relative"])
def test_a_setting_that_names_no_gallery_stops_the_start(value: str) -> None:
    with pytest.raises(StartupError, match=r"LOCALAI_Q_BACKEND_GALLERIES.*whole paths"):
        load_settings(backend_galleries=value)
