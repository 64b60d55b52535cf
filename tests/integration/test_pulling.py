"""A node gets a file from other nodes: from several at once, whatever becomes of them, and never a wrong byte."""

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from file_server import FileServer, Remote, serve
from holding import Running, holder, lay

from localai_q.cluster.events import Progress
from localai_q.config import load_settings
from localai_q.errors import NotFound, Unavailable
from workers.node import downloads, pulling
from workers.node.digests import PIECE, Digest
from workers.node.fetcher import Wanted, fetch
from workers.node.sources import Access, origin

CONTENT = os.urandom(5 * PIECE + 12345)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Told:
    """What the API says, and what it is told."""

    def __init__(self) -> None:
        self.named: list[Running] = []
        self.later: list[Running] = []  # as it says from the second time on
        self.blamed: list[str] = []
        self.stored = False
        self.knows = True
        self.change: Callable[[dict], dict] = lambda told: told

    def holders(self, sha256: str) -> dict:
        if not self.knows:
            raise NotFound("nothing to do with the file 'n1' is to run has the file.")
        found = [self.change(each.told(sha256)) for each in self.named]
        self.named = self.named + self.later
        return {"holders": found, "stored": self.stored}

    def blame(self, sha256: str, holder_id: str) -> None:
        self.blamed.append(holder_id)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts a holder that has the file, or what `content` says under the file's name."""
    with ExitStack() as stack:

        def run(name: str, content: bytes = CONTENT) -> Running:
            found = stack.enter_context(holder(tmp_path / name, name))
            laid = lay(found.store, content)
            if laid != DIGEST:
                for before, after in ((laid, DIGEST), (f".{laid}.beginnings", f".{DIGEST}.beginnings")):
                    (found.store.folder / before).rename(found.store.folder / after)
            return found

        yield run


@pytest.fixture
def source() -> Iterator[FileServer]:
    """Where the file is from."""
    with serve() as found:
        found.put("/m.gguf", Remote(CONTENT, etag='"1"', block=1 << 20))
        yield found


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "PAUSE", 0.0)
    monkeypatch.setattr(pulling, "PAUSE", 0.05)
    monkeypatch.setattr(downloads, "REPORT_EVERY", 0.0)


Get = Callable[..., Path]


@pytest.fixture
def get(tmp_path: Path, source: FileServer, told: Told) -> Get:
    def run(progress: Callable[[Progress], None] = lambda _: None, url: str = "", **settings: object) -> Path:
        cfg = load_settings(**{"allow_private_sources": True, "disk_spare": 0, **settings})
        access = Access(cfg, source.url, "n1", "secret", peers=told)
        wanted = Wanted(source=url or f"{source.url}/m.gguf", sha256=DIGEST)
        found = fetch(wanted, tmp_path / "mine", access, progress)
        assert found.read_bytes() == CONTENT
        left = [
            path.name for path in found.parent.glob(".*") if not path.name.endswith((".used", ".source", ".beginnings"))
        ]
        assert left == []
        return found

    return run


def starts(source: FileServer) -> list[int]:
    """From which bytes on the source was asked."""
    return [int(asked.removeprefix("bytes=").removesuffix("-") or 0) for asked in source.ranges()]


def part(tmp_path: Path, content: bytes) -> None:
    """What an earlier fetch has left."""
    folder = tmp_path / "mine" / "blobs"
    folder.mkdir(parents=True)
    (folder / f".{DIGEST}.part").write_bytes(content)


def corrupt(running: Running, place: int) -> None:
    with (running.store.folder / DIGEST).open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


def test_several_give_at_once_and_the_source_is_not_asked(get: Get, start, told: Told, source: FileServer) -> None:
    told.named = [start("h1"), start("h2"), start("h3")]
    seen: list[Progress] = []
    path = get(seen.append)
    assert source.seen == []
    assert "from h1, h2, h3" in {event.note for event in seen}
    assert (seen[-1].done, seen[-1].total) == (len(CONTENT), len(CONTENT))
    assert told.blamed == []
    digest = Digest()
    digest.update(CONTENT)
    beginnings = path.with_name(f".{DIGEST}.beginnings").read_bytes()
    assert beginnings == b"".join(digest.beginnings), "so that it can give it to others"


def test_one_that_dies_is_replaced_by_another(get: Get, start, told: Told, source: FileServer) -> None:
    first, second = start("h1"), start("h2")
    told.named = [first, second]

    def kill(event: Progress) -> None:
        if event.stage == "downloading" and event.done:
            first.process.kill()

    get(kill)
    assert source.seen == []


