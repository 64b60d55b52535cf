"""Installing a backend: what counts as installed, what an interruption leaves, and what is said when it fails."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from file_server import FileServer, Remote, serve
from waiting import wait_for

from localai_q.cluster.events import Progress
from localai_q.errors import Unavailable
from localai_q.gallery import catalog
from localai_q.gallery.catalog import BackendEntry, BuildEntry
from workers import versions
from workers.node import installer
from workers.node.installer import Kit, install_backend, python_of

ECHO = catalog.backend("echo")
SOURCES = installer.SOURCES
NVIDIA = {"gpus": [{"index": 0, "vendor": "nvidia", "driver": "580.65.06", "compute_capability": "8.6"}]}


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """uv and pip told of nothing by this machine."""
    for name in (
        "UV_INDEX_URL",
        "UV_DEFAULT_INDEX",
        "UV_INDEX",
        "PIP_INDEX_URL",
        "PIP_EXTRA_INDEX_URL",
        "PIP_FIND_LINKS",
    ):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for backends of the test's own."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for shared in installer.SOURCES.glob("*.py"):
        shutil.copy2(shared, folder)
    shutil.copytree(installer.SOURCES / "echo", folder / "toy")
    monkeypatch.setattr(installer, "SOURCES", folder)
    return folder


def make_backend(sources: Path, server: str = "", requirements: str = "") -> BackendEntry:
    """The echo backend, or another server in its stead."""
    if server:
        (sources / "toy" / "server.py").write_text(server)
        (sources / "toy" / "requirements.txt").write_text(requirements)
    if requirements:
        (sources / "toy" / "requirements.txt").write_text(requirements)
    return ECHO.model_copy(update={"name": "toy", "source": "toy"})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_installed_backend_holds_all_that_it_needs(tmp_path: Path) -> None:
    seen: list[Progress] = []
    place = install_backend(ECHO, tmp_path, seen.append)
    manifest = versions.current(tmp_path, "echo")
    assert (manifest.name, manifest.version, manifest.build) == ("echo", ECHO.version, "cpu")
    assert place.parent == tmp_path / "echo"
    assert place.name.startswith(f"{ECHO.version}-{manifest.digest[:12]}-")
    assert {"server.py", "serving.py", "backend_pb2.py", "backend_pb2_grpc.py", "venv"} <= names(place)
    assert subprocess.run([python_of(place), "-c", "import server"], cwd=place, check=False).returncode == 0
    assert {event.stage for event in seen} == {"installing"}
    assert {event.unit for event in seen} == {"packages"}
    assert max(event.done for event in seen) == max(event.total for event in seen) == 3


def test_what_is_installed_is_not_installed_again(tmp_path: Path, sources: Path) -> None:
    entry = make_backend(sources)
    place = install_backend(entry, tmp_path, lambda _: None)
    before = (place / "server.py").stat().st_ino
    seen: list[Progress] = []
    assert install_backend(entry, tmp_path, seen.append) == place
    assert (place / "server.py").stat().st_ino == before
    assert seen == []


def test_a_backend_that_cannot_be_imported_is_not_installed(tmp_path: Path, sources: Path) -> None:
    entry = make_backend(sources, server="import nowhere_at_all")
    with pytest.raises(Unavailable, match=r"does not start on this machine: .*nowhere_at_all"):
        install_backend(entry, tmp_path, lambda _: None)
    assert names(tmp_path / "toy") == {".lock"}


def test_a_backend_that_this_version_does_not_carry_is_refused(tmp_path: Path, sources: Path) -> None:
    entry = ECHO.model_copy(update={"source": "ghost"})
    with pytest.raises(Unavailable, match=r"does not carry ghost/server.py"):
        install_backend(entry, tmp_path, lambda _: None)


def test_a_package_that_does_not_exist_is_named(tmp_path: Path, sources: Path) -> None:
    entry = make_backend(sources, requirements="grpcio==0.0.0.1\n")
    with pytest.raises(Unavailable, match=r"cannot install backend toy.*grpcio==0\.0\.0\.1") as caught:
        install_backend(entry, tmp_path, lambda _: None)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["UV_DEFAULT_INDEX", "PIP_INDEX_URL"])
def test_an_index_that_cannot_be_reached_is_named_without_its_password(
    tmp_path: Path, sources: Path, quiet: pytest.MonkeyPatch, name: str
) -> None:
    entry = make_backend(sources, requirements="grpcio==1.85.1\n")
    quiet.setenv(name, "http://me:hidden@127.0.0.1:9/simple")
    quiet.setenv("UV_NO_CACHE", "1")
    quiet.setenv("UV_HTTP_RETRIES", "0")
    with pytest.raises(Unavailable, match=r"http://127.0.0.1:9/simple cannot be reached.*UV_INDEX_URL") as caught:
        install_backend(entry, tmp_path, lambda _: None)
    assert "hidden" not in caught.value.message
    assert "\n" not in caught.value.message


def test_an_install_that_was_stopped_leaves_nothing_that_counts(tmp_path: Path, sources: Path) -> None:
    entry = make_backend(sources)

    def stop(event: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install_backend(entry, tmp_path, stop)
    assert names(tmp_path / "toy") == {".lock"}
    assert install_backend(entry, tmp_path, lambda _: None).is_dir()


def test_a_killed_install_takes_its_children_along_and_the_next_one_cleans_up(tmp_path: Path, sources: Path) -> None:
    entry = make_backend(sources, server="import time\ntime.sleep(60)\n")
    code = (
        "import sys; from pathlib import Path; from workers.node import installer\n"
        "from localai_q.gallery.catalog import BackendEntry\n"
        "installer.SOURCES = Path(sys.argv[1])\n"
        "entry = BackendEntry.model_validate_json(sys.argv[3])\n"
        "installer.install_backend(entry, Path(sys.argv[2]), lambda _: None)\n"
    )
    arguments = [sys.executable, "-c", code, str(sources), str(tmp_path), entry.model_dump_json()]
    with subprocess.Popen(arguments, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        assert wait_for(lambda: list(tmp_path.glob("toy/.*.part/venv/bin/python")))
        os.killpg(process.pid, signal.SIGKILL)
    assert [path.name for path in (tmp_path / "toy").glob(".*.part")]
    shutil.copy2(SOURCES / "echo" / "server.py", sources / "toy")
    shutil.copy2(SOURCES / "echo" / "requirements.txt", sources / "toy")
    place = install_backend(entry, tmp_path, lambda _: None)
    assert names(tmp_path / "toy") == {".lock", "current", place.name}


def test_two_installs_of_one_backend_do_not_clash(tmp_path: Path, sources: Path) -> None:
    entry = make_backend(sources)
    places: list[Path] = []
    seen: list[Progress] = []
    threads = [
        threading.Thread(target=lambda: places.append(install_backend(entry, tmp_path, seen.append))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert places == [versions.pointer(tmp_path, "toy").resolve()] * 3
    assert sum(event.note == f"toy {entry.version} for cpu" for event in seen) == 1


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path: Path, sources: Path) -> None:
    entry = make_backend(sources)
    (tmp_path / "taken").write_text("")
    with pytest.raises(Unavailable, match=r"cannot install backend toy: .*taken"):
        install_backend(entry, tmp_path / "taken", lambda _: None)


def index_on(server: FileServer, folder: Path, sha256: str | None = None) -> str:
    """The URL of a package index that has one wheel, and says that this is its SHA-256."""
    name = "toy_wheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr("toy_wheel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-wheel\nVersion: 1.0\n")
        wheel.writestr("toy_wheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("toy_wheel-1.0.dist-info/RECORD", "")
    server.put(f"/{name}", Remote((folder / name).read_bytes()))
    sha256 = sha256 or hashlib.sha256((folder / name).read_bytes()).hexdigest()
    page = f'<a href="/{name}#sha256={sha256}">{name}</a>'
    server.put("/simple/toy-wheel/", Remote(page.encode(), headers={"Content-Type": "text/html"}))
    return f"{server.url}/simple"


def test_a_wheel_that_is_not_the_one_that_its_index_names_is_refused(
    tmp_path: Path, sources: Path, quiet: pytest.MonkeyPatch
) -> None:
    entry = make_backend(sources, requirements="toy-wheel==1.0\n")
    with serve() as server:
        quiet.setenv("UV_DEFAULT_INDEX", index_on(server, tmp_path, "0" * 64))
        quiet.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
        with pytest.raises(Unavailable, match=r"(?i)cannot install backend toy\. uv said.*hash mismatch.*toy-wheel"):
            install_backend(entry, tmp_path / "root", lambda _: None)
    assert names(tmp_path / "root" / "toy") == {".lock"}


NOWHERE = "http://127.0.0.1:1/simple"


@pytest.mark.parametrize("told", [True, False])
def test_packages_come_from_the_index_of_their_build_or_from_the_one_that_the_machine_names_for_it(
    tmp_path: Path, sources: Path, told: bool
) -> None:
    entry = make_backend(sources, requirements="grpcio\nprotobuf\ntoy-wheel==1.0\n")
    with serve() as server:
        url = index_on(server, tmp_path)
        build = BuildEntry(index=NOWHERE if told else url)
        kit = Kit(hardware=NVIDIA, indexes={"cuda12": url} if told else {"rocm": NOWHERE})
        entry = entry.model_copy(update={"builds": {"cpu": BuildEntry(index=NOWHERE), "cuda12": build}})
        place = install_backend(entry, tmp_path / "root", lambda _: None, kit)
    assert list(place.glob("venv/lib/*/site-packages/toy_wheel-1.0.dist-info"))
    assert versions.current(tmp_path / "root", "toy").build == "cuda12"


def test_an_index_of_a_build_that_cannot_be_reached_is_named_with_what_to_do(tmp_path: Path, sources: Path) -> None:
    entry = make_backend(sources).model_copy(update={"builds": {"cuda12": BuildEntry(index=NOWHERE)}})
    says = f"packages for cuda12 come from {NOWHERE}, unless LOCALAI_Q_BACKEND_INDEXES .*LOCALAI_Q_BACKEND_BUILDS"
    with pytest.raises(Unavailable, match=says):
        install_backend(entry, tmp_path / "root", lambda _: None, Kit(hardware=NVIDIA))
    assert names(tmp_path / "root" / "toy") == {".lock"}


def test_an_engine_that_is_made_for_gpus_and_finds_none_is_not_switched_to(tmp_path: Path) -> None:
    entry = catalog.backend("xllamacpp")
    kit = Kit(hardware=NVIDIA, indexes={"cuda12": installer.index_url()})  # whose engine is the processor's
    with pytest.raises(Unavailable, match=r"made for cuda12, and llama\.cpp finds no such device.*BACKEND_BUILDS=cpu"):
        install_backend(entry, tmp_path, lambda _: None, kit)
    assert names(tmp_path / "xllamacpp") == {".lock"}


def test_what_an_engine_is_made_for_is_the_best_that_its_machine_can(tmp_path: Path) -> None:
    entry = catalog.backend("xllamacpp")
    machines = {
        "cuda12": NVIDIA,
        "cpu": {"gpus": [{"vendor": "amd"}], "runtimes": []},
        "vulkan": {"gpus": [{"vendor": "amd"}], "runtimes": ["vulkan"]},
        "rocm": {"gpus": [{"vendor": "amd"}], "runtimes": ["vulkan", "rocm"]},
        "metal": {"os": "darwin", "arch": "arm64", "gpus": []},
    }
    assert {build: installer.wanted(entry, machine).build for build, machine in machines.items()} == {
        build: build for build in machines
    }
