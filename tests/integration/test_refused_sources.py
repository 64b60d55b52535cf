"""What a node does not fetch: wrong contents, what never ends, and what leads to where sources may not."""

import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from fetching import CONTENT, DIGEST, OTHER, access, get, hurry, ignore, remains, visible
from file_server import FileServer, Remote, serve

from localai_q.config import load_settings
from localai_q.errors import Forbidden, InvalidValue, NotFound, Unavailable
from workers.node import fetcher, store
from workers.node.fetcher import Wanted, fetch
from workers.node.sources import Access


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


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
    with pytest.raises(InvalidValue, match=r"LOCALAI_Q_ALLOW_PRIVATE_SOURCES=true allows that, on the node"):
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
