"""The catalogue: what it offers, and how it says what is wrong with it."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from localai_q.errors import NotFound, StartupError
from localai_q.gallery import catalog
from localai_q.gallery.catalog import BackendEntry

BACKENDS = """
- {name: one, version: "1", description: d, source: one, capabilities: [chat], default: true}
"""
MODELS = """
- name: tiny
  backend: one
  source: "pypi:p==1#a/b.gguf"
  sha256: "%s"
  size: 10
  license: MIT
  context_size: 64
  default: true
""" % ("0" * 64)


def write(folder: Path, backends: str = BACKENDS, models: str = MODELS) -> Path:
    (folder / "backends.yaml").write_text(backends)
    (folder / "models.yaml").write_text(models)
    return folder


def test_the_catalogue_that_we_ship_is_sound_and_has_defaults() -> None:
    assert catalog.backend("echo").source == "echo"
    assert catalog.catalog().default_backend().name == "xllamacpp"
    entry = catalog.default_model()
    assert (entry.name, entry.backend, entry.slots, entry.spread_all) == ("smollm2-135m-instruct", "xllamacpp", 4, True)
    assert catalog.model(entry.name) is entry


def test_every_backend_of_the_catalogue_has_its_folder() -> None:
    folders = Path(__file__).parents[2] / "workers" / "backends"
    for entry in catalog.catalog().backends:
        assert (folders / entry.source / "server.py").is_file()
        assert (folders / entry.source / "requirements.txt").is_file()


def test_an_entry_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        catalog.default_model().slots = 9  # type: ignore[misc]


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(NotFound, match="no backend 'vllm' in the catalogue; there are: xllamacpp, llama-cpp, echo"):
        catalog.backend("vllm")
    with pytest.raises(NotFound, match="no model 'gpt'"):
        catalog.model("gpt")


@pytest.mark.parametrize(
    ("backends", "models", "says"),
    [
        (BACKENDS.replace("name: one", "name: ../one"), MODELS, r"backends.yaml is wrong at '../one', name"),
        (BACKENDS.replace("description: d, ", ""), MODELS, "wrong at 'one', description: Field required"),
        (BACKENDS.replace("default: true", "defualt: true"), MODELS, "wrong at 'one', defualt"),
        (BACKENDS.replace(", default: true", ""), MODELS, "exactly one backend must say 'default: true'"),
        (BACKENDS * 2, MODELS, "two entries of the same backend name"),
        ("a: b", MODELS, "must be a list of entries"),
        ("{", MODELS, "cannot read the catalogue"),
        (BACKENDS, MODELS.replace("backend: one", "backend: two"), "'tiny' names the unknown backend 'two'"),
        (BACKENDS, MODELS.replace("pypi:", "ftp://x/"), "wrong at 'tiny'.*is no source of a model's file"),
        (BACKENDS, MODELS.replace("sha256:", "#"), "needs its sha256: it does not tell it itself"),
        (BACKENDS, MODELS.replace("0000", "zz"), "wrong at 'tiny', sha256"),
    ],
)
def test_a_wrong_catalogue_stops_the_start_with_the_place_of_the_mistake(
    tmp_path: Path, backends: str, models: str, says: str
) -> None:
    with pytest.raises(StartupError, match=says):
        catalog.load_catalog(write(tmp_path, backends, models))


def test_a_missing_catalogue_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot read the catalogue"):
        catalog.load_catalog(tmp_path)


ARCHIVE = "{archive: {source: 'https://x.example/b.tgz', sha256: '" + "0" * 64 + "'}}"


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("builds: {tpu: {}}", "wrong at 'one', builds.tpu"),
        ("builds: {}", "wrong at 'one', builds"),
        ("builds: {cpu: {requirements: ['--index-url=http://x']}}", "no requirement as"),
        ("builds: {cpu: {requirements: ['-r /etc/passwd']}}", "no requirement as"),
        ("builds: {cpu: {compiled: [{requirement: 'a>=1'}]}}", "names one version, as 'package==1.0'"),
        ("builds: {cpu: {compiled: [{requirement: 'a==1.*'}]}}", "names one version"),
        ("builds: {cpu: {compiled: [{requirement: 'a[x]==1'}]}}", "names one version"),
        ("builds: {cpu: {compiled: [{requirement: 'a @ file:///tmp/a'}]}}", "not from an address"),
        ("builds: {cpu: {compiled: [{requirement: 'a==1', settings: {'-o': 'x'}, level: v3}]}}", "level"),
        ("builds: {cpu: {compiled: [{requirement: 'a==1', settings: {'a=b': 'x'}}]}}", "settings"),
        ("builds: {cpu: {compiled: [{requirement: 'a==1', settings: {a: !!str \"x\\n\"}}]}}", "settings"),
        (f"builds: {{cpu: {ARCHIVE}}}", "either 'source', or an 'archive'"),
        ("builds: {cuda12: {index: 'file:///tmp'}}", "index"),
        ("builds: {cuda12: {index: 'https://me:secret@x.example/whl'}}", "index"),
        ("source: null", "either 'source', or an 'archive'"),
        (
            "source: null, builds: {cpu: {archive: {source: 'https://x.example/b.tgz'}}}",
            "archive.sha256: .*needs its SHA-256",
        ),
        (f"source: null, builds: {{cpu: {ARCHIVE}, rocm: {{}}}}", "either 'source', or an 'archive'"),
    ],
)
def test_a_backend_that_cannot_be_made_is_refused(tmp_path: Path, entry: str, says: str) -> None:
    text = BACKENDS.replace("source: one, ", "") if "source:" in entry.partition("builds")[0] else BACKENDS
    with pytest.raises(StartupError, match=says):
        catalog.load_catalog(write(tmp_path, text.replace("capabilities", f"{entry}, capabilities")))


def test_a_backend_can_be_made_of_an_archive_and_of_requirements_for_each_kind_of_hardware(tmp_path: Path) -> None:
    builds = "builds: {cpu: {requirements: ['a==1']}, cuda12: {requirements: ['a[gpu]>=2', 'b']}}"
    found = catalog.load_catalog(write(tmp_path, BACKENDS.replace("capabilities", f"{builds}, capabilities")))
    assert found.backend("one").builds["cuda12"].requirements == ("a[gpu]>=2", "b")
    packed = BACKENDS.replace("source: one", f"builds: {{cpu: {ARCHIVE}}}")
    found = catalog.load_catalog(write(tmp_path, packed))
    assert found.backend("one").builds["cpu"].archive.source == "https://x.example/b.tgz"


def test_a_package_that_is_compiled_has_one_version_and_its_settings(tmp_path: Path) -> None:
    compiled = "[{requirement: 'Llama_cpp.Python==0.3.36', settings: {cmake.define.X: 'ON'}, level: x86-64-v3}]"
    builds = f"builds: {{cpu: {{compiled: {compiled}}}}}"
    found = catalog.load_catalog(write(tmp_path, BACKENDS.replace("capabilities", f"{builds}, capabilities")))
    (package,) = found.backend("one").builds["cpu"].compiled
    assert (package.name, package.version, package.level) == ("llama-cpp-python", "0.3.36", "x86-64-v3")
    assert package.settings == {"cmake.define.X": "ON"}


def test_an_entry_comes_back_from_its_record_whatever_version_has_written_it() -> None:
    for entry in catalog.catalog().backends:
        assert BackendEntry.of_record(entry.record) == entry
    archive = {"source": "https://x.example/b.tgz", "sha256": "0" * 64, "later": 1}
    record = {"name": "a", "version": "1", "description": "d", "capabilities": ["chat"], "gpu": False,
              "builds": {"cpu": {"archive": archive, "later": True}}}  # fmt: skip
    entry = BackendEntry.of_record(record)
    assert entry.builds["cpu"].archive.sha256 == "0" * 64
    assert entry.record.keys() == {"name", "version", "description", "capabilities", "builds"}
