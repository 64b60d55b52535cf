"""A holder gives a file to who has a ticket for it, in parts, and nothing to anybody else."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from holding import Running, holder, lay
from tornado.netutil import bind_sockets
from waiting import LIMIT, wait_for

from localai_q.cluster.tickets import LIFE
from localai_q.config import load_settings
from localai_q.errors import StartupError
from localai_q.names import BEGINNING_HEADER
from workers.node import holder as module
from workers.node.digests import PIECE, Digest

CONTENT = os.urandom(PIECE + 1000)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with holder(tmp_path_factory.mktemp("holder")) as found:
        yield found


@pytest.fixture(scope="module")
def sha256(running: Running) -> str:
    return lay(running.store, CONTENT)


def ask(running: Running, path: str, ticket: str = "", method: str = "GET", **headers: str) -> httpx.Response:
    with httpx.Client(trust_env=False) as http:
        headers = {**headers, "Authorization": f"Bearer {ticket}"} if ticket else headers
        return http.request(method, f"http://{running.address}{path}", headers=headers)


def get(running: Running, sha256: str, method: str = "GET", **headers: str) -> httpx.Response:
    return ask(running, f"/blobs/{sha256}", running.ticket(sha256), method, **headers)


def test_a_whole_file(running: Running, sha256: str) -> None:
    answer = get(running, sha256)
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert answer.headers[BEGINNING_HEADER] == sha256


def test_a_part_comes_with_the_sha256_of_what_ends_there(running: Running, sha256: str) -> None:
    first = Digest()
    first.update(CONTENT[:PIECE])
    answer = get(running, sha256, Range=f"bytes=0-{PIECE - 1}")
    assert (answer.status_code, answer.content) == (206, CONTENT[:PIECE])
    assert answer.headers["Content-Range"] == f"bytes 0-{PIECE - 1}/{len(CONTENT)}"
    assert answer.headers[BEGINNING_HEADER] == first.sha256

    answer = get(running, sha256, Range=f"bytes={PIECE}-")
    assert (answer.content, answer.headers[BEGINNING_HEADER]) == (CONTENT[PIECE:], sha256)
    answer = get(running, sha256, Range="bytes=5-9")
    assert (answer.content, BEGINNING_HEADER in answer.headers) == (CONTENT[5:10], False)
    answer = get(running, sha256, "HEAD", Range=f"bytes=0-{PIECE - 1}")
    assert (answer.content, answer.headers[BEGINNING_HEADER]) == (b"", first.sha256)
    assert answer.headers["Content-Length"] == str(PIECE)


@pytest.mark.parametrize(
    "asked", [f"bytes={len(CONTENT)}-", "bytes=9-5", "bytes=-5", "bytes=0-1,3-4", "lines=1-2", "bytes=x-"]
)
def test_a_part_that_is_none_is_refused(running: Running, sha256: str, asked: str) -> None:
    assert get(running, sha256, Range=asked).status_code == 416


def test_without_the_right_ticket_nothing_comes(running: Running, sha256: str) -> None:
    wrong = {
        "none": "", "nonsense": "x.y", "of another file": running.ticket("a" * 64),
        "of another holder": running.ticket(sha256, node_id="h2"), "forged": running.ticket(sha256, secret_hash="0" * 64),
        "expired": running.ticket(sha256, now=time.time() - LIFE - 1),
    }  # fmt: skip
    for what, ticket in wrong.items():
        for method in ("GET", "HEAD"):
            answer = ask(running, f"/blobs/{sha256}", ticket, method)
            assert (answer.status_code, answer.content) == (403, b""), what


def test_a_ticket_of_one_holder_is_nothing_to_another(running: Running, sha256: str, tmp_path: Path) -> None:
    with holder(tmp_path, "h2") as other:
        lay(other.store, CONTENT)
        path = f"/blobs/{sha256}"
        assert ask(other, path, other.ticket(sha256)).status_code == 200
        assert ask(other, path, running.ticket(sha256)).status_code == 403
        assert ask(other, path, running.ticket(sha256, node_id="h2")).status_code == 403


def test_a_ticket_holds_while_the_secret_changes(running: Running, sha256: str) -> None:
    before = running.ticket(sha256)
    running.identity.prepare()
    running.identity.adopt()
    assert ask(running, f"/blobs/{sha256}", before).status_code == 200
    assert get(running, sha256).status_code == 200
    running.identity.settle()
    assert ask(running, f"/blobs/{sha256}", before).status_code == 403


def test_nothing_else_is_served(running: Running, sha256: str) -> None:
    secret = running.store.folder.parent / "identity.json"
    assert secret.exists()
    ticket = running.ticket(sha256)
    for path in ("/", "/blobs", "/blobs/", "/identity.json", "/blobs/../identity.json", "/blobs/%2e%2e/identity.json",
                 f"/blobs/.{sha256}.beginnings", f"/blobs/{sha256}/", f"/blobs/{sha256.upper()}", f"//blobs/{sha256}x"):  # fmt: skip
        assert ask(running, path, ticket).status_code == 404, path
    missing = "c" * 64
    assert ask(running, f"/blobs/{missing}", running.ticket(missing)).status_code == 404
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert ask(running, f"/blobs/{sha256}", ticket, method).status_code == 405, method


def raw(running: Running) -> socket.socket:
    host, _, port = running.address.rpartition(":")
    return socket.create_connection((host, int(port)), LIMIT)


@pytest.mark.parametrize(
    "words", [b"X: " + b"x" * (64 << 10), b"Content-Length: 9\r\n\r\n123456789"], ids=["headers", "a body"]
)
def test_large_headers_and_bodies_are_refused(running: Running, sha256: str, words: bytes) -> None:
    told = f"GET /blobs/{sha256} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.ticket(sha256)}\r\n".encode()
    with raw(running) as line, suppress(ConnectionError):
        line.sendall(told + words)
        assert line.recv(1 << 16)[:12] in (b"", b"HTTP/1.1 400")
    assert get(running, sha256).status_code == 200


def test_connections_are_limited(running: Running, sha256: str) -> None:
    lines = [raw(running) for _ in range(module.MOST_CONNECTIONS)]
    try:
        with pytest.raises(httpx.HTTPError):
            get(running, sha256)
    finally:
        for line in lines:
            line.close()
    assert wait_for(lambda: _answers(running, sha256))


def _answers(running: Running, sha256: str) -> bool:
    with suppress(httpx.HTTPError):
        return get(running, sha256).status_code == 200
    return False


@pytest.fixture
def hasty(running: Running, sha256: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Running, module.Holder]]:
    """The same files, by a server with little patience; and what counts its transfers."""
    monkeypatch.setattr(module, "HEADERS_WITHIN", 1.5)
    monkeypatch.setattr(module, "SLICE_WITHIN", 1.5)
    loop, sockets = asyncio.new_event_loop(), bind_sockets(0, "127.0.0.1")
    served = module.Holder(running.id, running.identity, running.store)

    async def start() -> None:
        module.Server(served.application()).add_sockets(sockets)

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(start(), loop).result(LIMIT)
    yield replace(running, address=f"127.0.0.1:{sockets[0].getsockname()[1]}"), served
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def test_who_sends_or_takes_too_slowly_is_cut_off(hasty: tuple[Running, module.Holder], sha256: str) -> None:
    server, holder = hasty
    with raw(server) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost:")
        assert line.recv(100) == b""
    request = f"GET /blobs/{sha256} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.ticket(sha256)}\r\n\r\n"
    with raw(server) as line:
        line.sendall(request.encode())
        assert wait_for(lambda: holder.transfers == 1)
        assert wait_for(lambda: holder.transfers == 0)
        taken = b""
        while block := line.recv(1 << 20):
            taken += block
    assert len(taken) < len(CONTENT), "more than lay in between was sent"
    assert get(server, sha256).content == CONTENT


def test_transfers_are_counted_and_limited(running: Running, sha256: str) -> None:
    """Readers that take nothing hold a transfer each, until there are too many."""
    request = f"GET /blobs/{sha256} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.ticket(sha256)}\r\n\r\n"
    lines = [raw(running) for _ in range(module.MOST_TRANSFERS)]
    try:
        for line in lines:
            line.sendall(request.encode())
        for line in lines:
            assert line.recv(12) == b"HTTP/1.1 200"
        assert get(running, sha256).status_code == 503
    finally:
        for line in lines:
            line.close()
    assert wait_for(lambda: _answers(running, sha256))


def test_several_are_served_at_once(running: Running, sha256: str) -> None:
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(get(running, sha256).content)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 6


@pytest.mark.parametrize(
    ("files", "api", "listen", "expected"),
    [
        ("", "127.0.0.1:8080", "http://127.0.0.1:8080", ("127.0.0.1", 0, "127.0.0.1")),
        ("", "0.0.0.0:8080", "http://127.0.0.1:8080", ("0.0.0.0", 0, "0.0.0.0")),
        ("127.0.0.1:7000", "0.0.0.0:8080", "http://127.0.0.1:8080", ("127.0.0.1", 7000, "127.0.0.1")),
        ("0.0.0.0:7000", "127.0.0.1:8080", "http://127.0.0.1:8080", ("0.0.0.0", 7000, "127.0.0.1")),
        ("[::1]:7000", "127.0.0.1:8080", "http://127.0.0.1:8080", ("::1", 7000, "::1")),
    ],
)
def test_where_it_listens(files: str, api: str, listen: str, expected: tuple[str, int, str]) -> None:
    assert module.addresses(load_settings(files_address=files, address=api), listen) == expected


@pytest.mark.parametrize("value", ["x", "10.0.0.1", ":5", "10.0.0.1:65536", "http://x:5", "a b:5", "x:5/"])
@pytest.mark.parametrize("name", ["LOCALAI_HTTP_ADDR", "LOCALAI_ADVERTISE_HTTP_ADDR"])
def test_a_setting_that_is_no_address_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StartupError, match=f"{name}=.*needs the form HOST:PORT"):
        load_settings()


def test_a_free_port_cannot_be_advertised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALAI_HTTP_ADDR", "10.0.0.1:0")
    assert load_settings().files_address == "10.0.0.1:0"
    monkeypatch.setenv("LOCALAI_ADVERTISE_HTTP_ADDR", "10.0.0.1:0")
    with pytest.raises(StartupError, match="LOCALAI_ADVERTISE_HTTP_ADDR"):
        load_settings()


def test_who_cannot_listen_says_why(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(AssertionError, match="LOCALAI_HTTP_ADDR may set"),
            holder(tmp_path, LOCALAI_HTTP_ADDR=address),
        ):
            pass
