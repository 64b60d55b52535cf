"""What a node says that it has."""

from pathlib import Path

import psutil

from localai_q.config import Settings
from workers.node import hardware


def test_memory_disk_and_budget_are_in_bytes_and_files_by_their_content(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in ("a" * 64, ".a.part", ".lock"):
        (blobs / name).touch()
    found = hardware.read(tmp_path, lambda total: total // 2)
    total = sum(gpu["vram_total"] for gpu in found["gpus"]) or psutil.virtual_memory().total
    assert found["budget"] == total // 2
    assert found["files"] == ["a" * 64]
    assert 0 < found["ram_available"] < found["ram_total"]
    assert 0 < found["disk_free"] < found["disk_total"]


def test_a_folder_that_is_not_there_yet_has_no_files(tmp_path: Path) -> None:
    assert hardware.read(tmp_path / "models", Settings().budget_of)["files"] == []
