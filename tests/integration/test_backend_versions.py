"""Versions of a backend beside each other: switched to when they answer, kept while they are used, removed after that."""

import os
import shutil
import tarfile
from pathlib import Path

import psutil
import pytest
from toy_backends import REQUIREMENTS, bring, entry_of, member, pack, run_script

from localai_q.errors import InvalidValue, LocalAIError, StartupError, Unavailable
from localai_q.gallery import catalog
from localai_q.gallery.catalog import BackendEntry, BuildEntry
from workers import versions
from workers.node import archives, installer
from workers.node.installer import Kit, install_backend, is_installed, python_of

ECHO = catalog.backend("echo")


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_backend(ECHO, tmp_path_factory.mktemp("echo"), lambda _: None)


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(fetch=lambda archive: bring(archive, tmp_path / "fetched"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "backends"


def script(tmp_path: Path, echo: Path, version: str = "1", extra: str = "") -> BackendEntry:
    archive = pack(tmp_path / f"{version}.tgz", run_script(python_of(echo), echo, extra))
    return entry_of(archive, version=version)


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "toy").iterdir() if not path.is_symlink() and path.is_dir())


def install(entry: BackendEntry, root: Path, kit: Kit, *, force: bool = False) -> Path:
    return install_backend(entry, root, lambda _: None, kit, force=force)


def test_a_run_script_is_unpacked_started_and_switched_to(tmp_path: Path, echo: Path, root: Path, kit: Kit) -> None:
    entry = script(tmp_path, echo)
    place = install(entry, root, kit)
    assert {path.name for path in place.iterdir()} == {"run.sh", "backend.json"}
    assert os.access(place / "run.sh", os.X_OK)
    assert versions.installed(root)[0]["name"] == "toy"
    assert is_installed(entry, root, {})
    assert install(entry, root, kit) == place


def test_a_new_version_replaces_the_old_one_which_nobody_uses(tmp_path: Path, echo: Path, root: Path, kit: Kit) -> None:
    old = install(script(tmp_path, echo, "1"), root, kit)
    new = install(script(tmp_path, echo, "2"), root, kit)
    assert not old.exists()
    assert folders(root) == [new.name]
    assert versions.current(root, "toy").version == "2"


def test_the_same_version_is_made_anew_when_that_is_forced(tmp_path: Path, echo: Path, root: Path, kit: Kit) -> None:
    entry = script(tmp_path, echo)
    old = install(entry, root, kit)
    new = install(entry, root, kit, force=True)
    assert new != old
    assert folders(root) == [new.name]


def test_what_is_used_stays_until_it_is_let_go(tmp_path: Path, echo: Path, root: Path, kit: Kit) -> None:
    old = install(script(tmp_path, echo, "1"), root, kit)
    held, descriptor = versions.hold(versions.pointer(root, "toy"))
    new = install(script(tmp_path, echo, "2"), root, kit)
    assert held == old
    assert folders(root) == sorted([old.name, new.name])
    assert versions.hold(versions.pointer(root, "toy"))[0] == new
    versions.tidy(root)
    assert (old / "run.sh").is_file()
    os.close(descriptor)
    versions.tidy(root)
    assert folders(root) == [new.name]


@pytest.mark.parametrize(
    ("extra", "says"),
    [("echo no such library >&2; exit 3", "does not start on this machine.*exit code 3.*no such library"),
     ("exec sleep 60", "has not answered within 1 s")],
)  # fmt: skip
def test_a_version_that_does_not_answer_is_not_switched_to(
    tmp_path: Path, echo: Path, root: Path, kit: Kit, monkeypatch: pytest.MonkeyPatch, extra: str, says: str
) -> None:
    old = install(script(tmp_path, echo, "1"), root, kit)
    monkeypatch.setattr(installer, "HEALTH_PATIENCE", 1.0)
    with pytest.raises(Unavailable, match=says) as caught:
        install(script(tmp_path, echo, "2", extra), root, kit)
    assert "\n" not in caught.value.message
    assert versions.pointer(root, "toy").resolve() == old
    assert folders(root) == [old.name]
    assert not [child for child in psutil.Process().children(recursive=True) if "sleep" in child.cmdline()]


def test_what_an_interrupted_install_has_left_is_removed(tmp_path: Path, echo: Path, root: Path, kit: Kit) -> None:
    place = install(script(tmp_path, echo), root, kit)
    for name in (".2-abc.part", ".1-old.gone", ".archive", "2-built-and-not-switched-to"):
        shutil.copytree(place, root / "toy" / name)
    (root / "toy" / ".link.gone").symlink_to(place.name)
    versions.tidy(root)
    assert sorted(path.name for path in (root / "toy").iterdir()) == [".lock", place.name, "current"]


def test_a_backend_that_somebody_installs_is_not_tidied(tmp_path: Path, root: Path) -> None:
    (root / "toy" / ".1.part").mkdir(parents=True)
    with versions.alone(root / "toy"):
        versions.tidy(root)
    assert (root / "toy" / ".1.part").is_dir()


def test_a_removed_backend_goes_and_what_runs_of_it_stays(tmp_path: Path, echo: Path, root: Path, kit: Kit) -> None:
    place = install(script(tmp_path, echo), root, kit)
    _, descriptor = versions.hold(versions.pointer(root, "toy"))
    assert versions.remove(root, "toy")
    assert versions.installed(root) == []
    assert place.is_dir()
    os.close(descriptor)
    versions.tidy(root)
    assert folders(root) == []
    assert not versions.remove(root, "toy")
    with pytest.raises(StartupError, match="not installed on this node"):
        versions.hold(versions.pointer(root, "toy"))


