"""The generated stubs are those of the interface as it stands."""

from pathlib import Path

import pytest

from localai_q.proto.__main__ import REPOSITORY, STUBS, TARGETS, generate


@pytest.mark.parametrize("folder", TARGETS)
def test_the_committed_stubs_are_what_the_compiler_writes_today(folder: str, tmp_path: Path) -> None:
    generate(tmp_path, TARGETS[folder])
    for stub in STUBS:
        assert (REPOSITORY / folder / stub).read_text() == (tmp_path / stub).read_text(), (
            f"{folder}/{stub} is stale: run 'python -m localai_q.proto'"
        )
