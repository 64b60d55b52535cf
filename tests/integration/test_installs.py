"""Models by name and in LocalAI's form: what galleries list, what becomes of it, and what of both is refused."""

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from cluster_data import add_model, model_named, ready_node
from file_server import FileServer, Remote, serve
from test_galleries import BOMB
from test_replicas_service import stage

from api.admin.models import as_on_a_page
from localai_q import names, network
from localai_q.cluster.importing import Preferences
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import JobState, ReplicaState
from localai_q.config import load_settings
from localai_q.errors import (
    Cancelled,
    Conflict,
    InvalidRequest,
    InvalidValue,
    ModelNotFound,
    NotFound,
    StartupError,
    Unavailable,
)
from localai_q.gallery import catalog
from localai_q.services import galleries, holders, installs, jobs, keys, models, nodes, replicas, retries
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from localai_q.store import replicas as replica_rows

A, B = "a" * 64, "b" * 64
OURS = f"- {{name: tiny, source: 'https://x.example/t.gguf', sha256: {A}, size: 7, license: MIT, slots: 2}}"
THEIRS = f"""
- &base
  name: theirs
  license: apache-2.0
  icon: https://x.example/i.png
  urls: [https://x.example]
  config_file: {{context_size: 2048, parameters: {{temperature: 0.5, top_k: 1}}, stopwords: [END]}}
  overrides: {{parameters: {{model: their.gguf, top_k: 9}}}}
  files: [{{filename: their.gguf, uri: "huggingface://o/r/their.gguf", sha256: {B}}}]
- !!merge <<: *base
  name: again
  description: null
"""


def naming(services: Services, text: str, **more: object) -> Services:
    return replace(services, settings=services.settings.model_copy(update={"galleries": text, **more}))


def listing(services: Services, folder: Path, content: str, **more: object) -> Services:
    path = folder / "models.yaml"
    path.write_text(content)
    return naming(services, json.dumps([{"name": "mine", "url": str(path)}]), **more)