def test_what_a_version_was_made_of_tells_it_apart(tmp_path: Path, echo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sources"
    shutil.copytree(installer.SOURCES, folder)
    monkeypatch.setattr(installer, "SOURCES", folder)
    gpu = {"gpus": [{"vendor": "amd"}]}
    builds = {"cpu": BuildEntry(), "rocm": BuildEntry()}
    both = ECHO.model_copy(update={"builds": builds})
    digests = [installer.wanted(both, {}).digest, installer.wanted(both, gpu).digest]
    digests.append(installer.wanted(both.model_copy(update={"version": "9"}), {}).digest)
    more = {"cpu": BuildEntry(requirements=REQUIREMENTS)}
    digests.append(installer.wanted(both.model_copy(update={"builds": more}), {}).digest)
    (folder / "echo" / "server.py").write_text("changed")
    digests.append(installer.wanted(both, {}).digest)
    assert len(set(digests)) == 5
    assert installer.wanted(both, {}).digest == digests[-1]


def test_the_requirements_of_the_machines_build_are_installed_with_its_index(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    run_uv = installer.run_uv

    def watching(arguments: list[str], *more: object) -> list[str]:
        seen.append(arguments)
        return run_uv([part for part in arguments if part not in ("--index", "https://wheels.example/rocm")], *more)

    monkeypatch.setattr(installer, "run_uv", watching)
    builds = {"cpu": BuildEntry(requirements=("no-such-package==1",)), "rocm": BuildEntry(requirements=REQUIREMENTS)}
    kit = Kit(hardware={"gpus": [{"vendor": "amd"}]}, indexes={"rocm": "https://wheels.example/rocm"})
    place = install(ECHO.model_copy(update={"builds": builds}), root, kit)
    assert (place / "requirements.txt").read_text().split() == list(REQUIREMENTS)
    assert versions.current(root, "echo").build == "rocm"
    assert seen[-1][-2:] == ["--index", "https://wheels.example/rocm"]


def test_a_backend_that_is_made_for_other_machines_is_refused(root: Path) -> None:
    entry = ECHO.model_copy(update={"builds": {"metal": BuildEntry(), "cuda12": BuildEntry()}})
    with pytest.raises(Unavailable, match="made for metal, cuda12, and this machine has cpu"):
        install(entry, root, Kit())


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (member("../out", b"x"), r"member with the name '\.\./out'"),
        (member("a/../../out", b"x"), "member with the name"),
        (member("/abs", b"x"), "member with the name '/abs'"),
        (member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "its link 'link' leads to '/etc/passwd'"),
        (member("link", type=tarfile.SYMTYPE, linkname="../../out"), "its link 'link' leads to"),
        (member("link", type=tarfile.LNKTYPE, linkname="../out"), "its link 'link' leads to"),
        (member("pipe", type=tarfile.FIFOTYPE), "is refused: .*special file"),
        (member("disk", type=tarfile.BLKTYPE), "is refused: .*special file"),
    ],
)
def test_an_archive_that_reaches_out_is_refused(
    tmp_path: Path, root: Path, kit: Kit, bad: tuple[tarfile.TarInfo, bytes], says: str
) -> None:
    archive = pack(tmp_path / "bad.tgz", member("run.sh", b"#!/bin/sh\n", 0o755), bad)
    with pytest.raises(InvalidValue, match=says):
        install(entry_of(archive), root, kit)
    assert folders(root) == []
    assert not (root / "out").exists()
    assert not (root / "toy" / "out").exists()


@pytest.mark.parametrize(("limit", "value"), [("MOST_MEMBERS", 2), ("LARGEST", 10)])
def test_an_archive_that_is_too_large_is_refused(
    tmp_path: Path, root: Path, kit: Kit, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(archives, limit, value)
    archive = pack(tmp_path / "big.tgz", *[member(f"f{number}", b"12345") for number in range(3)])
    with pytest.raises(InvalidValue, match="holds more than"):
        install(entry_of(archive), root, kit)
    assert folders(root) == []


@pytest.mark.parametrize(
    ("content", "says"), [(b"no archive at all", "no whole tar archive"), (None, "neither run.sh nor server.py")]
)
def test_what_is_no_backend_is_refused(tmp_path: Path, root: Path, kit: Kit, content: bytes | None, says: str) -> None:
    archive = pack(tmp_path / "a.tgz", member("deep/run.sh", b"#!/bin/sh\n", 0o755))
    if content is not None:
        (tmp_path / "a.tgz").write_bytes(content)
    with pytest.raises(LocalAIError, match=says):
        install(entry_of(archive), root, kit)
    assert folders(root) == []


def test_a_cut_archive_is_refused(tmp_path: Path, root: Path, kit: Kit) -> None:
    archive = pack(tmp_path / "a.tgz", member("run.sh", os.urandom(100_000), 0o755))
    whole = (tmp_path / "a.tgz").read_bytes()
    (tmp_path / "a.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Unavailable, match="no whole tar archive"):
        install(entry_of(archive), root, kit)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"name": "toy"}', '{"name": "T", "version": 1, "digest": "x", "build": ""}']
)
def test_what_else_lies_there_is_not_reported(root: Path, text: str) -> None:
    (root / "toy" / "1").mkdir(parents=True)
    (root / "toy" / "1" / "backend.json").write_text(text)
    (root / "a file").write_text("")
    versions.switch(root, "toy", "1")
    assert versions.installed(root) == []
