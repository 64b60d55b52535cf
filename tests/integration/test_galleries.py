"""Galleries of backends that settings name: what they add, and what of them is refused."""

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from cluster_data import add_model, model_named, node_named, ready_node, reported
from file_server import FileServer, Remote
from sqlalchemy import text
from test_replicas_service import GB, only

from localai_q import names, network
from localai_q.cluster.backends import Op
from localai_q.cluster.memory import Memory
from localai_q.cluster.states import ReplicaState
from localai_q.config import Settings, load_settings
from localai_q.errors import InvalidValue, NotFound, StartupError
from localai_q.gallery import catalog
from localai_q.gallery.catalog import External
from localai_q.services import backends, galleries, models, nodes, replicas
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from localai_q.store import replicas as replica_rows

ENTRY = """
- name: mine
  version: "2"
  description: d
  capabilities: [chat]
  builds: {cpu: {archive: {source: "https://x.example/mine.tgz", sha256: "%s"}}}
""" % ("0" * 64)
FOR_GPUS = ENTRY.replace("cpu:", "cuda12:")
NVIDIA = {"index": 0, "vendor": "nvidia", "vram_total": 8 * GB, "vram_free": 8 * GB}


# Of a hundred thousand lists in one another, if somebody writes them out.
BOMB = (
    "- {x: [&a [x], &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]"
    + "".join(f", &{name} [{', '.join([f'*{before}'] * 10)}]" for before, name in zip("bcdef", "cdefg", strict=True))
    + "], name: *g}"
)


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(ENTRY)
    return path


def naming(services: Services, *places: object, **more: object) -> Services:
    """The services of a process whose settings name these galleries."""
    text = ", ".join(map(str, places))
    return replace(services, settings=services.settings.model_copy(update={"backend_galleries": text, **more}))


def test_a_backend_that_serves_one_at_a_time_gets_no_model_with_more_slots(services: Services, gallery: Path) -> None:
    gallery.write_text(ENTRY.replace("capabilities", "most_slots: 1, capabilities".replace(", ", "\n  ")))
    own = naming(services, gallery)
    mine = {"backend": "mine", "source": "https://x.example/m.gguf", "sha256": "1" * 64}
    add_model(own, "m", **mine)
    assert model_named(own, "m").config.slots == 1
    with pytest.raises(InvalidValue, match="works on 1 request"):
        add_model(own, "n", **mine, slots=2)
    with pytest.raises(InvalidValue, match="works on 1 request"):
        models.edit(own, "m", {"slots": 2})
    with pytest.raises(InvalidValue, match="does not do embedding; it does: chat"):
        models.edit(own, "m", {"embeddings": True})
    assert models.edit(own, "m", {"backend": "echo", "slots": 8})["slots"] == 8
    assert models.edit(own, "m", {"backend": "mine"})["slots"] == 1


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