def test_when_the_only_one_dies_the_source_goes_on(
    get: Get, start, told: Told, source: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "AHEAD", 1)
    told.named = [start("h1")]

    def kill(event: Progress) -> None:
        if event.stage == "downloading" and event.done >= 2 * PIECE:
            told.named[0].process.kill()

    get(kill)
    (begun,) = starts(source)
    assert begun >= 2 * PIECE
    assert begun % PIECE == 0


def test_when_the_only_one_dies_and_another_has_it_by_then_that_goes_on(
    get: Get, start, told: Told, source: FileServer
) -> None:
    first, told.later = start("h1"), [start("h2")]
    told.named = [first]
    get(lambda event: first.process.kill())
    assert source.seen == []


def test_a_wrong_byte_is_found_and_only_its_piece_comes_again(
    get: Get, start, told: Told, source: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "MOST_CONNECTIONS", 1)
    told.named = [start("h1")]
    corrupt(told.named[0], 3 * PIECE + 5)
    get()
    assert told.blamed == ["h1"]
    assert starts(source) == [3 * PIECE]


def test_who_gives_a_wrong_byte_is_left_out(get: Get, start, told: Told, source: FileServer) -> None:
    told.named = [start("h1"), start("h2")]
    for number in range(6):  # whichever it is asked for first
        corrupt(told.named[0], number * PIECE + 100)
    get()
    assert told.blamed == ["h1"]
    assert source.seen == []


@pytest.mark.parametrize("honest", [False, True])
def test_who_lies_about_all_of_it_does_not_get_through(
    get: Get, start, told: Told, source: FileServer, honest: bool
) -> None:
    told.named = [start("liar", os.urandom(len(CONTENT))), *([start("h2")] if honest else [])]
    get()
    assert "liar" in told.blamed


@pytest.mark.parametrize("size", [PIECE, 5 * PIECE, len(CONTENT) + 1])
def test_who_has_a_file_of_another_size_does_not_get_through(get: Get, start, told: Told, size: int) -> None:
    told.named = [start("liar", os.urandom(size)), start("h2")]
    get()


def test_one_that_stalls_is_not_waited_for(
    get: Get, start, told: Told, source: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "SILENCE", 3600.0)
    stalled, other = start("h1"), start("h2")
    told.named = [stalled, other]
    os.kill(stalled.process.pid, signal.SIGSTOP)
    get()
    assert source.seen == []


def test_if_the_only_one_stalls_the_source_goes_on(
    get: Get, start, told: Told, source: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "SILENCE", 0.2)
    told.named = [start("h1")]
    os.kill(told.named[0].process.pid, signal.SIGSTOP)
    get()
    assert starts(source) == [0]


def test_one_that_trickles_is_given_up(
    get: Get, told: Told, source: FileServer, start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "STALL", 0.5)
    ranged = {"Content-Range": f"bytes 0-{PIECE - 1}/{len(CONTENT)}"}
    with serve() as slow:
        slow.files[f"/blobs/{DIGEST}"] = Remote(CONTENT, block=100, pause=0.1, headers=ranged)
        told.named = [start("h1")]
        told.change = lambda one: {**one, "url": f"{slow.url}/blobs/{DIGEST}"}
        get()
        assert slow.seen, "it was asked"
    assert starts(source) == [0]


@pytest.mark.parametrize("how", ["of another file", "of another holder", "nonsense"])
def test_without_a_ticket_that_holds_the_source_gives_it(
    get: Get, start, told: Told, source: FileServer, how: str
) -> None:
    running = start("h1")
    tickets = {"of another file": running.ticket("a" * 64), "nonsense": "x",
               "of another holder": running.ticket(DIGEST, node_id="h2")}  # fmt: skip
    told.named, told.change = [running], lambda one: {**one, "ticket": tickets[how]}
    get()
    assert starts(source) == [0]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "http://127.0.0.1:x/", "nonsense", "ftp://127.0.0.1:9/x"])
def test_an_address_that_leads_nowhere_is_no_failure(get: Get, start, told: Told, source: FileServer, url: str) -> None:
    told.named, told.change = [start("h1")], lambda one: {**one, "url": url}
    get()
    assert starts(source) == [0]


