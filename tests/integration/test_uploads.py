"""Uploaded files are what their names say, or not there; what is cut off is gone on with, by whichever process."""

import hashlib
import io
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from cluster_data import ready_node
from small_disks import fill, small_disk
from test_web_process import Web
from waiting import LIMIT, wait_for

from localai_q import sending
from localai_q.bus.connection import client
from localai_q.cli import models as cli_models
from localai_q.cli.client import Api
from localai_q.cluster.quantizing import Source, Spec
from localai_q.config import load_settings
from localai_q.embedded.valkey import Valkey
from localai_q.errors import (
    BodyTooLarge,
    Conflict,
    InvalidValue,
    NoRoom,
    NotFound,
    TooManyUploads,
    Unavailable,
    WrongOffset,
)
from localai_q.processes import stop
from localai_q.services import uploads
from localai_q.services.uploads import Chunk
from localai_q.services.wiring import Services
from localai_q.store import quantizations
from workers.identity import Identity
from workers.node.api import NodeApi

CONTENT = os.urandom(3 << 20)
SHA = hashlib.sha256(CONTENT).hexdigest()
TOTAL = len(CONTENT)
HALF = TOTAL // 2


def files(services: Services) -> list[str]:
    folder = services.settings.home / "files"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def changed(services: Services, **settings: object) -> Services:
    return Services(services.settings.model_copy(update=settings), services.db, services.redis, services.leases,
                    services.doorbells)  # fmt: skip


def put(services: Services, start: int = 0, end: int = TOTAL, *, content: bytes = CONTENT, sha256: str = SHA):
    chunk = Chunk(size=end - start, start=start, total=len(content))
    return uploads.receive(services, sha256, io.BytesIO(content[start:end]), chunk)


