"""A node looks for files where its own setting allows it, and nowhere else."""

import os
from pathlib import Path
from typing import BinaryIO

import pytest
from gguf_files import gguf, split

from localai_q.cli import importing
from localai_q.cluster.events import Progress
from localai_q.config import load_settings
from localai_q.errors import Forbidden, InvalidValue, StartupError, Unavailable
from workers.child import ChildSpec
from workers.node import imports, job_child
from workers.node.fetcher import Wanted, fetch
from workers.node.sources import Access


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What may be looked at; `outside` beside it may not."""
    for name in ("in/below", "outside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "in" / "one.gguf").write_bytes(gguf())
    (tmp_path / "in" / "below" / "two.GGUF").write_bytes(gguf())
    (tmp_path / "in" / "notes.txt").write_text("x")
    (tmp_path / "outside" / "secret.gguf").write_bytes(gguf())
    return tmp_path / "in"


def names(told: dict) -> dict[str, str | None]:
    return {Path(file["path"]).name: file["refused"] for file in told["files"]}


def taken(path: str, folders: list[Path]) -> list[Path]:
    """The files that an import of this path would bring."""
    with imports.importable(path, folders) as files:
        return [Path(file.name) for file in files]


def test_gguf_files_are_listed_with_what_their_headers_say(folder: Path) -> None:
    told = imports.listed("", [folder])
    assert told["folders"] == [str(folder)]
    assert names(told) == {"one.gguf": None, "two.GGUF": None}
    first = next(file for file in told["files"] if file["path"].endswith("one.gguf"))
    assert (first["facts"]["architecture"], first["size"]) == ("llama", len(gguf()))
    assert names(imports.listed(str(folder / "below"), [folder])) == {"two.GGUF": None}
    assert imports.listed("", []) == {"folders": [], "files": [], "left_out": 0}


def test_what_is_outside_is_refused_however_it_is_named(folder: Path) -> None:
    outside = folder.parent / "outside"
    (folder / "link").symlink_to(outside)
    (folder / "stolen.gguf").symlink_to(outside / "secret.gguf")
    (folder / "again.gguf").symlink_to(folder / "one.gguf")
    for path in (outside, f"{folder}/../outside", folder / "link", "/", f"{folder}side"):
        with pytest.raises(Forbidden, match="LOCALAI_Q_IMPORT_FOLDERS"):
            imports.listed(str(path), [folder])
        with pytest.raises(Forbidden):
            taken(f"{path}/secret.gguf", [folder])
    with pytest.raises(Forbidden):
        taken(str(folder / "stolen.gguf"), [folder])
    assert set(names(imports.listed("", [folder]))) == {"one.gguf", "two.GGUF", "again.gguf"}
    assert taken(str(folder / "again.gguf"), [folder]) == [folder / "one.gguf"]


def test_a_model_in_several_files_is_listed_once_with_what_all_of_them_are(folder: Path) -> None:
    paths = [folder / f"big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for path, content in zip(paths, split(gguf(), 3), strict=True):
        path.write_bytes(content)
    listed = imports.listed("", [folder])
    assert set(names(listed)) == {"one.gguf", "two.GGUF", paths[0].name}
    told = next(file for file in listed["files"] if file["path"] == str(paths[0]))
    assert (told["refused"], told["size"]) == (None, sum(path.stat().st_size for path in paths))
    assert told["facts"]["layer_bytes"] == 1280
    assert taken(str(paths[0]), [folder]) == paths


def test_of_several_files_the_one_that_is_missing_or_wrong_is_named(folder: Path) -> None:
    paths = [folder / f"big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for path, content in zip(paths, split(gguf(), 3), strict=True):
        path.write_bytes(content)
    with pytest.raises(InvalidValue, match=r"file 2 of 3 .* name the first of them, .*/big-00001-of-00003.gguf"):
        taken(str(paths[1]), [folder])
    paths[1].write_bytes(split(gguf(), 2)[1])
    assert "file 2 is one of 2" in names(imports.listed("", [folder]))[paths[0].name]
    paths[1].rename(folder.parent / "outside" / paths[1].name)
    with pytest.raises(InvalidValue, match=r"no file .*big-00002-of-00003.gguf"):
        taken(str(paths[0]), [folder])
    paths[1].symlink_to(folder.parent / "outside" / paths[1].name)
    with pytest.raises(Forbidden):
        taken(str(paths[0]), [folder])
    paths[0].unlink()
    told = names(imports.listed("", [folder]))
    assert "name the first of them" in told[paths[2].name]


def test_what_is_damaged_or_not_there_says_so(folder: Path) -> None:
    (folder / "cut.gguf").write_bytes(gguf()[:100])
    assert "ends within its header" in names(imports.listed("", [folder]))["cut.gguf"]
    for path in ("cut.gguf", "nowhere.gguf", "below"):
        with pytest.raises(InvalidValue):
            taken(str(folder / path), [folder])
    with pytest.raises(InvalidValue, match="no folder"):
        imports.listed(str(folder / "nowhere"), [folder])


def test_what_is_no_file_holds_nobody_up(folder: Path) -> None:
    os.mkfifo(folder / "pipe.gguf")
    (folder / "round.gguf").symlink_to("round.gguf")
    (folder / "device.gguf").symlink_to("/dev/zero")
    assert set(names(imports.listed("", [folder / "below" / ".."]))) == {"one.gguf", "two.GGUF"}
    with pytest.raises(InvalidValue, match="no file"):
        taken(str(folder / "pipe.gguf"), [folder])


@pytest.mark.parametrize("changed", ["one.gguf", "below"])
def test_what_becomes_a_link_once_it_was_resolved_is_not_followed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    outside, resolve = folder.parent / "outside", imports.allowed
    (outside / "two.GGUF").write_bytes(gguf())

    def late(*given: object) -> Path:
        real = resolve(*given)
        os.rename(folder / changed, folder / "aside")
        (folder / changed).symlink_to(outside / "secret.gguf" if changed == "one.gguf" else outside)
        return real

    monkeypatch.setattr(imports, "allowed", late)
    with pytest.raises(InvalidValue, match="has no file"):
        taken(str(folder / ("one.gguf" if changed == "one.gguf" else "below/two.GGUF")), [folder])


@pytest.mark.parametrize("mode", [0o644, 0o444])
@pytest.mark.parametrize("kernel_copies", [True, False])
def test_what_was_checked_is_what_comes_whatever_takes_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: int, kernel_copies: bool
) -> None:
    if not kernel_copies:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    one, meant = folder / "one.gguf", gguf() + b"meant"
    one.write_bytes(meant)
    one.chmod(mode)
    with imports.importable(str(one), [folder]) as (file,):
        one.unlink()
        one.symlink_to(folder.parent / "outside" / "secret.gguf")
        assert fetched(folder, file).read_bytes() == meant
    assert fetched(folder, None).read_bytes() == gguf(), "any file of the node can be a source by its name"


def test_on_a_shared_volume_what_was_replaced_is_refused(folder: Path) -> None:
    one = folder / "one.gguf"
    with imports.importable(str(one), [folder]) as (file,):
        one.unlink()
        one.symlink_to(folder.parent / "outside" / "secret.gguf")
        with pytest.raises(Unavailable, match="was replaced"):
            fetched(folder, file, shared_models=True)
    assert [path.name for path in (folder.parent / "models" / "blobs").iterdir()] == []


def test_a_job_brings_what_it_has_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALAI_Q_IMPORT_FOLDERS", str(folder))
    monkeypatch.setattr(job_child, "settings", lambda: load_settings(disk_spare=0))
    one, home = folder / "one.gguf", folder.parent
    one.write_bytes(gguf() + b"meant")

    def late(progress: Progress) -> None:
        if progress.stage == "resolving":  # which comes between the check and the copy
            one.unlink()
            one.symlink_to(home / "outside" / "secret.gguf")

    spec = ChildSpec(node_id="n", node_name="n", redis_url="", lease=1.0, journal_ttl=1.0, journal_max=1, load_stall=1.0,
                     status_fd=-1, backends=home, models=home / "models", api_url="http://127.0.0.1:9",
                     identity=home / "identity.json")  # fmt: skip
    order = job_child.JobOrder(spec=spec, request={"files": [str(one)]}, fd=-1)
    (brought,) = job_child.import_files(order, late)["files"]
    assert (brought["refused"], brought["size"]) == (None, len(gguf()) + len(b"meant"))


def fetched(folder: Path, opened: BinaryIO | None, **settings: object) -> Path:
    """The first file, as an import brings it."""
    access = Access(load_settings(disk_spare=0, **settings), "", "", "")
    wanted = Wanted(source=f"file:{folder}/one.gguf")
    return fetch(wanted, folder.parent / "models", access, lambda _: None, opened=opened)


def test_lists_and_walks_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "MOST_FILES", 1)
    told = imports.listed("", [folder])
    assert (len(told["files"]), told["left_out"]) == (1, 1)
    monkeypatch.setattr(imports, "MOST_FILES", 9)
    monkeypatch.setattr(imports, "DEEPEST", 0)
    assert set(names(imports.listed("", [folder]))) == {"one.gguf"}
    monkeypatch.setattr(imports, "MOST_ENTRIES", 0)
    for number in range(9):
        os.makedirs(folder / f"more{number}" / "x")
    assert len(names(imports.listed("", [folder]))) == 1


def test_a_name_that_cannot_be_shown_is_left_out(folder: Path) -> None:
    (folder / "bad\x1b.gguf").write_bytes(gguf())
    os.rename(folder / "one.gguf", os.fsencode(folder) + b"/\xff.gguf")
    assert set(names(imports.listed("", [folder]))) == {"two.GGUF"}


def test_the_setting_names_whole_paths() -> None:
    assert load_settings(import_folders="/a:/b c").import_places == (Path("/a"), Path("/b c"))
    assert load_settings().import_places == ()
    with pytest.raises(StartupError, match="LOCALAI_Q_IMPORT_FOLDERS"):
        load_settings(import_folders="/a:b")


def test_files_are_chosen_by_name_or_path_and_models_called_after_them() -> None:
    files = [{"path": path, "refused": "damaged" if "bad" in path else None}
             for path in ("/a/x.gguf", "/b/x.gguf", "/a/y.gguf", "/a/bad.gguf")]  # fmt: skip
    assert [file["path"] for file in importing.choose(files, everything=True, only=())] == [
        "/a/x.gguf", "/b/x.gguf", "/a/y.gguf",
    ]  # fmt: skip
    assert importing.choose(files, everything=False, only=["y.gguf", "/b/x.gguf"]) == [files[2], files[1]]
    for only in ("x.gguf", "z.gguf", "bad.gguf"):
        with pytest.raises(InvalidValue):
            importing.choose(files, everything=False, only=[only])
    assert [importing.name_of(f"/a/{name}") for name in ("Tiny (v2).Q4.gguf", "..gguf", "é.gguf", "b-00001-of-00002.gguf")] == [
        "Tiny-v2-.Q4", "model", "model", "b",
    ]  # fmt: skip
