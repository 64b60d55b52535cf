"""The folder of models on a node: what is removed from it, and what is not."""

import os
import threading
import time
from pathlib import Path

import pytest

from localai_q.cluster.disk import Blob
from workers.node import store
from workers.node.store import FORGOTTEN, QUANTIZED, Store

A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
def models(tmp_path: Path) -> Store:
    found = Store(tmp_path)
    found.folder.mkdir()
    return found


def lay(models: Store, sha256: str, age: float = 0.0, size: int = 10) -> Path:
    part = models.part(sha256)
    part.write_bytes(bytes(size))
    path = models.keep(part, sha256)
    then = time.time() - age
    os.utime(models.folder / f".{sha256}.used", (then, then))
    return path


def everything(found: list[Blob]) -> list[Blob]:
    return found


def test_named_files_that_are_chosen_are_removed_and_nothing_else(models: Store) -> None:
    lay(models, A, age=100), lay(models, B, age=200), lay(models, C)
    seen: list[Blob] = []

    def choose(found: list[Blob]) -> list[Blob]:
        seen.extend(found)
        return [blob for blob in found if blob.sha256 == A]

    removed = models.clean(lambda: [A, B, "d" * 64, "../../etc/passwd", f".{C}.used"], choose, dry_run=False)
    assert [(blob.sha256, blob.size) for blob in removed] == [(A, 10)]
    assert {blob.sha256: round(blob.age, -1) for blob in seen} == {A: 100, B: 200}
    assert sorted(path.name for path in models.folder.iterdir()) == [f".{B}.used", f".{C}.used", B, C]


def test_a_dry_run_removes_nothing(models: Store) -> None:
    lay(models, A)
    part = models.part(B)
    part.write_bytes(b"x")
    os.utime(part, (0, 0))
    assert [blob.sha256 for blob in models.clean(lambda: [A], everything, dry_run=True)] == [A]
    assert (models.folder / A).exists()
    assert part.exists()


def test_what_was_asked_for_meanwhile_stays(models: Store) -> None:
    lay(models, A, age=1000)

    def choose(found: list[Blob]) -> list[Blob]:
        assert models.find(A) is not None  # a model that is added at this moment
        return found

    assert models.clean(lambda: [A], choose, dry_run=False) == []
    assert (models.folder / A).exists()


def test_what_did_not_come_by_a_fetch_stays(models: Store) -> None:
    (models.folder / A).write_bytes(b"of another program")
    assert models.find(A)
    assert models.clean(lambda: [A], everything, dry_run=False) == []
    assert models.files() == [A]


def test_what_somebody_works_on_stays(models: Store) -> None:
    lay(models, A, age=1000)
    with models.alone(A):
        assert models.clean(lambda: [A], everything, dry_run=False) == []
    assert [blob.sha256 for blob in models.clean(lambda: [A], everything, dry_run=False)] == [A]


def test_asking_for_a_file_waits_for_its_removal(models: Store) -> None:
    lay(models, A)
    found: list[Path | None] = []
    with models.alone(A):
        asking = threading.Thread(target=lambda: found.append(models.find(A)))
        asking.start()
        (models.folder / A).unlink()
    asking.join()
    assert found == [None]


def test_parts_that_nobody_goes_on_with_go_after_a_time(models: Store) -> None:
    for key, age in ((A, FORGOTTEN + 60), (B, 60.0), (C, FORGOTTEN + 60)):
        for kind in ("part", "part.note"):
            path = models.part(key, kind)
            path.write_bytes(b"x")
            then = time.time() - age
            os.utime(path, (then, then))
    with models.alone(C):
        models.clean(list, everything, dry_run=False)
    assert sorted(path.name for path in models.folder.iterdir()) == [
        f".{B}.part", f".{B}.part.note", f".{C}.part", f".{C}.part.note",
    ]  # fmt: skip


def test_a_file_is_on_the_disk_before_it_has_its_name(models: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(store, "sync", lambda path: order.append(f"sync {path.name[-4:]}"))
    monkeypatch.setattr(Path, "replace", lambda self, target: order.append("rename"))
    models.part(A).write_bytes(b"x")
    models.keep(models.part(A), A)
    assert order == ["sync part", "rename", "sync lobs"]


def test_a_quantized_file_whose_maker_is_gone_goes_and_a_download_stays_to_be_gone_on_with(models: Store) -> None:
    left, worked_on, download = (models.part("q1", QUANTIZED), models.part("q2", QUANTIZED), models.part(A))
    for path in (left, worked_on, download):
        path.touch()
    with models.alone("q2"):
        models.remove_forgotten()
        assert [path.exists() for path in (left, worked_on, download)] == [False, True, True]
    models.remove_forgotten()
    assert [path.exists() for path in (left, worked_on, download)] == [False, False, True]
