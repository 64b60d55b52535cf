"""Models are checked before they are registered, and their files go with the last of them."""

import hashlib
import io
import os
import time

import pytest
from cluster_data import add_model, model_named
from gguf_files import gguf

from localai_q.cluster.models import Document, ModelConfig
from localai_q.documents import checked
from localai_q.errors import Conflict, InvalidValue, ModelNotFound, NotFound
from localai_q.gallery import catalog
from localai_q.services import models, uploads
from localai_q.services.wiring import Services
from localai_q.store import models as model_rows

CONTENT = b"weights" * 1000
SHA = hashlib.sha256(CONTENT).hexdigest()


def upload(services: Services, content: bytes = CONTENT, sha256: str = SHA) -> None:
    uploads.receive(services, sha256, io.BytesIO(content), uploads.Chunk(size=len(content), total=len(content)))


def files(services: Services) -> list[str]:
    folder = services.settings.home / "files"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def changed(services: Services, **settings: object) -> Services:
    return Services(services.settings.model_copy(update=settings), services.db, services.redis, services.leases,
                    services.doorbells)  # fmt: skip


class TestRegistry:
    def test_a_model_is_kept_as_it_was_given(self, services: Services) -> None:
        add_model(services, "org/Name:tag", slots=2, options=("a:b",))
        found = model_named(services, "org/Name:tag")
        assert (found.revision, found.config.slots, found.config.options) == (1, 2, ("a:b",))
        (shown,) = models.listed(services)
        assert (shown["name"], shown["slots"], shown["replicas"]) == ("org/Name:tag", 2, [])

    def test_the_header_of_an_uploaded_file_is_read(self, services: Services) -> None:
        content = gguf()
        sha256 = hashlib.sha256(content).hexdigest()
        upload(services, content, sha256)
        add_model(services, backend="xllamacpp", source=f"store:{sha256}", sha256=sha256)
        facts = model_named(services, "m").facts
        assert (facts.architecture, facts.file_size) == ("llama", len(content))

    def test_an_uploaded_file_whose_header_is_damaged_is_refused(self, services: Services) -> None:
        content = gguf()[:200]
        sha256 = hashlib.sha256(content).hexdigest()
        upload(services, content, sha256)
        with pytest.raises(InvalidValue, match="ends within its header"):
            add_model(services, backend="xllamacpp", source=f"store:{sha256}", sha256=sha256)
        assert models.listed(services) == []

    def test_of_a_file_in_another_format_nothing_is_known(self, services: Services) -> None:
        upload(services)
        add_model(services, backend="xllamacpp", source=f"store:{SHA}", sha256=SHA)
        assert model_named(services, "m").facts is None

    def test_a_name_is_taken_once(self, services: Services) -> None:
        add_model(services)
        with pytest.raises(Conflict, match="models remove m"):
            add_model(services)
        assert len(models.listed(services)) == 1

    def test_an_unknown_backend_is_named_beside_the_known_ones(self, services: Services) -> None:
        with pytest.raises(NotFound, match="nonesuch"):
            add_model(services, backend="nonesuch")
        assert models.listed(services) == []

    def test_a_backend_with_weights_needs_a_source(self, services: Services) -> None:
        with pytest.raises(InvalidValue) as raised:
            add_model(services, backend="xllamacpp")
        assert raised.value.param == "source"

    def test_a_file_of_the_store_must_have_been_uploaded(self, services: Services) -> None:
        with pytest.raises(InvalidValue, match="uploaded"):
            add_model(services, backend="xllamacpp", source=f"store:{SHA}", sha256=SHA)
        upload(services)
        assert add_model(services, backend="xllamacpp", source=f"store:{SHA}", sha256=SHA)

    def test_a_file_needs_the_sha_that_makes_it_the_same_on_every_node(self, services: Services) -> None:
        upload(services)
        with pytest.raises(InvalidValue, match="SHA-256") as raised:
            add_model(services, backend="xllamacpp", source=f"store:{SHA}")
        assert raised.value.param == "sha256"

    @pytest.mark.parametrize("source", ["store:../../etc/passwd", "store:", "store:" + "A" * 64])
    def test_a_source_cannot_leave_the_store(self, services: Services, source: str) -> None:
        with pytest.raises(InvalidValue):
            add_model(services, backend="xllamacpp", source=source)

    def test_an_unknown_model_cannot_be_removed(self, services: Services) -> None:
        with pytest.raises(ModelNotFound, match="models list"):
            models.remove(services, "nothing")

    def test_a_file_goes_with_the_last_model_that_names_it(self, services: Services) -> None:
        upload(services)
        for name in ("a", "b"):
            add_model(services, name, backend="xllamacpp", source=f"store:{SHA}", sha256=SHA)
        models.remove(services, "a")
        assert files(services) == [SHA]
        models.remove(services, "b")
        assert files(services) == []

    def test_a_new_registry_gets_the_default_model_once(self, services: Services) -> None:
        models.ensure_default(services)
        models.ensure_default(services)
        (shown,) = models.listed(services)
        assert (shown["name"], shown["default"]) == (catalog.default_model().name, True)

    def test_a_default_model_that_was_removed_does_not_come_back(self, services: Services) -> None:
        models.ensure_default(services)
        models.remove(services, catalog.default_model().name)
        models.ensure_default(services)
        assert models.listed(services) == []

    def test_the_default_model_is_left_out_where_that_is_wanted_or_others_are_there(self, services: Services) -> None:
        models.ensure_default(changed(services, no_model=True))
        assert models.listed(services) == []
        add_model(services)
        models.ensure_default(services)
        assert [shown["name"] for shown in models.listed(services)] == ["m"]

    def test_what_a_model_config_may_say_is_checked(self) -> None:
        for bad in ({"slots": 0}, {"context_size": 1}, {"backend": "../x"}, {"sha256": "zz"}, {"unknown": 1},
                    {"memory": -1}, {"cache_type": "f8"}, {"idle_timeout": -1}, {"max_replicas": 0},
                    {"selector": {"a b": "c"}}, {"selector": {"": "c"}}, {"min_replicas": 2},
                    {"spread_all": True, "idle_timeout": 5}):  # fmt: skip
            with pytest.raises(ValueError, match="validation error"):
                ModelConfig(**bad)


