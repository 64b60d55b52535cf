"""Packages that come as source only: compiled once on a machine, with the settings of their entry and no others."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from toy_packages import offer, package
from waiting import LIMIT, wait_for

from localai_q.cluster.events import Progress
from localai_q.config import load_settings
from localai_q.errors import NotFound, Unavailable
from localai_q.names import new_id
from workers.node import compiling, wheels
from workers.node.sources import Access
from workers.node.wheels import Wheels, key_of


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine has its packages from: nothing but the toy."""
    monkeypatch.setenv("UV_FIND_LINKS", str(offer(tmp_path / "index")))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    return tmp_path / "index"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


Bring = Callable[..., Path]


@pytest.fixture
def bring(tmp_path: Path, cache: Path) -> Bring:
    """Brings a wheel into a new folder."""

    def run(progress: Callable[[Progress], None] = lambda _: None, **settings: str) -> Path:
        cfg = load_settings(wheel_cache=cache, disk_spare=0)
        folder = tmp_path / f"into-{new_id()}"
        made = Wheels(Access(cfg, "", "", ""), cpus=2, progress=progress)
        return made.bring(package(**settings), "cpu", folder, "cannot install backend toy")

    return run


def word(wheel: Path, tmp_path: Path) -> str:
    """What the code in a wheel says."""
    folder = tmp_path / "unpacked"
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as found:
        found.extractall(folder)
    code = "import toy_package; print(toy_package.word())"
    return subprocess.check_output([sys.executable, "-c", code], cwd=folder, text=True).strip()


def compilations(seen: list[Progress]) -> int:
    return sum(event.note == "Linking C shared library toy.so" for event in seen)


def test_a_package_is_compiled_with_the_settings_of_its_entry(bring: Bring, tmp_path: Path) -> None:
    seen: list[Progress] = []
    wheel = bring(seen.append, word="hello")
    assert wheel.name == key_of(package(word="hello"), "cpu").filename
    assert word(wheel, tmp_path) == "hello"
    steps = [(event.done, event.total) for event in seen if event.stage == "compiling" and event.total]
    assert steps == [(1, 2), (2, 2)]
    assert {event.unit for event in seen if event.stage == "compiling"} == {"steps"}
    assert "compiling toy-package==1.0" in {event.note for event in seen}


def test_a_wheel_is_compiled_once_for_all_nodes_of_the_machine(bring: Bring, tmp_path: Path) -> None:
    first, seen = bring(word="once"), list[Progress]()
    again = bring(seen.append, word="once")
    assert again.read_bytes() == first.read_bytes()
    assert compilations(seen) == 0
    other = bring(seen.append, word="other")
    assert compilations(seen) == 1, "other settings make another wheel"
    assert word(other, tmp_path) == "other"
    assert word(bring(word="once"), tmp_path) == "once"


def test_those_that_need_it_at_once_compile_it_once(bring: Bring, tmp_path: Path) -> None:
    count = tmp_path / "count"
    threads = [threading.Thread(target=lambda: bring(count=str(count))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.glob("into*/*.whl"))) == 3
    assert count.read_text() == "1"


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
                                    lambda path: path.write_bytes(b""), Path.unlink])  # fmt: skip
def test_a_wheel_that_has_changed_in_the_folder_is_not_used(
    bring: Bring, cache: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    bring(word="good")
    (kept,) = (cache / "blobs").glob("[0-9a-f]*")
    damage(kept)
    seen: list[Progress] = []
    assert word(bring(seen.append, word="good"), tmp_path) == "good"
    assert compilations(seen) == 1


def test_settings_of_compilers_in_the_environment_change_nothing(
    bring: Bring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CFLAGS", "-DWORD=broken -this-is-no-option")
    assert word(bring(word="mine"), tmp_path) == "mine"


def test_what_a_compilation_needed_is_in_its_own_folder_only(bring: Bring, cache: Path) -> None:
    wheel = bring()
    left = {path.name for path in (cache / "blobs").iterdir()}
    assert not {name for name in left if name.endswith((".part", ".lock"))}
    assert wheel.parent.name.startswith("into")
    assert {path.name for path in cache.iterdir()} == {"blobs"}


@pytest.mark.parametrize("missing", ["nothing at all", "C++"])
def test_a_missing_compiler_is_named_with_its_package_before_anything_is_asked_for(
    bring: Bring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    if missing == "C++":
        (programs / "cc").symlink_to(shutil.which("true") or "")
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(compiling, "sdist", lambda *_: pytest.fail("the index was asked"))
    with pytest.raises(
        Unavailable, match=r"toy: toy-package==1\.0 comes as source only.*no C\+\+ compiler.*apt install g\+\+"
    ):
        bring()


def test_a_compiler_that_the_environment_names_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "mine"
    own.symlink_to(shutil.which("true") or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", f"{own} -v")
    monkeypatch.setenv("CXX", "mine")
    compiling.need_compilers(package(), "cpu", "toy")
    monkeypatch.setenv("CXX", "other")
    with pytest.raises(Unavailable, match="no C"):
        compiling.need_compilers(package(), "cpu", "toy")


def test_a_build_for_cuda_needs_its_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "NVCC", "/nowhere/nvcc")
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    with pytest.raises(Unavailable, match="no nvcc: install NVIDIA's CUDA toolkit 12"):
        compiling.need_compilers(package(), "cuda12", "toy")


def test_what_the_compiler_complains_of_is_in_the_error(bring: Bring, index: Path, cache: Path) -> None:
    offer(index, code="this is no C;\n")
    with pytest.raises(Unavailable, match=r"toy: toy-package==1\.0 cannot be compiled.*toy\.c:1:1: error: ") as caught:
        bring()
    assert "\n" not in caught.value.message
    assert not list((cache / "blobs").glob("[0-9a-f]*"))


def test_a_version_that_the_index_does_not_have_is_named(bring: Bring, index: Path) -> None:
    (index / "toy_package-1.0.tar.gz").unlink()
    with pytest.raises(NotFound, match=r"no source toy-package 1\.0"):
        bring()


def test_old_wheels_go(bring: Bring, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bring(word="old")
    (old,) = (cache / "blobs").glob("[0-9a-f]*")
    os.utime(cache / "blobs" / f".{old.name}.used", (0, 0))
    bring(word="new")
    assert not old.exists()
    assert len(list((cache / "blobs").glob("[0-9a-f]*"))) == 1


def test_it_runs_at_low_priority(bring: Bring, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    working = threading.Thread(target=lambda: bring(hang=str(mark)), daemon=True)
    working.start()
    assert wait_for(lambda: mark.exists() and len(mark.read_text().split()) == 2)
    builder, compiler = (psutil.Process(int(pid)) for pid in mark.read_text().split())
    try:
        assert {builder.nice(), compiler.nice()} == {19}
    finally:
        os.killpg(compiler.pid, signal.SIGKILL)
        working.join(LIMIT)


def test_the_wheels_of_this_versions_backends_can_be_prepared(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    echo = wheels.catalog().backend("echo")
    made = echo.builds["cpu"].model_copy(update={"compiled": (package(word="ready"),)})
    entry = echo.model_copy(update={"builds": {"cpu": made}})
    monkeypatch.setattr(wheels, "catalog", lambda: wheels_of(entry))
    for tenths in (["50 %", "100 %"], []):
        caplog.clear()
        wheels.prepare(load_settings(wheel_cache=cache, disk_spare=0))
        assert [message for message in caplog.messages if message.endswith("%")] == tenths
    assert {path.name for path in cache.iterdir()} == {"blobs"}


def wheels_of(*entries: object):
    class Catalogue:
        backends = entries

    return Catalogue()
