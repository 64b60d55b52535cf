"""Fetching a model's file: from a web server, the API's store or a path of the node; resumed, verified, and kept by content."""

import errno
import gzip
import hashlib
import os
import threading
from pathlib import Path

import pytest
from fetching import CONTENT, DIGEST, OTHER, access, get, hurry, ignore, remains, visible
from file_server import FileServer, Remote

from localai_q.cluster.events import Progress
from localai_q.errors import LocalAIError, NotFound, Unavailable
from workers.node import downloads
from workers.node.fetcher import Wanted, discard, fetch
from workers.node.store import Store


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def test_a_file_is_kept_by_its_content(tmp_path: Path, server: FileServer) -> None:
    seen: list[Progress] = []
    path = get(tmp_path, server.put("/m.gguf", Remote(CONTENT)), seen.append)
    assert path == tmp_path / "blobs" / DIGEST
    assert path.read_bytes() == CONTENT
    assert (seen[-1].stage, seen[-1].done, seen[-1].total, seen[-1].unit) == (
        "downloading", len(CONTENT), len(CONTENT), "bytes",
    )  # fmt: skip
    assert seen[0].stage == "resolving"
    assert remains(tmp_path) == []


def test_what_is_there_is_not_fetched_again(tmp_path: Path, server: FileServer) -> None:
    url = server.put("/m.gguf", Remote(CONTENT))
    get(tmp_path, url)
    assert get(tmp_path, url).read_bytes() == CONTENT
    assert get(tmp_path, server.url + "/elsewhere").read_bytes() == CONTENT
    assert len(server.seen) == 1


def test_a_download_that_breaks_off_goes_on_where_it_was(tmp_path: Path, server: FileServer) -> None:
    url = server.put("/m.gguf", Remote(CONTENT, etag='"1"', cuts=[1 << 20, 1 << 19]))
    assert get(tmp_path, url).read_bytes() == CONTENT
    assert server.ranges() == ["", f"bytes={1 << 20}-", f"bytes={(1 << 20) + (1 << 19)}-"]
    assert server.seen[1].headers["if-range"] == '"1"'


def test_a_line_that_breaks_off_often_is_no_failure_as_long_as_something_comes(
    tmp_path: Path, server: FileServer
) -> None:
    url = server.put("/m.gguf", Remote(CONTENT, cuts=[100_000] * 20))
    assert get(tmp_path, url).read_bytes() == CONTENT
    assert len(server.seen) == 21


def test_a_server_without_ranges_is_read_from_the_start(tmp_path: Path, server: FileServer) -> None:
    url = server.put("/m.gguf", Remote(CONTENT, ranges=False, cuts=[1 << 20, 1 << 19]))
    assert get(tmp_path, url).read_bytes() == CONTENT


def test_a_server_that_begins_again_and_again_is_given_up(tmp_path: Path, server: FileServer) -> None:
    url = server.put("/m.gguf", Remote(CONTENT, ranges=False, cuts=[100_000, 200_000] * 9))
    with pytest.raises(Unavailable, match="the network failed"):
        get(tmp_path, url)
    assert len(server.seen) < 8


def test_a_file_that_changed_meanwhile_is_read_from_the_start(tmp_path: Path, server: FileServer) -> None:
    remote = Remote(OTHER, etag='"old"', cuts=[1 << 20])
    url = server.put("/m.gguf", remote)

    def change(event: Progress) -> None:
        if event.done == 1 << 20:
            server.files["/m.gguf"] = Remote(CONTENT, etag='"new"')

    assert get(tmp_path, url, change).read_bytes() == CONTENT
    assert server.ranges() == ["", f"bytes={1 << 20}-"]


def test_a_part_of_another_version_is_noticed_where_the_server_does_not_tell(
    tmp_path: Path, server: FileServer
) -> None:
    """A weak ETag cannot be asked for: the server goes on with another file, and says so only in its ETag."""
    url = server.put("/m.gguf", Remote(OTHER, etag='W/"old"', cuts=[1 << 20]))

    def change(event: Progress) -> None:
        if event.done == 1 << 20 and event.stage == "downloading":
            server.files["/m.gguf"] = Remote(CONTENT, etag='W/"new"')

    assert get(tmp_path, url, change).read_bytes() == CONTENT
    assert server.ranges() == ["", f"bytes={1 << 20}-", ""]