def test_a_backend_can_be_named_after_its_gallery(services: Services, gallery: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(ENTRY.replace("mine", "second", 1) + ENTRY.replace('"2"', '"3"'))
    own = naming(services, json.dumps([{"name": "a", "url": str(gallery)}, {"name": "b", "url": str(other)}]))
    node = ready_node(own)
    given = External(uri="oci://x.example/b:1", name="given", alias="there")
    backends.install_external_on(own, node, given)
    assert {one["id"]: one["gallery"] for one in backends.available(own)} == {
        **{f"builtin@{entry.name}": {"name": "builtin"} for entry in catalog.catalog().backends},
        "external@given": {"name": "external"}, "a@mine": {"name": "a"}, "b@second": {"name": "b"}}  # fmt: skip
    assert [(one["name"], one["backends"]) for one in galleries.shown(own)] == [
        ("a", ["mine"]),
        ("b", ["second", "mine"]),
    ]
    for wanted, name in (
        ("builtin@echo", "echo"),
        ("a@mine", "mine"),
        ("external@there", "given"),
        ("b@second", "second"),
    ):
        assert backends.change_everywhere(own, Op.INSTALL, wanted)["gallery_element_name"] == name
        backends.change(own, node, Op.INSTALL, wanted)
    for wanted in ("b@mine", "a@echo", "nowhere@mine", "@b@mine"):
        with pytest.raises(NotFound, match=r"no backend '(mine|echo)' in the gallery"):
            backends.change(own, node, Op.INSTALL, wanted)
        with pytest.raises(NotFound, match="in the gallery"):
            backends.change_everywhere(own, Op.UPGRADE, wanted)


def test_what_is_in_no_gallery_any_more_is_deleted_by_its_name_in_one(services: Services, gallery: Path) -> None:
    has = {"name": "mine", "version": "2", "digest": "a" * 64, "build": "cpu", "installed_at": 1.0}
    node = ready_node(services)
    nodes.heartbeat(services, node, hardware={"backends": [has]})
    told = backends.change_everywhere(services, Op.DELETE, "gone@mine")
    assert (told["gallery_element_name"], [each["node_name"] for each in told["nodes"]]) == ("mine", ["n1"])


def test_a_backend_that_some_gallery_has_is_not_deleted_by_its_name_in_another(
    services: Services, gallery: Path
) -> None:
    own = naming(services, json.dumps([{"name": "a", "url": str(gallery)}]))
    has = {"version": "2", "digest": "a" * 64, "build": "cpu", "installed_at": 1.0}
    node = ready_node(own)
    backends.install_external(own, External(uri="oci://x.example/b:1", name="given", alias="there"))
    nodes.heartbeat(own, node, hardware={"backends": [{**has, "name": name} for name in ("echo", "mine", "given")]})
    node = node_named(own, "n1")
    for wanted in ("a@echo", "gone@mine", "a@given", "a@there", "gone@there"):
        with pytest.raises(NotFound, match="in the gallery"):
            backends.change_everywhere(own, Op.DELETE, wanted)
        with pytest.raises(NotFound, match="in the gallery"):
            backends.change(own, node, Op.DELETE, wanted)
    backends.change(own, node, Op.DELETE, "a@mine")


def test_what_comes_with_this_version_is_known_without_a_look_at_galleries(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Services] = []
    listed = galleries.listed
    monkeypatch.setattr(galleries, "listed", lambda services: looks.append(services) or listed(services))
    assert galleries.record(services, "echo") is None
    assert looks == []
    backends.change(services, ready_node(services), Op.INSTALL, "echo")
    assert len(looks) == 1


def test_what_a_gallery_says_to_use_gpus_is_booked_in_their_memory_by_whoever_has_not_read_it_yet(
    services: Services, gallery: Path
) -> None:
    gallery.write_text(FOR_GPUS)
    own = naming(services, gallery)
    add_model(own, "m", backend="mine", memory=GB, source="https://x.example/m.gguf", sha256="1" * 64)
    assert set(galleries.builds(own)["mine"]) == {"cuda12"}
    node = ready_node(own)
    has = {"ram_available": 4 * GB, "gpus": [NVIDIA]}
    nodes.heartbeat(own, node, hardware=has)
    replicas.place(own, model_named(own, "m"), node.id)
    placed = only(own)
    assert placed.reserved == Memory(vram=GB)
    with own.db.transaction() as db:
        for state in (ReplicaState.INSTALLING, ReplicaState.LOADING):
            assert replica_rows.move(db, placed.id, state, job_id="load")
    told = nodes.replica_spec(own, node, placed.id)
    with own.db.transaction() as db:
        db.execute(text("DELETE FROM replicas"))
    nodes.heartbeat(services, node, hardware=has, reported=[reported(placed, gpu=told["gpu"])])
    assert only(own).reserved == Memory(vram=GB), "it is adopted with what it was booked with"


def test_whoever_places_has_read_all_galleries_and_who_may_not_wait_does_not(
    services: Services, server: FileServer
) -> None:
    url = server.put("/slow.yaml", Remote(FOR_GPUS.encode(), block=64, pause=0.1))
    own = naming(services, url, allow_private_sources=True)
    assert "mine" not in galleries.builds(own)
    replicas.reconcile(own)
    assert "mine" in galleries.builds(own)


def test_a_server_that_never_comes_to_an_end_holds_nobody_up(
    services: Services, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "ANSWER_WITHIN", 0.3)
    own = naming(services, server.put("/l", Remote(b"x" * 1000, block=1, pause=0.05)), allow_private_sources=True)
    assert "has not answered in full within 0 s" in error_of(own)


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


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "api.example"]
)
def test_no_other_name_for_the_cluster_gets_through(
    services: Services, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    real = socket.getaddrinfo

    def lookup(name: str, port: int, *args: object, **more: object) -> list[object]:
        found = "127.0.0.1" if name == "api.example" else name
        return list(real(found, port, *args, **more))

    monkeypatch.setattr("localai_q.network.socket.getaddrinfo", lookup)
    assert "LOCALAI_Q_ALLOW_PRIVATE_SOURCES=true allows that, on the node, or for galleries on the API" in error_of(
        naming(services, f"http://{host}/l")
    )


def test_what_was_read_stays_when_a_gallery_breaks(
    services: Services, gallery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(galleries, "FRESH", 0.0)
    own = naming(services, gallery)
    assert galleries.backend(own, "mine").version == "2"
    gallery.write_text("{")
    found = galleries.Gallery(str(gallery), galleries._read_backends)
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
        (ENTRY.replace('version: "2"', 'version: "../2"'), "wrong at 'mine', version"),
        (ENTRY.replace("{archive:", "{requirements: ['x @ http://10.0.0.1/x.whl'], archive:"), "not from an address"),
        (ENTRY.replace("{archive:", "{requirements: ['x --index-url http://10.0.0.1'], archive:"), "is no requirement"),
        ("&a [*a, *a]", "what it is a part of"),
        (BOMB, "more than 500000 values"),
        ("\x00", "cannot read"),
        ("x" * ((4 << 20) + 1), "more than 4 MiB"),
    ],
)
def test_a_wrong_gallery_adds_nothing_and_says_why(services: Services, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    own = naming(services, tmp_path / "wrong.yaml")
    assert says in error_of(own)
    assert len(error_of(own)) < 1000
    assert [entry.name for entry in galleries.backends(own)] == [entry.name for entry in galleries.backends(services)]


def test_a_gallery_that_is_not_there_is_named(services: Services, tmp_path: Path) -> None:
    assert "No such file" in error_of(naming(services, tmp_path / "none.yaml"))


@pytest.mark.parametrize("value", ["list.yaml", "ftp://x/y", "https://", "/a relative", '[{"url": "/a"}]', "[{"])
def test_a_setting_that_names_no_gallery_stops_the_start(value: str) -> None:
    with pytest.raises(StartupError, match=r"LOCALAI_Q_BACKEND_GALLERIES.*(whole paths|needs the form)"):
        load_settings(backend_galleries=value)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a", "a"], "another name for each"),
        (["builtin"], "another name than 'builtin'"),
        (["a", "external"], "another name than 'external'"),
        (["a/b"], "another name than 'a/b'"),
        (["a@b"], "another name than 'a@b'"),
        ([""], "another name than ''"),
        (["n" * 101], "1 to 100 characters"),
    ],
)
@pytest.mark.parametrize("setting", ["backend_galleries", "galleries"])
def test_a_name_of_a_gallery_by_which_nobody_could_name_it_stops_the_start(
    setting: str, names: list[str], says: str
) -> None:
    value = json.dumps([{"name": name, "url": f"/{number}"} for number, name in enumerate(names)])
    with pytest.raises(StartupError, match=says) as error:
        load_settings(**{setting: value})
    assert error.value.message.startswith(str(Settings.model_fields[setting].validation_alias))


def test_of_two_backends_with_one_alias_the_first_is_meant(services: Services, tmp_path: Path) -> None:
    for number, name in enumerate(("mine", "yours")):
        (tmp_path / str(number)).write_text(ENTRY.replace("mine", name) + "  alias: shared\n")
    own = naming(services, tmp_path / "0", tmp_path / "1")
    assert galleries.backend(own, "shared").name == "mine"
    assert galleries.backend(own, "2@shared").name == "yours"