class TestDocuments:
    def test_every_file_of_a_model_must_be_to_be_had_and_stays_while_it_is_named(self, services: Services) -> None:
        own, adapter = b"own", b"adapter"
        digests = [hashlib.sha256(content).hexdigest() for content in (own, adapter)]
        for content, sha256 in zip((own, adapter), digests, strict=True):
            upload(services, content, sha256)
        model = {"backend": "xllamacpp", "source": f"store:{digests[0]}", "sha256": digests[0]}
        for lora, says in (({"source": f"store:{SHA}", "sha256": SHA}, f"The file store:{SHA} has not been uploaded"),
                           ({"source": "https://host/x.gguf"}, "needs its SHA-256"),
                           ({"source": "nonsense"}, "is no source")):  # fmt: skip
            with pytest.raises(InvalidValue, match=says):
                add_model(services, **model, loras=[lora])
        add_model(services, **model, loras=[{"source": f"store:{digests[1]}", "sha256": digests[1]}])
        add_model(services, "other", **{**model, "source": f"store:{digests[1]}", "sha256": digests[1]})
        models.edit(services, "m", {"loras": []})
        assert files(services) == sorted(digests)
        models.remove(services, "other")
        assert files(services) == [digests[0]]

    @pytest.mark.parametrize("field", ["chat_template", "mmproj", "draft_model", "loras"])
    def test_what_a_backend_does_not_take_is_refused_by_name(self, services: Services, field: str) -> None:
        file = {"source": "ollama://x"}
        value = {"chat_template": "x", "loras": [file]}.get(field, file)
        with pytest.raises(InvalidValue, match=f"'echo' does not take '{field}'"):
            add_model(services, source="ollama://y", **{field: value})
        add_model(services, backend="xllamacpp", source="ollama://y", **{field: value})

    def test_a_model_is_made_as_its_document_says(self, services: Services) -> None:
        document = Document(name="m", backend="xllamacpp", source="ollama://x", slots=2, parameters={"top_k": 5})
        shown, new = models.put(services, document)
        assert (new, shown["slots"], shown["parameters"]["top_k"]) == (True, 2, 5)
        assert checked(Document, models.document(services, "m")) == document
        with services.db.transaction() as db:
            model_rows.learn_contents(db, model_named(services, "m"), [{"sha256": SHA, "size": 7}])
        shown, new = models.put(services, document)
        assert (new, shown["revision"], shown["sha256"], shown["size"]) == (False, 1, SHA, 7)
        shown, _ = models.put(services, Document(name="m", backend="xllamacpp", source="ollama://x"))
        assert (shown["revision"], shown["slots"], shown["parameters"]["top_k"]) == (2, 4, None)
        with pytest.raises(NotFound, match="no backend"):
            models.put(services, Document(name="m", backend="nope"))

    def test_what_was_fetched_for_an_earlier_revision_is_not_learned(self, services: Services) -> None:
        add_model(services, backend="xllamacpp", source="ollama://x")
        before = model_named(services, "m")
        models.edit(services, "m", {"slots": 9})
        with services.db.transaction() as db:
            assert model_rows.learn_contents(db, before, [{"sha256": SHA, "size": 7}]) is None
        assert model_named(services, "m").config.sha256 is None


def test_an_uploaded_file_that_nothing_names_goes_after_a_while(services: Services) -> None:
    named = b"named" * 1000
    sha256 = hashlib.sha256(named).hexdigest()
    upload(services)
    upload(services, named, sha256)
    add_model(services, backend="xllamacpp", source=f"store:{sha256}", sha256=sha256)
    models.forget_unnamed(services)
    assert files(services) == sorted([SHA, sha256])
    (services.settings.home / "files" / "a-note.txt").touch()  # somebody else's
    long_ago = time.time() - services.settings.upload_ttl - 60
    for name in files(services):
        os.utime(services.settings.home / "files" / name, (long_ago, long_ago))
    models.forget_unnamed(services)
    assert files(services) == sorted([sha256, "a-note.txt"])