class TestGalleries:
    def test_models_of_ours_and_of_theirs_are_listed_and_installed(self, services: Services, tmp_path: Path) -> None:
        own = listing(services, tmp_path, OURS + THEIRS)
        listed = {each["id"]: each for each in installs.available(own)}
        assert {"mine@tiny", "mine@theirs", "mine@again", f"builtin@{catalog.default_model().name}"} <= listed.keys()
        assert (listed["mine@tiny"]["license"], listed["mine@tiny"]["installed"]) == ("MIT", False)
        installs.install(own, wanted="tiny", overrides={"slots": 3}, name="mini")
        mini = model_named(own, "mini").config
        assert (mini.source, mini.slots, mini.preload) == ("https://x.example/t.gguf", 3, True)
        made = installs.install(own, wanted="mine@again", overrides={"context_size": 512}, preload=False)
        config = model_named(own, "again").config
        assert (config.source, config.sha256, config.context_size) == ("huggingface://o/r/their.gguf", B, 512)
        assert (config.parameters.temperature, config.parameters.top_k, config.parameters.stop) == (0.5, 9, ["END"])
        assert (made["status"], config.preload) == (f"/models/jobs/{made['uuid']}", False)
        assert listed.keys() == {each["id"] for each in installs.available(own)}
        assert [each["name"] for each in installs.available(own) if each["installed"]] == ["again"]
        assert galleries.shown_models(own) == [
            {"name": "mine", "url": str(tmp_path / "models.yaml"), "models": 3, "error": None}]  # fmt: skip
        with pytest.raises(Conflict):
            installs.install(own, wanted="mine@again")

    def test_what_is_known_of_a_file_does_not_hold_for_another_source(self, services: Services, tmp_path: Path) -> None:
        more = f"mirrors: ['https://y.example/t'], draft_model: {{source: 'https://x.example/d', sha256: {B}, size: 3}}"
        own = listing(services, tmp_path, OURS.removesuffix("}") + f", {more}}}")
        drawn = {"source": "ollama://d"}
        installs.install(own, wanted="tiny", overrides={"source": "ollama://t", "draft_model": drawn}, name="other")
        config = model_named(own, "other").config
        assert (config.source, config.sha256, config.size, config.mirrors) == ("ollama://t", None, 0, ())
        assert (config.draft_model.sha256, config.draft_model.size, config.slots) == (None, 0, 2)
        with pytest.raises(InvalidValue, match="needs its SHA-256"):
            installs.install(own, wanted="tiny", overrides={"source": "https://z.example/t"}, name="third")
        installs.install(own, wanted="tiny", overrides={"source": "https://z.example/t", "sha256": B}, name="third")
        assert (model_named(own, "third").config.sha256, model_named(own, "third").config.size) == (B, 0)
        installs.install(own, wanted="tiny", overrides={"source": "https://x.example/t.gguf"}, name="same")
        assert (model_named(own, "same").config.sha256, model_named(own, "same").config.size) == (A, 7)

    def test_an_entry_is_the_same_for_all_who_install_it(self, services: Services, tmp_path: Path) -> None:
        own = listing(services, tmp_path, "- {name: x, config_file: {parameters: {model: 'ollama://x'}}}")
        for name in ("one", "two"):
            installs.install(own, wanted="x", name=name)
            assert model_named(own, name).config.source == "ollama://x"

    def test_a_wrong_entry_of_theirs_leaves_the_others(self, services: Services, tmp_path: Path) -> None:
        own = listing(services, tmp_path, THEIRS + "- {name: 'not a name', files: []}\n")
        assert {"mine@theirs", "mine@again"} < {each["id"] for each in installs.available(own)}
        (shown,) = galleries.shown_models(own)
        assert (shown["models"], "1 models of" in shown["error"]) == (2, True)

    def test_what_an_entry_is_made_of_is_read_from_where_it_says(
        self, services: Services, server: FileServer, tmp_path: Path
    ) -> None:
        base = "name: base\nconfig_file: |\n  context_size: 777\n  backend: llama-cpp\nfiles: []\n"
        url = server.put("/base.yaml", Remote(base.encode()))
        own = listing(services, tmp_path, f"- {{name: x, url: '{url}', overrides: {{parameters: {{model: 'ollama://x'}}}}}}",
                      allow_private_sources=True)  # fmt: skip
        made = installs.install(own, wanted="x")
        assert (model_named(own, "x").config.context_size, "xllamacpp" in made["warnings"][0]) == (777, True)
        plain = server.put("/plain.yaml", Remote(b"name: plain\nparameters: {model: 'ollama://y'}\n"))
        assert installs.import_uri(own, plain)["name"] == "plain"
        strict = replace(own, settings=own.settings.model_copy(update={"allow_private_sources": False}))
        seen = len(server.seen)
        for call in (lambda: installs.install(strict, wanted="x", name="y"), lambda: installs.install(strict, url=url)):
            with pytest.raises(InvalidValue, match="an address of this cluster"):
                call()
        assert len(server.seen) == seen

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("{", "cannot read the gallery"),
            ("a: b", "is no list of 10000 models at most"),
            ("[" + "{name: x}," * 10_001 + "]", "is no list of 10000 models at most"),
            (BOMB, "values of it"),
            ("- {name: x, source: 'https://h/x'}", "needs its sha256"),
            ("- {name: x, source: 'ftp://h/x'}", "is no source"),
            ("- {name: x, nonsense: 1}", "wrong at 'x', nonsense"),
            ("- {name: '../x', files: []}", "1 models of"),
            ("- {name: '../x', files: []}", "the first at '../x', name"),
            ("- 3", "wrong at 0"),
        ],
    )
    def test_a_list_that_is_none_lists_nothing_and_says_why(
        self, services: Services, tmp_path: Path, content: str, says: str
    ) -> None:
        own = listing(services, tmp_path, content)
        (shown,) = galleries.shown_models(own)
        assert (shown["models"], says in shown["error"]) == (0, True), shown["error"]
        assert {each["gallery"]["name"] for each in installs.available(own)} == {"builtin"}

    def test_no_gallery_leads_to_the_cluster_or_is_endless(self, services: Services, server: FileServer) -> None:
        server.put("/big", Remote(b"# " + b"x" * (5 << 20)))
        for path, allowed, says in (
            ("/l", False, "an address of this cluster"), ("/big", True, "more than 4 MiB"), ("/none", True, "status 404")
        ):  # fmt: skip
            own = naming(services, f"{server.url}{path}", allow_private_sources=allowed)
            (shown,) = galleries.shown_models(own)
            assert says in shown["error"]

    def test_no_gallery_is_led_to_a_private_address(
        self, services: Services, server: FileServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first hop is let through, as a public address would be."""
        check, real = network.Network._check, socket.getaddrinfo
        monkeypatch.setattr(
            network.Network, "_check", lambda self, host, at: host == "public.example" or check(self, host, at)
        )
        monkeypatch.setattr(socket, "getaddrinfo",
                            lambda host, *more, **how: real("127.0.0.1" if host == "public.example" else host, *more, **how))  # fmt: skip
        server.put("/inner", Remote(OURS.encode()))
        url = server.put("/l", Remote(location=f"{server.url}/inner")).replace("127.0.0.1", "public.example")
        (shown,) = galleries.shown_models(naming(services, url))
        assert "127.0.0.1 is 127.0.0.1, an address of this cluster" in shown["error"]
        assert [seen.path for seen in server.seen] == ["/l"]

    @pytest.mark.parametrize(
        "value", ["ftp://x", "relative.yaml", '[{"url": "https://x"}]', '[{"name": "a", "url": "x"}]', "[3"]
    )
    def test_a_setting_that_names_no_place_stops_the_start(self, value: str) -> None:
        with pytest.raises(StartupError, match="LOCALAI_GALLERIES"):
            load_settings(galleries=value)

    def test_the_setting_is_a_list_of_places_or_localais_json(self) -> None:
        assert load_settings(galleries="/a.yaml, https://h/b").model_galleries == {"1": "/a.yaml", "2": "https://h/b"}
        theirs = '[{"name": "localai", "url": "github:mudler/LocalAI/gallery/index.yaml@master"}]'
        assert load_settings(galleries=theirs).model_galleries == {
            "localai": "github:mudler/LocalAI/gallery/index.yaml@master"
        }
        assert galleries.GITHUB.fullmatch("github:mudler/LocalAI/gallery/index.yaml@master")

    @pytest.mark.parametrize(
        ("asked", "error", "says"),
        [
            ({"wanted": "nope"}, NotFound, "no model 'nope'"),
            ({"wanted": "other@tiny"}, NotFound, "no model 'other@tiny'"),
            ({}, InvalidValue, "either 'id' or 'url'"),
            ({"wanted": "tiny", "url": "https://h/x"}, InvalidValue, "either 'id' or 'url'"),
            ({"url": "/etc/passwd"}, InvalidValue, "is no URL"),
            ({"url": "https://[x"}, InvalidValue, "is no URL"),
            ({"url": "file:///etc/passwd"}, InvalidValue, "is no URL"),
            ({"wanted": "tiny", "overrides": {"nonsense": 1}}, InvalidRequest, "'nonsense'"),
            ({"wanted": "tiny", "files": [{}]}, InvalidValue, "'files' go with"),
            ({"wanted": "theirs", "overrides": {"nonsense": 1}}, InvalidRequest, "nonsense: no field"),
            ({"wanted": "theirs", "overrides": {"backend": "vllm"}}, InvalidRequest, "is none of"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_installed(self, services: Services, tmp_path: Path, asked: dict, error, says: str) -> None:
        own = listing(services, tmp_path, OURS + THEIRS)
        with pytest.raises(error, match=says):
            installs.install(own, **asked)
        assert models.listed(own) == []


def fetch_of(services: Services, model_id: str) -> str | None:
    """The fetch that is under way for a model, once control has looked."""
    installs.preload(services)
    jobs.apply_ends(services)
    return installs.installation(services, model_id)["job"]


class TestPreloading:
    def test_an_installed_model_is_fetched_by_a_node_that_has_room_and_shown_until_it_is_there(
        self, services: Services, node: Node, tmp_path: Path
    ) -> None:
        uuid = installs.install(services, wanted="qwen3-0.6b")["uuid"]
        assert installs.installation(services, uuid)["processed"] is False
        installs.preload(services)
        installs.preload(services)
        shown = installs.installation(services, uuid)
        assert (shown["processed"], shown["message"], shown["gallery_element_name"]) == (
            False, "its files are coming", "qwen3-0.6b")  # fmt: skip
        assert installs.installations(services) == [shown]
        request = stage(services, node, result={"sha256": A, "size": 9, "facts": None, "further": []})
        assert (request["kind"], request["sha256"], request["name"]) == ("fetch_model", None, "qwen3-0.6b")
        installs.preload(services)
        assert model_named(services, "qwen3-0.6b").config.sha256 == A
        assert installs.installation(services, uuid)["processed"] is False
        nodes.heartbeat(services, node, hardware={"files": [A]})
        shown = installs.installation(services, uuid)
        assert (shown["processed"], shown["progress"], shown["error"]) == (True, 100.0, None)
        installs.remove(services, "qwen3-0.6b")
        with pytest.raises(NotFound, match="may have been removed"):
            installs.installation(services, uuid)

    def test_what_was_fetched_before_a_model_got_another_file_is_not_taken_for_that(
        self, services: Services, node: Node
    ) -> None:
        made = {"backend": "xllamacpp", "source": "ollama://x", "preload": True}
        add_model(services, **made, loras=[{"source": "ollama://one"}])
        installs.preload(services)
        stage(services, node, result={"sha256": A, "size": 9, "further": [{"sha256": B, "size": 1}]})
        models.edit(services, "m", {"loras": [{"source": "ollama://two"}]})
        installs.preload(services)
        config = model_named(services, "m").config
        assert (config.sha256, config.loras[0].sha256) == (None, None)

    def test_a_fetch_ends_with_its_model(self, services: Services, node: Node) -> None:
        add_model(services, "stays", source="ollama://y", preload=True)
        installs.preload(services)
        kept = installs.installation(services, model_named(services, "stays").id)["job"]
        add_model(services, source="ollama://x", preload=True)
        installs.preload(services)
        assert len(services.leases.waiting(names.node_jobs_queue(node.id))) == 2
        models.remove(services, "m")
        assert services.leases.waiting(names.node_jobs_queue(node.id)) == [kept]

    def test_a_fetch_that_failed_is_shown_and_tried_later(self, services: Services, node: Node) -> None:
        uuid = installs.install(services, wanted="qwen3-0.6b")["uuid"]
        installs.preload(services)
        stage(services, node, failed="no route")
        installs.preload(services)
        shown = installs.installation(services, uuid)
        assert (shown["processed"], shown["error"], shown["message"]) == (False, "no route", "its files are waiting")

    def test_a_fetch_that_was_cancelled_is_shown_so(self, services: Services, node: Node) -> None:
        uuid = installs.install(services, wanted="qwen3-0.6b")["uuid"]
        installs.preload(services)
        with services.db.transaction() as db:
            (job,) = job_rows.open_fetches(db, uuid)
        jobs.abort(services, job, Cancelled(), state=JobState.CANCELLED)
        jobs.apply_ends(services)
        shown = installs.installation(services, uuid)
        assert (shown["processed"], shown["cancelled"], shown["error"]) == (True, True, None)
        assert as_on_a_page(shown)["completed"] is False

    @pytest.mark.parametrize("asked", ["dismiss", "prune"])
    def test_a_fetch_that_was_cancelled_and_forgotten_is_not_begun_again(
        self, services: Services, node: Node, asked: str
    ) -> None:
        admin, _ = keys.create(services, name="a", role="admin")
        uuid = installs.install(services, wanted="qwen3-0.6b")["uuid"]
        installs.preload(services)
        stage(services, node, failed="no route")
        models.edit(services, "qwen3-0.6b", {"disabled": True})
        jobs.prune(services, older_than=0.0, states=(), kinds=())
        assert model_named(services, "qwen3-0.6b").config.preload, "what has failed is tried again"
        models.edit(services, "qwen3-0.6b", {"disabled": False})
        first = fetch_of(services, uuid)
        jobs.cancel(services, first, admin)
        jobs.apply_ends(services)
        again = retries.retry(services, first, admin)
        jobs.forget(services, first, admin)
        assert model_named(services, "qwen3-0.6b").config.preload, "it was asked for again since"
        jobs.cancel(services, again, admin)
        jobs.apply_ends(services)
        if asked == "dismiss":
            jobs.forget(services, again, admin)
        else:
            jobs.prune(services, older_than=0.0, states=(), kinds=())
        assert fetch_of(services, uuid) is None
        shown = installs.installation(services, uuid)
        assert (shown["processed"], shown["message"]) == (True, "fetched when somebody asks for it")
        models.edit(services, "qwen3-0.6b", {"preload": True})
        assert fetch_of(services, uuid)

    def test_what_was_cancelled_of_another_file_says_nothing_of_this_one(self, services: Services, node: Node) -> None:
        admin, _ = keys.create(services, name="a", role="admin")
        add_model(services, backend="xllamacpp", source="ollama://x", preload=True)
        jobs.cancel(services, fetch_of(services, model_named(services, "m").id), admin)
        jobs.apply_ends(services)
        models.edit(services, "m", {"source": "ollama://y"})
        jobs.prune(services, older_than=0.0, states=(), kinds=())
        assert model_named(services, "m").config.preload

    def test_a_model_that_nobody_asked_to_be_fetched_waits_for_its_first_request(
        self, services: Services, node: Node
    ) -> None:
        uuid = installs.install(services, wanted="qwen3-0.6b", preload=False)["uuid"]
        installs.preload(services)
        shown = installs.installation(services, uuid)
        assert (shown["processed"], shown["job"]) == (True, None)
        models.edit(services, "qwen3-0.6b", {"preload": True, "disabled": True})
        installs.preload(services)
        assert installs.installation(services, uuid)["job"] is None

    def test_the_node_that_fetches_is_told_who_has_the_file(self, services: Services, node: Node) -> None:
        add_model(services, source="https://x.example/t", sha256=A, preload=True)
        with pytest.raises(NotFound):
            holders.find(services, node, A, called="h")
        installs.preload(services)
        assert holders.find(services, node, A, called="h")["holders"] == []


def with_hub(services: Services, server: FileServer, *files: str, **more: object) -> Services:
    """The services of an API whose settings name this hub, and its repository o/r with these files, if there are any."""
    if files:
        told = {"id": "o/r", "siblings": [{"rfilename": file} for file in files]}
        server.put("/api/models/o/r/revision/main", Remote(json.dumps(told).encode()))
    return naming(services, "", hf_endpoint=server.url, **more)


class TestImports:
    def test_all_documents_are_taken_or_none(self, services: Services) -> None:
        text = "- {name: a, backend: echo}\n- {name: b, backend: echo, threads: 2, debug: true}\n"
        found = installs.import_documents(services, text.encode())
        assert [(each["name"], len(each["warnings"])) for each in found] == [("a", 0), ("b", 1)]
        for text, error, says in (
            ("{name: c, backend: echo}\n---\n{name: a, backend: echo}", Conflict, "a model 'a' already"),
            ("{name: c, backend: echo}\n---\n{name: d, backend: vllm}", InvalidValue, "is none of"),
            ("", InvalidValue, "needs to be one model"), ("3", InvalidValue, "needs to be one model"),
            ("[" + "{name: x}," * 101 + "]", InvalidValue, "up to 100"), ("a: [", InvalidValue, "no YAML"),
        ):  # fmt: skip
            with pytest.raises(error, match=says):
                installs.import_documents(services, text.encode())
        assert [model["name"] for model in models.listed(services)] == ["a", "b"]

    def test_a_uri_names_a_model(self, services: Services) -> None:
        made = installs.import_uri(services, "https://huggingface.co/o/r/resolve/main/sub/Tiny-Q4.gguf?download=true")
        assert (made["name"], model_named(services, "Tiny-Q4").config.source) == (
            "Tiny-Q4",
            "huggingface://o/r/sub/Tiny-Q4.gguf",
        )
        assert installs.import_uri(services, "ollama://smollm2:135m", preload=False)["name"] == "smollm2:135m"
        assert installs.import_uri(services, "hf://o/r/sub/big-00001-of-00002.gguf@v1")["name"] == "big"
        installs.import_uri(services, "https://h/x.gguf", sha256=A)
        assert model_named(services, "x").config.sha256 == A
        with pytest.raises(InvalidValue, match="goes with a model's file"):
            installs.import_uri(services, "https://h/x.yaml", sha256=A)
        for uri, error in (
            ("https://h/y.gguf", InvalidValue),
            ("nonsense:x", InvalidValue),
            ("https://[x.yaml", InvalidValue),
            ("https://[x", InvalidValue),
            ("ollama://smollm2:135m", Conflict),
        ):
            with pytest.raises(error):
                installs.import_uri(services, uri)

    def test_preferences_hold_for_a_file_and_for_a_document(self, services: Services, server: FileServer) -> None:
        wanted = Preferences(
            name="e", embeddings=True, backend="llama-cpp", description="d", quantizations="q8_0", cuda=True
        )
        made = installs.import_uri(services, "ollama://x", preferences=wanted)
        config = model_named(services, "e").config
        assert (made["name"], config.source, config.backend, config.embeddings) == (
            "e",
            "ollama://x",
            "xllamacpp",
            True,
        )
        assert [warning.partition(" ")[0].rstrip(":") for warning in made["warnings"]] == [
            "backend", "preferences.description", "preferences.cuda", "preferences.quantizations"]  # fmt: skip
        own = naming(services, "", allow_private_sources=True)
        url = server.put("/m.yaml", Remote(b"name: plain\nthreads: 2\nparameters: {model: 'ollama://y'}\n"))
        made = installs.import_uri(own, url, preferences=Preferences(embeddings=True, type="x"))
        config = model_named(services, "plain").config
        assert (config.threads, config.embeddings, len(made["warnings"])) == (2, True, 1)
        with pytest.raises(InvalidValue, match="backend: 'vllm' is none of xllamacpp"):
            installs.import_uri(services, "ollama://z", preferences=Preferences(backend="vllm"))

    @pytest.mark.parametrize(
        ("uri", "body", "field"),
        [
            ("ollama://z", {"preferences": Preferences(backend="vllm")}, "preferences.backend"),
            ("{server}/theirs.yaml", {}, "backend"),
            ("{server}/theirs.yaml", {"preferences": Preferences(backend="vllm")}, "preferences.backend"),
            ("https://h/x.gguf", {"sha256": A, "preferences": Preferences(name="a b")}, "preferences.name"),
            ("https://h/x.gguf", {"sha256": A, "preferences": Preferences(name="y"), "name": "a b"}, "name"),
            ("https://h/x.yaml", {"sha256": A}, "sha256"),
            ("nonsense:x", {}, "uri"),
            ("https://[x.yaml", {}, "uri"),
            ("hf://o/r@..", {}, "uri"),
            ("hf://o/r", {}, "uri"),
            ("hf://o/r", {"preferences": Preferences(quantizations="q2_k")}, "preferences.quantizations"),
            ("hf://o/inner", {}, "uri"),
        ],
    )  # fmt: skip
    def test_a_refusal_names_the_field_that_said_it(
        self, services: Services, server: FileServer, uri: str, body: dict, field: str
    ) -> None:
        own = with_hub(services, server, "README.md", allow_private_sources=True)
        server.put("/theirs.yaml", Remote(b"name: plain\nbackend: vllm\n"))
        with serve() as other:
            if uri == "hf://o/inner":
                own = with_hub(services, server)
                server.put("/api/models/o/inner/revision/main", Remote(location=other.put("/x", Remote(b"{}"))))
            with pytest.raises(InvalidRequest) as error:
                installs.import_uri(own, uri.format(server=server.url), **body)
        assert error.value.param == field, error.value

    def test_a_repository_of_the_hub_is_imported_by_the_quantization_that_is_wanted(
        self, services: Services, server: FileServer
    ) -> None:
        own = with_hub(services, server, "README.md", "d/T-Q4_K_M.gguf", "T-Q8_0-00001-of-00002.gguf",
                       "T-Q8_0-00002-of-00002.gguf")  # fmt: skip
        made = installs.import_uri(own, "https://huggingface.co/o/r")
        assert (made["name"], model_named(own, "T-Q4_K_M").config.source, made["warnings"]) == (
            "T-Q4_K_M", "huggingface://o/r/d/T-Q4_K_M.gguf", [])  # fmt: skip
        made = installs.import_uri(own, "hf://o/r", name="big", preferences=Preferences(quantizations="q2_k,q8_0"))
        assert [file.source for file in model_named(own, "big").config.own] == [
            f"huggingface://o/r/T-Q8_0-0000{number}-of-00002.gguf" for number in (1, 2)]  # fmt: skip
        with pytest.raises(
            InvalidValue, match=r"no GGUF file with q2_k; it has: T-Q8_0-00001-of-00002.gguf, d/T-Q4_K_M.gguf"
        ):
            installs.import_uri(own, "hf://o/r", preferences=Preferences(quantizations="q2_k"))
        server.put(
            "/api/models/o/r/revision/refs%2Fpr%2F1", Remote(b'{"siblings": [{"rfilename": "x.gguf", "more": 1}]}')
        )
        installs.import_uri(own, "hf://o/r@refs/pr/1")
        assert model_named(own, "x").config.source == "huggingface://o/r/x.gguf@refs/pr/1"

    def test_the_token_goes_to_the_hub_alone(self, services: Services, server: FileServer) -> None:
        with_hub(services, server, "m.gguf")
        server.files["/api/models/o/r/revision/main"].key = "Bearer secret"
        with pytest.raises(NotFound, match="HF_TOKEN needs to be set for the API"):
            installs.import_uri(with_hub(services, server), "hf://o/r")
        with serve() as other:
            server.put("/api/models/o/r/revision/main", Remote(location=other.put("/x", Remote(b"{}"))))
            with pytest.raises(InvalidValue, match="an address of this cluster"):
                installs.import_uri(with_hub(services, server, hf_token="secret"), "hf://o/r")
            own = with_hub(services, server, hf_token="secret", allow_private_sources=True)
            with pytest.raises(Unavailable, match="something else than a repository"):
                installs.import_uri(own, "hf://o/r")
            assert server.seen[-1].headers["authorization"] == "Bearer secret"
            assert "authorization" not in other.seen[-1].headers

    @pytest.mark.parametrize(
        ("answer", "error", "says"),
        [
            (None, NotFound, "shows no repository 'o/r' with the revision 'main'"),
            (Remote(statuses=[500]), Unavailable, "status 500"),
            (Remote(b"[" * 10_000), Unavailable, "something else than a repository"),
            (Remote(b'{"siblings": [3]}'), Unavailable, "something else than a repository"),
            (Remote(b'{"siblings": []}'), InvalidValue, "it has: none"),
            (Remote(b"x" * (5 << 20)), Unavailable, "more than 4 MiB"),
            (Remote(b"x", cuts=[0], announced=9), Unavailable, "cannot read"),
        ],
    )
    def test_a_hub_that_tells_nothing_of_a_repository(
        self, services: Services, server: FileServer, answer: Remote | None, error, says: str
    ) -> None:
        if answer:
            server.put("/api/models/o/r/revision/main", answer)
        with pytest.raises(error, match=says):
            installs.import_uri(with_hub(services, server), "hf://o/r")
        assert models.listed(services) == []

    def test_a_model_is_made_as_a_document_says(self, services: Services) -> None:
        add_model(services, "m", slots=9)
        found = installs.edit(services, "m", b"backend: echo\nthreads: 3\nf16: true\n")
        assert (found["config_revision"], len(found["warnings"]), model_named(services, "m").config.slots) == (2, 1, 4)
        models.edit(services, "m", {"preload": True, "max_replicas": 3, "selector": {"a": "b"}})
        found = installs.edit(services, "m", b"backend: echo\nthreads: 3\npinned: true\n")
        config = model_named(services, "m").config
        assert (found["config_revision"], config.preload, config.max_replicas, config.selector, config.pinned) == (
            2, True, 3, {"a": "b"}, True)  # fmt: skip
        with pytest.raises(Conflict, match="keeps its name"):
            installs.edit(services, "m", b"name: x\nbackend: echo\n")
        with pytest.raises(ModelNotFound):
            installs.edit(services, "x", b"backend: echo\n")

    def test_who_edits_is_told_which_replicas_of_older_revisions_have_not_gone(
        self, services: Services, node: Node
    ) -> None:
        add_model(services, "m")
        for on in (node, ready_node(services, "n2", "other")):
            replicas.place(services, model_named(services, "m"), on.id)
        with services.db.transaction() as db:
            old, lost = replica_rows.every(db)
            replica_rows.move(db, lost.id, ReplicaState.FAILED)
        same = installs.edit(services, "m", b"backend: echo\nsystem_prompt: Be brief.\n")
        assert (same["config_revision"], same["pending_cleanup"]) == (1, [])
        found = installs.edit(services, "m", b"backend: echo\nthreads: 3\n")
        assert (found["config_revision"], found["pending_cleanup"]) == (
            2, [{"id": old.id, "node": "n1", "state": "placed", "revision": 1}])  # fmt: skip

    def test_a_model_is_switched_by_localais_words(self, services: Services) -> None:
        add_model(services, "m")
        assert installs.switched(services, "m", "disabled", "disable", {"disable": True})["disabled"] is True
        add_model(services, "Big")
        said = installs.switched(services, "Big", "pinned", "pin", {"pin": True})
        assert said["message"] == "Model 'Big': pinned is true"
        with pytest.raises(InvalidValue, match="one of: pin"):
            installs.switched(services, "m", "pinned", "pun", {"pin": True})

    def test_what_a_model_takes_is_told_once_its_size_is_known(self, services: Services) -> None:
        add_model(services, "m", source="https://x.example/t", sha256=A)
        with pytest.raises(Conflict, match="before a node has fetched"):
            installs.estimate(services, "m")
        models.edit(services, "m", {"size": 1000})
        assert installs.estimate(services, "m")["ram_bytes"] == 1200


def test_every_model_that_we_list_can_be_added(services: Services) -> None:
    for entry in catalog.catalog().models:
        assert entry.license
        installs.install(services, wanted=f"builtin@{entry.name}")