def test_a_download_that_was_stopped_is_resumed_by_the_next_fetch(tmp_path: Path, server: FileServer) -> None:
    url = server.put("/m.gguf", Remote(CONTENT, etag='"1"'))

    def stop(event: Progress) -> None:
        if event.done > 1 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(tmp_path, url, stop)
    assert visible(tmp_path) == set()
    stages: list[str] = []
    assert get(tmp_path, url, lambda event: stages.append(event.stage)).read_bytes() == CONTENT
    assert int(server.ranges()[1].removeprefix("bytes=").removesuffix("-")) > 1 << 20
    assert stages[:2] == ["resolving", "verifying"]


def test_a_damaged_part_is_mended(tmp_path: Path, server: FileServer) -> None:
    url = server.put("/m.gguf", Remote(CONTENT))
    Store(tmp_path).folder.mkdir()
    Store(tmp_path).part(DIGEST).write_bytes(b"x" + CONTENT[1 : 1 << 20])
    assert get(tmp_path, url).read_bytes() == CONTENT
    assert server.ranges() == [f"bytes={1 << 20}-", ""]


def test_a_part_that_is_longer_than_the_file_is_dropped(tmp_path: Path, server: FileServer) -> None:
    url = server.put("/m.gguf", Remote(CONTENT))
    Store(tmp_path).folder.mkdir()
    Store(tmp_path).part(DIGEST).write_bytes(CONTENT + b"more")
    assert get(tmp_path, url).read_bytes() == CONTENT


def test_a_cancelled_fetch_leaves_nothing(tmp_path: Path, server: FileServer) -> None:
    url = server.put("/m.gguf", Remote(CONTENT))

    def stop(event: Progress) -> None:
        if event.done > 1 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(tmp_path, url, stop)
    assert remains(tmp_path) == [f".{DIGEST}.part", f".{DIGEST}.part.note"]
    discard(Wanted(source=url, sha256=DIGEST), tmp_path)
    assert remains(tmp_path) == []


def test_a_server_that_is_busy_is_asked_again(tmp_path: Path, server: FileServer) -> None:
    assert get(tmp_path, server.put("/m.gguf", Remote(CONTENT, statuses=[503, 429]))).read_bytes() == CONTENT
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1 answered 500"):
        get(tmp_path / "other", server.put("/m.gguf", Remote(CONTENT, statuses=[500] * 9)))


def test_a_network_that_stays_down_is_said_in_one_line(tmp_path: Path, server: FileServer) -> None:
    url = server.put("/m.gguf", Remote(CONTENT, cuts=[0] * 9))
    with pytest.raises(
        Unavailable, match=r"cannot fetch http://127.*the network failed \(RemoteProtocolError: "
    ) as caught:
        get(tmp_path, url)
    assert "\n" not in caught.value.message
    assert visible(tmp_path) == set()


def test_a_server_that_drips_is_given_up(tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "STALL", 0.05)
    url = server.put("/m.gguf", Remote(CONTENT, block=10, pause=0.02))
    with pytest.raises(Unavailable, match=r"only [0-9]+ bytes came in 0 s"):
        get(tmp_path, url)


def test_a_file_that_comes_packed_is_not_taken_for_the_file(tmp_path: Path, server: FileServer) -> None:
    packed = gzip.compress(CONTENT)
    url = server.put("/o/r/resolve/main/m", Remote(packed, headers={"Content-Encoding": "gzip"}))
    with pytest.raises(Unavailable, match=r"127.0.0.1 sends it packed \(gzip\), though asked not to"):
        fetch(Wanted(source="hf://o/r/m"), tmp_path, access(hf_endpoint=server.url), ignore)
    assert server.seen[-1].headers["accept-encoding"] == "identity"
    assert visible(tmp_path) == set()
    digest = hashlib.sha256(packed).hexdigest()
    assert fetch(Wanted(source=url, sha256=digest), tmp_path, access(), ignore).read_bytes() == packed


