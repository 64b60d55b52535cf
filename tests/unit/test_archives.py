"""What an archive of a backend can do, whatever is in it: make files below its own folder, or be refused."""

import errno
import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localai_q.errors import InvalidValue, LocalAIError, Unavailable
from workers.node import archives
from workers.node.archives import unpack

Member = tuple[str, bytes, str, bytes]  # name, type, target, content

LONG = "d/" * 4000 + "d"  # longer than a path can be
FILE, FOLDER, LINK, HARD = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def write(path: Path, *members: Member, format: int = tarfile.PAX_FORMAT, **more: str) -> None:
    """An archive. `more`: pax properties of each member."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, kind, target, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size, info.mode, info.pax_headers = kind, target, len(content), 0o644, more
            tar.addfile(info, io.BytesIO(content))


def unpacked(place: Path, *members: Member, **more: str) -> Path:
    write(place / "a.tar", *members, **more)
    unpack(place / "a.tar", place / "into", "x")
    return place / "into"


def test_links_within_are_made(place: Path) -> None:
    found = unpacked(
        place,
        ("./lib/", FOLDER, "", b""),
        ("./lib/real.so.1", FILE, "", b"x"),
        ("lib/real.so", LINK, "real.so.1", b""),
        ("bin/deep/tool", LINK, "../../lib/real.so", b""),
        ("lib64", LINK, "lib", b""),
        ("again", HARD, "./lib/real.so.1", b""),
    )
    assert all(
        (found / name).read_bytes() == b"x" for name in ("lib/real.so", "bin/deep/tool", "lib64/real.so", "again")
    )


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("a", LINK, "b", b""), ("a/x", FILE, "", b"x")], "'a/x' lies behind a link"),
        ([("a", LINK, "b", b""), ("./a", FILE, "", b"x")], "'./a' lies behind a link"),
        ([("a", LINK, "b", b""), ("c", HARD, "a", b"")], "'c' lies behind a link"),
        ([("a", LINK, "b", b""), ("c", HARD, "a/x", b"")], "'c' lies behind a link"),
        ([("d/a", LINK, "../..", b"")], "'d/a' leads to '../..'"),
        ([("d/a", LINK, "x/../../..", b"")], "'d/a' leads to 'x/../../..'"),
        ([("a", HARD, "/etc/passwd", b"")], "'a' leads to '/etc/passwd'"),
        ([("d/a", HARD, "../a", b"")], "'d/a' leads to '../a'"),
        ([(".", LINK, "b", b"")], "'.' leads to 'b'"),
        ([("a", LINK, "", b""), (".", LINK, "..", b"")], "'a' to '' cannot be made"),
        ([("a", LINK, LONG, b""), (LONG, LINK, "..", b"")], "cannot be made"),
        ([("a", HARD, "b", b""), ("b", LINK, "..", b"")], "'a' to 'b' cannot be made"),
        ([("a", FILE, "", b"")] * 4, "more than 3 files"),
        ([("a", FILE, "", bytes(60)), ("b", FILE, "", bytes(60))], "or 0 MiB"),
    ],
)
def test_what_leads_out_or_is_too_much_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, members: list[Member], says: str
) -> None:
    monkeypatch.setattr(archives, "MOST_MEMBERS", 3)
    monkeypatch.setattr(archives, "LARGEST", 100)
    with pytest.raises(InvalidValue, match=r"^x: its archive is refused: ") as caught:
        unpacked(place, *members)
    assert says in caught.value.message


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_of_many_bytes_is_not_read_into_memory(place: Path, format: int) -> None:
    write(place / "a.tar", ("n" * (archives.LONGEST_HEADER + 1), FILE, "", b""), format=format)
    with pytest.raises(InvalidValue, match="it claims a header of 10485"):
        unpack(place / "a.tar", place / "into", "x")


@pytest.mark.parametrize(
    ("properties", "error", "says"),
    [
        ({"GNU.sparse.map": "0,1", "GNU.sparse.size": "1000000000000"}, InvalidValue, "more than 100000 files"),
        ({"GNU.sparse.map": "0,1", "GNU.sparse.size": "10"}, InvalidValue, "is a sparse file"),
        ({"GNU.sparse.map": "x"}, Unavailable, "no whole tar archive"),
        ({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, Unavailable, "no whole tar archive"),
        ({"size": "-512"}, InvalidValue, "is a sparse file"),
        ({"size": "1" + "0" * 30}, InvalidValue, "more than 100000 files"),
        ({"mtime": "1e300"}, Unavailable, "no whole tar archive"),
    ],
)
def test_properties_that_lie_are_refused(
    place: Path, properties: dict[str, str], error: type[LocalAIError], says: str
) -> None:
    with pytest.raises(error, match=says):
        unpacked(place, ("a", FILE, "", b"x"), **properties)


def test_a_sparse_file_of_the_old_kind_is_refused(place: Path) -> None:
    info = tarfile.TarInfo("a")
    info.type = tarfile.GNUTYPE_SPARSE
    (place / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2 * tarfile.BLOCKSIZE))
    with pytest.raises(InvalidValue, match="'a' is a sparse file"):
        unpack(place / "a.tar", place / "into", "x")


parts = st.sampled_from(["a", "b", "c", "..", ".", "", "d" * 200])
paths = st.lists(parts, min_size=1, max_size=6).map("/".join)
members = st.tuples(paths, st.sampled_from([FILE, FOLDER, LINK, LINK, HARD]), paths, st.just(b"x"))


def resolved(path: Path) -> Path | None:
    """Where a path leads, whether there is anything or not; None of a link that leads to itself."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
    return path.resolve()


def unpacked_or_refused(content: bytes) -> None:
    """Unpack it beside a file that must stay as it is; nothing that was made may lead out."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        (place / "a.tar").write_bytes(content)
        (place / "b").write_bytes(b"outside")
        with suppress(LocalAIError, OSError):
            unpack(place / "a.tar", place / "into", "x")
        assert sorted(path.name for path in place.iterdir()) == ["a.tar", "b", "into"]
        assert (place / "b").read_bytes() == b"outside"
        assert (place / "b").stat().st_nlink == 1
        for folder, folders, files in os.walk(place / "into"):
            for made in (*folders, *files):
                real = resolved(Path(folder) / made)
                assert real is None or real.is_relative_to(place / "into")


@settings(max_examples=200, deadline=None)
@given(st.lists(members, max_size=8))
def test_no_members_lead_out(made: list[Member]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, target, content in made:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode = kind, target, 0o755
            info.size = len(content) if kind == FILE else 0
            tar.addfile(info, io.BytesIO(content))
    unpacked_or_refused(buffer.getvalue())


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
       st.lists(st.tuples(st.integers(0, 2047), st.integers(0, 255)), max_size=6), st.integers(0, 4096))  # fmt: skip
def test_any_bytes_are_an_archive_or_one_error(format: int, changes: list[tuple[int, int]], length: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.tar"
        write(path, ("n" * 150, FILE, "", b"x" * 600), ("l", LINK, "t" * 150, b""), format=format)
        content = bytearray(path.read_bytes())
    for at, byte in changes:
        content[at] = byte
    for start in range(0, 2048, tarfile.BLOCKSIZE):  # so that a changed header still counts as one
        block = content[start : start + tarfile.BLOCKSIZE]
        content[start + 148 : start + 156] = b"%06o\0 " % tarfile.calc_chksums(block)[0]
    unpacked_or_refused(bytes(content[: max(length, 512)]))