def test_what_came_before_is_not_fetched_again(get: Get, start, told: Told, tmp_path: Path, source: FileServer) -> None:
    part(tmp_path, CONTENT[: 3 * PIECE + 99])
    told.named = [start("h1")]
    seen: list[Progress] = []
    get(seen.append)
    assert min(event.done for event in seen if event.stage == "downloading") >= 3 * PIECE
    assert source.seen == []


def test_what_came_before_and_is_wrong_does_not_stay(
    get: Get, start, told: Told, tmp_path: Path, source: FileServer
) -> None:
    part(tmp_path, b"x" + CONTENT[1 : 3 * PIECE])
    told.named = [start("h1")]
    get()
    assert told.blamed == []
    assert source.seen == []


def test_a_file_that_has_no_source_any_more_comes_from_a_node(get: Get, start, told: Told, source: FileServer) -> None:
    source.files.clear()
    with pytest.raises(NotFound):
        get()
    told.named = [start("h1")]
    get()


def test_an_api_that_names_nobody_or_does_not_answer_is_no_failure(get: Get, told: Told, source: FileServer) -> None:
    told.knows = False
    get()
    assert starts(source) == [0]


def test_the_apis_own_store_goes_before_the_source(get: Get, told: Told, source: FileServer) -> None:
    told.stored = True
    source.put(f"/api/node/n1/files/{DIGEST}", Remote(CONTENT, key="Bearer secret"))
    get()
    assert [seen.path for seen in source.seen] == [f"/api/node/n1/files/{DIGEST}"]


def test_a_full_disk_is_said_before_a_byte_comes(
    get: Get, start, told: Told, source: FileServer, tmp_path: Path
) -> None:
    told.named = [start("h1")]
    with pytest.raises(Unavailable, match="are missing"):
        get(disk_spare=1 << 59)
    found = tmp_path / "mine" / "blobs" / f".{DIGEST}.part"
    assert not found.exists() or found.stat().st_size == 0


def test_a_file_on_a_shared_volume_is_used_as_it_is(get: Get, start, told: Told, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(CONTENT)
    file.chmod(0o644)
    path = get(url=f"file:{file}", shared_models=True, disk_spare=1 << 59)
    assert path.resolve() == file
    copy = get(url=f"file:{file}")
    assert copy == path, "it is there"
    file.unlink()
    told.named = [start("h1")]
    assert not get(url=f"file:{file}").is_symlink(), "it comes anew"
    assert not file.exists()


def test_the_own_file_goes_before_other_nodes(get: Get, start, told: Told, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(CONTENT)
    told.named = [start("h1")]
    seen: list[str] = []
    get(lambda event: seen.append(event.stage), url=f"file:{file}")
    assert "downloading" not in seen


def test_where_another_file_lies_at_its_path_the_right_one_comes_from_a_holder(
    tmp_path: Path, get: Get, told: Told, start: Callable[..., Running]
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"another")
    with pytest.raises(Unavailable, match="SHA-256"):
        get(url=f"file:{path}")
    told.named = [start("n1")]
    get(url=f"file:{path}")


def test_the_clusters_bucket_is_asked_before_the_source(
    get: Get, start, told: Told, source: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very secret")
    source.put(f"/files/of/us/{DIGEST}", Remote(CONTENT, cuts=[1 << 19]))
    dead = start("h1")
    dead.process.kill()
    told.named = [dead]
    get(file_bucket="s3://files/of/us/", s3_endpoint=source.url)
    assert {seen.path.partition("?")[0] for seen in source.seen} == {f"/files/of/us/{DIGEST}"}
    assert all("X-Amz-Signature=" in seen.path for seen in source.seen)


@pytest.mark.parametrize("there", [None, CONTENT[:-1], CONTENT[:-1] + b"?"])
def test_what_the_bucket_has_not_or_has_wrong_comes_from_the_source(
    get: Get, source: FileServer, there: bytes | None
) -> None:
    if there is not None:
        source.put(f"/files/{DIGEST}", Remote(there))
    get(file_bucket="s3://files", s3_endpoint=source.url)
    assert [seen.path for seen in source.seen] == [f"/files/{DIGEST}", "/m.gguf"]


def test_what_the_api_has_stored_comes_from_there_before_the_bucket(get: Get, told: Told, source: FileServer) -> None:
    told.stored = True
    source.put(f"/api/node/n1/files/{DIGEST}", Remote(CONTENT))
    get(file_bucket="s3://files", s3_endpoint=source.url)
    assert [seen.path for seen in source.seen] == [f"/api/node/n1/files/{DIGEST}"]