def test_a_disk_that_fills_up_is_given_back_what_came(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = downloads.Growing.add

    def fill(growing: downloads.Growing, *block: object) -> None:
        add(growing, *block)
        if growing.done > len(CONTENT) // 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(downloads.Growing, "add", fill)
    with pytest.raises(Unavailable, match=f"the disk of {tmp_path} is full"):
        get(tmp_path, server.put("/m.gguf", Remote(CONTENT)))
    assert remains(tmp_path) == []


def test_a_fetch_removes_what_was_forgotten(tmp_path: Path, server: FileServer) -> None:
    forgotten = Store(tmp_path).part("0" * 64)
    forgotten.parent.mkdir()
    forgotten.touch()
    os.utime(forgotten, (0, 0))
    get(tmp_path, server.put("/m.gguf", Remote(CONTENT)))
    assert remains(tmp_path) == []


def test_mirrors_take_over(tmp_path: Path, server: FileServer) -> None:
    gone, wrong = server.url + "/gone", server.put("/wrong", Remote(OTHER))
    good = server.put("/good", Remote(CONTENT))
    assert get(tmp_path, gone, mirrors=(wrong, good)).read_bytes() == CONTENT
    assert [seen.path for seen in server.seen] == ["/gone", "/wrong", "/good"]
    with pytest.raises(Unavailable, match="another content than expected"):
        get(tmp_path / "other", gone, mirrors=(wrong,))


def test_a_mirror_goes_on_where_another_stopped(tmp_path: Path, server: FileServer) -> None:
    first = server.put("/first", Remote(CONTENT, etag='"a"', cuts=[1 << 20, 0, 0, 0, 0]))
    second = server.put("/second", Remote(CONTENT, etag='"b"'))
    assert get(tmp_path, first, mirrors=(second,)).read_bytes() == CONTENT
    assert server.ranges()[-1] == f"bytes={1 << 20}-"


def test_two_fetches_of_one_file_download_it_once_and_both_see_it_come(tmp_path: Path, server: FileServer) -> None:
    url = server.put("/m", Remote(CONTENT, pause=0.03))
    progress: list[list[Progress]] = [[], [], []]
    threads = [threading.Thread(target=get, args=(tmp_path, f"{url}?{n}", progress[n].append)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.seen) == 1
    assert visible(tmp_path) == {DIGEST}
    assert remains(tmp_path) == []
    assert all(len({event.done for event in seen if event.stage == "downloading"}) > 3 for seen in progress)


def test_many_fetches_at_once_stay_alone_and_leave_no_lock_behind(tmp_path: Path) -> None:
    inside, most = 0, 0
    models = Store(tmp_path)

    def work() -> None:
        nonlocal inside, most
        for _ in range(100):
            with models.alone("x"):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list(models.folder.iterdir()) == []


def test_an_uploaded_file(tmp_path: Path, server: FileServer) -> None:
    server.put("/api/node/n1/files/" + DIGEST, Remote(CONTENT, key="Bearer secret"))
    wanted = Wanted(source=f"store:{DIGEST}")
    path = fetch(wanted, tmp_path, access(server.url, allow_private_sources=False), ignore)
    assert path.read_bytes() == CONTENT
    with pytest.raises(Unavailable, match="another content than expected"):
        fetch(Wanted(source=f"store:{DIGEST}", sha256="0" * 64), tmp_path, access(server.url), ignore)


def test_a_file_of_this_node_is_copied(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(CONTENT)
    path = get(tmp_path, f"file:{model}")
    assert path == tmp_path / "blobs" / DIGEST
    assert path.read_bytes() == CONTENT
    assert get(tmp_path, f"file:{model}", sha256=None) == path
    with pytest.raises(Unavailable, match=f"its SHA-256 is {DIGEST}, expected {'0' * 64}"):
        get(tmp_path, f"file:{model}", sha256="0" * 64)
    with pytest.raises(NotFound, match="this node has no such file"):
        get(tmp_path, "file:/nowhere/model.gguf", sha256="1" * 64)
    assert (visible(tmp_path), remains(tmp_path)) == ({DIGEST}, [])
    assert model.read_bytes() == CONTENT


@pytest.mark.parametrize("kernel_copies", [True, False])
def test_an_edit_of_a_users_own_file_does_not_reach_the_verified_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_copies: bool
) -> None:
    if not kernel_copies:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    model = tmp_path / "model.gguf"
    model.write_bytes(CONTENT)
    path = get(tmp_path, f"file:{model}")
    with model.open("r+b") as file:
        file.write(b"edited in place")
    assert path.read_bytes() == CONTENT


def test_a_file_that_nobody_may_write_to_takes_no_more_disk(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(CONTENT)
    model.chmod(0o444)
    path = get(tmp_path, f"file:{model}")
    assert path.stat().st_ino == model.stat().st_ino


def test_every_refusal_names_the_source(tmp_path: Path) -> None:
    with pytest.raises(LocalAIError, match=r"^cannot fetch file:/nowhere: "):
        get(tmp_path, "file:/nowhere")