class Broken(io.BytesIO):
    """A client that goes after a block."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell():
            raise OSError("the client has gone")
        return super().read(size)


def test_a_file_is_read_back_from_any_byte(services: Services) -> None:
    assert put(services) == uploads.Received(size=TOTAL, whole=True)
    assert uploads.state(services, SHA) == uploads.Received(size=TOTAL, whole=True)
    for start in (0, 5, TOTAL - 1, TOTAL, TOTAL + 9):
        size, blocks = uploads.read(services, SHA, start)
        assert size == TOTAL
        assert b"".join(blocks) == CONTENT[start:]


def test_a_file_comes_in_parts(services: Services) -> None:
    assert put(services, 0, HALF) == uploads.Received(size=HALF, whole=False)
    assert uploads.state(services, SHA) == uploads.Received(size=HALF, whole=False)
    assert put(services, HALF).whole
    assert files(services) == [SHA]
    assert b"".join(uploads.read(services, SHA, 0)[1]) == CONTENT


def test_what_is_cut_off_is_gone_on_with_where_it_ended(services: Services) -> None:
    with pytest.raises(OSError, match="gone"):
        uploads.receive(services, SHA, Broken(CONTENT), Chunk(size=TOTAL, total=TOTAL))
    assert uploads.state(services, SHA) == uploads.Received(size=1 << 20, whole=False)
    for start in (0, HALF, TOTAL - 1):
        with pytest.raises(WrongOffset, match=str(1 << 20)):
            put(services, start, start + 1)
    assert put(services, 1 << 20).whole


def test_what_begins_in_its_middle_takes_no_place(services: Services) -> None:
    with pytest.raises(WrongOffset, match="begin at 0"):
        put(services, HALF)
    assert not list((services.settings.home / "files").glob(".*.part"))


def test_what_is_all_there_is_checked_when_it_is_asked_for(services: Services) -> None:
    put(services, 0, TOTAL - 1)
    (part,) = (services.settings.home / "files").glob(".*.part")
    with part.open("ab") as file:
        file.write(CONTENT[-1:])  # the process died before it looked
    for _ in range(2):  # the second one finds it whole
        assert uploads.receive(services, SHA, io.BytesIO(), Chunk(size=0, start=None, total=TOTAL)).whole
    assert files(services) == [SHA]


def test_what_is_swept_while_it_is_asked_for_is_to_be_sent(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    put(services)
    touch = os.utime

    def swept(path: Path) -> None:
        path.unlink()
        touch(path)

    monkeypatch.setattr(os, "utime", swept)
    asked = uploads.receive(services, SHA, io.BytesIO(), Chunk(size=0, start=None, total=TOTAL))
    assert asked == uploads.Received(size=0, whole=False)


def test_a_file_that_is_not_what_its_name_says_leaves_nothing(services: Services) -> None:
    with pytest.raises(InvalidValue, match=SHA):
        put(services, sha256="0" * 64)
    put(services, 0, HALF, sha256="0" * 64)
    with pytest.raises(InvalidValue, match=SHA):
        put(services, HALF, sha256="0" * 64)
    assert files(services) == []


def test_a_wrong_upload_leaves_the_right_one_in_place(services: Services) -> None:
    put(services)
    with pytest.raises(InvalidValue):
        put(services, 0, 7, content=b"changed")
    assert b"".join(uploads.read(services, SHA, 0)[1]) == CONTENT


def test_of_a_length_that_nobody_said_nothing_stays(services: Services) -> None:
    for content, error in ((Broken(CONTENT), OSError), (io.BytesIO(b"wrong"), InvalidValue)):
        with pytest.raises(error):
            uploads.receive(services, SHA, content, Chunk(size=None))
        assert files(services) == []
    assert uploads.receive(services, SHA, io.BytesIO(CONTENT), Chunk(size=None)).whole


def test_who_was_cut_off_and_wakes_writes_no_more(services: Services) -> None:
    class Late(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() == 1 << 20:
                put(services, 1 << 20, 2 << 20)  # the client has come back meanwhile
            return super().read(size)

    with pytest.raises(Conflict, match="goes on"):
        uploads.receive(services, SHA, Late(CONTENT), Chunk(size=TOTAL, total=TOTAL))
    assert put(services, 2 << 20).whole


def test_who_writes_while_another_checks_is_to_come_back(services: Services) -> None:
    put(services, 0, HALF)
    (part,) = (services.settings.home / "files").glob(".*.part")
    with (
        part.open("a+b") as file,
        uploads._alone(file, part, HALF),
        pytest.raises(Unavailable, match="writes or checks"),
    ):
        put(services, HALF)
    assert put(services, HALF).whole


class Interrupted(io.BytesIO):
    """A client beside whose first block something else happens."""

    def __init__(self, content: bytes, event: Callable[[], object]) -> None:
        super().__init__(content)
        self._event = event

    def read(self, size: int | None = -1) -> bytes:
        event, self._event = self._event, lambda: None
        event()
        return super().read(size)


def give_up_and_begin_anew(services: Services) -> None:
    uploads.give_up(services, SHA)
    put(services, 0, HALF)


def test_who_was_given_up_brings_no_part_of_another_one_to_light(services: Services) -> None:
    put(services, 0, TOTAL - 1)
    last = Interrupted(CONTENT[-1:], lambda: give_up_and_begin_anew(services))
    with pytest.raises(Conflict, match="given up"):
        uploads.receive(services, SHA, last, Chunk(size=1, start=TOTAL - 1, total=TOTAL))
    assert uploads.state(services, SHA) == uploads.Received(size=HALF, whole=False)
    assert put(services, HALF).whole


def test_what_is_checked_is_not_given_up(services: Services) -> None:
    put(services, 0, HALF)
    (part,) = (services.settings.home / "files").glob(".*.part")
    with part.open("rb") as file, uploads._alone(file, part), pytest.raises(Unavailable, match="writes or checks"):
        uploads.give_up(services, SHA)
    uploads.give_up(services, SHA)


def test_what_two_have_written_with_different_content_is_found_out(services: Services) -> None:
    put(services, 0, HALF)
    (part,) = (services.settings.home / "files").glob(".*.part")
    part.write_bytes(bytes(HALF))  # another process has begun it anew, with another file
    with pytest.raises(InvalidValue, match=SHA):
        put(services, HALF)
    assert files(services) == []


def test_who_comes_late_with_the_same_file_leaves_the_whole_one_as_it_is(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(services, 0, HALF)
    begin = uploads._begin

    def late(*given: object) -> int:
        monkeypatch.setattr(uploads, "_begin", begin)
        put(services, HALF)  # another one was faster between the open and the first look
        return begin(*given)

    monkeypatch.setattr(uploads, "_begin", late)
    with pytest.raises(Conflict, match="brought it to its end"):
        put(services)
    assert b"".join(uploads.read(services, SHA, 0)[1]) == CONTENT


def test_of_two_whose_length_nobody_said_the_first_leaves_the_seconds_part(services: Services) -> None:
    with pytest.raises(Conflict, match="goes on"):
        uploads.receive(services, SHA, Interrupted(CONTENT, lambda: write_as_another(services)), Chunk(size=None))
    (part,) = (services.settings.home / "files").glob(".*.part")
    assert part.read_bytes() == b"of somebody else"


def write_as_another(services: Services) -> None:
    (part,) = (services.settings.home / "files").glob(".*.part")
    part.write_bytes(b"of somebody else")


def test_a_disk_that_becomes_full_meanwhile_is_said(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "HEADROOM", 0)
    with small_disk(services.settings.home / "files", 2) as disk:
        with pytest.raises(NoRoom, match="became full"):
            uploads.receive(services, SHA, io.BytesIO(CONTENT), Chunk(size=None))
        assert list(disk.iterdir()) == []
        put(services, 0, 1 << 20, content=CONTENT[: (1 << 20) + 1])
        ballast = fill(disk)
        with pytest.raises(NoRoom):
            put(services, 1 << 20, (1 << 20) + 1, content=CONTENT[: (1 << 20) + 1])
        ballast.unlink()


@pytest.mark.parametrize("told", [True, False])
def test_a_file_that_is_too_large_is_refused_told_or_found_out(services: Services, told: bool) -> None:
    class Unread(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert not told
            return super().read(size)

    chunk = Chunk(size=TOTAL, total=TOTAL) if told else Chunk(size=None)
    with pytest.raises(BodyTooLarge, match="LOCALAI_Q_MAX_UPLOAD"):
        uploads.receive(changed(services, max_upload=100), SHA, Unread(CONTENT), chunk)
    assert files(services) == []


def test_a_disk_without_room_for_all_that_is_on_its_way_refuses(services: Services) -> None:
    roomy = changed(services, max_upload=1 << 62)
    with pytest.raises(NoRoom, match="no room"):
        uploads.receive(roomy, SHA, io.BytesIO(), Chunk(size=1, start=0, total=1 << 60))
    assert files(services) == []
    folder = services.settings.home / "files"
    promised = folder / f".{'1' * 64}.{1 << 60}.part"
    promised.touch()
    with pytest.raises(NoRoom):
        put(services)


def test_so_many_are_on_their_way_and_what_nobody_goes_on_with_goes(services: Services) -> None:
    few = changed(services, max_uploads=1, upload_ttl=100.0)
    put(few, 0, HALF, sha256="0" * 64)
    with pytest.raises(TooManyUploads, match="LOCALAI_Q_MAX_UPLOADS"):
        put(few, 0, HALF)
    put(few, HALF, HALF + 1, sha256="0" * 64)  # one that has begun may go on
    (part,) = (services.settings.home / "files").glob(".*.part")
    os.utime(part, (time.time() - 200,) * 2)
    assert put(few).whole
    assert files(services) == [SHA]


def test_an_upload_is_given_up(services: Services) -> None:
    put(services, 0, HALF)
    uploads.give_up(services, SHA)
    assert files(services) == []
    put(services)
    with pytest.raises(NotFound):
        uploads.give_up(services, SHA)
    assert files(services) == [SHA]


@pytest.mark.parametrize("name", ["x", "../" + "a" * 61, "A" * 64, "a" * 63, "a" * 64 + "\n", ""])
def test_a_name_that_is_no_sha_is_refused(services: Services, name: str) -> None:
    with pytest.raises(InvalidValue):
        put(services, sha256=name)
    with pytest.raises(InvalidValue):
        uploads.read(services, name, 0)


def test_an_unknown_file_is_not_found(services: Services) -> None:
    for ask in (lambda: uploads.read(services, "0" * 64, 0), lambda: uploads.state(services, "0" * 64)):
        with pytest.raises(NotFound):
            ask()


def test_the_headers_are_those_of_localais_staging(http: httpx.Client) -> None:
    path = f"/api/files/{SHA}"

    def send(start: int, end: int, **headers: str) -> httpx.Response:
        told = {"Content-Range": f"bytes {start}-{end - 1}/{TOTAL}", **headers}
        return http.put(path, content=CONTENT[start:end], headers=told)

    assert http.head(path).status_code == 404
    first = send(0, HALF)
    assert (first.status_code, first.headers["Range"]) == (308, f"bytes=0-{HALF - 1}")
    asked = http.head(path)
    assert (asked.status_code, asked.headers["X-File-Size"]) == (308, str(HALF))
    assert send(HALF + 1, TOTAL).status_code == 416
    assert send(HALF, TOTAL, **{"X-Content-SHA256": "1" * 64}).status_code == 409
    other = http.put(path, content=b"x", headers={"Content-Range": "bytes 0-0/9"})
    assert (other.status_code, "another size" in other.text) == (409, True)
    assert send(HALF, TOTAL).json() == {"sha256": SHA, "size": TOTAL}
    assert int(http.head(path).headers["Content-Length"]) == TOTAL
    assert http.put(f"/api/files/{'0' * 64}", content=CONTENT).status_code == 400
    assert http.delete(path).status_code == 404


@pytest.mark.parametrize(
    "told",
    ["bytes 0-1", "bytes 5-4/9", "bytes 0-9/9", "bytes 0-3/9", "0-0/1", "bytes -1-0/1", "bytes 0-0/*", "bytes */9"],
)
def test_a_range_that_makes_no_sense_is_refused(http: httpx.Client, told: str) -> None:
    answer = http.put(f"/api/files/{SHA}", content=b"x", headers={"Content-Range": told})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Content-Range")


@pytest.fixture
def web(make_database: Callable[..., str], valkey: Valkey, tmp_path: Path) -> Iterator[Web]:
    client(valkey.url).flushall()
    found = Web(tmp_path, make_database("uploading"), valkey.url)
    yield found
    found.http.close()
    stop(found.process, 5.0)


Send = Callable[[Path, Callable[[int], object]], None]


def by_command_line(web: Web, home: Path, sha256: str) -> tuple[str, str, Send]:
    key = web.http.headers["authorization"].split()[1]
    api = Api(load_settings(home=home, api_url=web.url, api_key=key))
    path = f"/api/files/{sha256}"
    return path, key, lambda file, tell: sending.send(api, path, file, tell)


def by_node(web: Web, home: Path, sha256: str) -> tuple[str, str, Send]:
    """A node that has quantized the file."""
    identity = Identity(home / "identity.json")
    node = ready_node(web.services, secret=identity.secret())
    with web.services.db.transaction() as db:
        made = quantizations.add(db, "q", Spec(source=Source(source="x"), quantization_type="q8_0", backend="b"))
        quantizations.note(db, quantizations.by_id(db, made), node_id=node.id)
    api = NodeApi(web.url, node.id, identity)
    path = f"/api/node/{node.id}/quantizations/{made}/result/{sha256}"
    return path, identity.secret(), lambda file, tell: api.give(made, sha256, file, tell)


@pytest.mark.parametrize("sender", [by_command_line, by_node])
def test_an_upload_goes_on_after_a_cut_and_after_a_restart_of_the_web(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sender: Callable[..., tuple[str, str, Send]]
) -> None:
    content = os.urandom(8 << 20)
    sha256 = hashlib.sha256(content).hexdigest()
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    path, key, send = sender(web, tmp_path, sha256)
    place = urlsplit(web.url)
    with socket.create_connection((place.hostname, place.port)) as line:
        head = (f"PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
                f"Content-Length: {len(content)}\r\n\r\n")  # fmt: skip
        line.sendall(head.encode() + content[: (2 << 20) + 5])
        assert wait_for(lambda: web.http.head(f"/api/files/{sha256}").status_code == 308)
    there = wait_for(lambda: int(web.http.head(f"/api/files/{sha256}").headers["X-File-Size"]) >= 1 << 20)
    assert there

    monkeypatch.setattr(sending, "CHUNK", 1 << 20)
    monkeypatch.setattr(sending, "PAUSE", 0.2)
    seen: list[int] = []

    def tell(done: int) -> None:
        if done >= 5 << 20 > max(seen, default=0):
            os.killpg(web.process.pid, 9)
            web.process.wait(LIMIT)
            web.start()
        seen[:] = [done, *seen]

    send(file, tell)
    assert seen[-1] >= 1 << 20
    assert seen[0] == len(content)
    assert web.http.head(f"/api/files/{sha256}").status_code == 200
    assert (tmp_path / "files" / sha256).read_bytes() == content
    before = len(seen)
    send(file, tell)
    assert len(seen) == before + 1


@pytest.mark.parametrize("swept", [False, True])
def test_the_files_of_a_model_that_have_come_are_kept_while_the_last_one_comes(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swept: bool
) -> None:
    paths = [tmp_path / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for path in paths:
        path.write_bytes(os.urandom(1 << 20))
    key = web.http.headers["authorization"].split()[1]
    api = Api(load_settings(home=tmp_path, api_url=web.url, api_key=key))

    upload = cli_models._upload

    def later(*arguments: Any) -> dict[str, Any]:
        for whole in (tmp_path / "files").glob("[0-9a-f]*"):
            if swept:
                whole.unlink()
            else:
                os.utime(whole, (1.0, 1.0))  # they came long ago
        return upload(*arguments)

    monkeypatch.setattr(cli_models, "_upload", later)
    monkeypatch.setattr(cli_models, "KEEP", 0.0)
    sent = [each["sha256"] for each in cli_models.upload(api, paths)]
    assert sent == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert files(web.services) == sorted(sent)
    assert uploads.kept_since(web.services, web.services.settings.upload_ttl) == set()


def test_where_nobody_answers_nothing_is_sent(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"x")
    api = Api(load_settings(home=tmp_path, api_url="http://127.0.0.1:9"))
    with pytest.raises(Unavailable, match="no cluster answers"):
        sending.send(api, f"/api/files/{SHA}", tmp_path / "m.gguf", print)
