"""What a fetched file is, as its job's result tells it."""

from pathlib import Path

import pytest
from gguf_files import gguf

from localai_q.cluster.models import Facts
from workers.node.job_child import described


def test_a_fetched_model_is_told_with_what_its_header_says(tmp_path: Path) -> None:
    file = tmp_path / ("a" * 64)
    file.write_bytes(gguf())
    found = described([file])
    assert (found["sha256"], found["size"]) == ("a" * 64, file.stat().st_size)
    assert Facts.from_json(found["facts"]).blocks == 2


@pytest.mark.parametrize("content", [b"", b"no model", gguf()[:100]])
def test_of_a_file_that_is_no_whole_gguf_nothing_more_is_known(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x"
    file.write_bytes(content)
    assert described([file, file]) == {"sha256": "x", "size": len(content), "facts": None,
                                       "further": [{"sha256": "x", "size": len(content)}]}  # fmt: skip
