"""What a machine says of itself is checked, and a reading that failed changes nothing that was known."""

import pytest
from pydantic import ValidationError

from localai_q.cluster.hardware import MOST_GPUS, Hardware, refreshed

GIB = 1 << 30
GPU = {"index": 0, "name": "A", "vendor": "nvidia", "vram_total": 24 * GIB, "vram_free": 20 * GIB}


def test_what_was_told_is_kept_and_what_nobody_knows_is_dropped() -> None:
    told = {"cpus": 8, "ram_total": 9, "ram_available": 9, "gpus": [{**GPU, "colour": "red"}], "os": "linux", "x": {}}
    assert Hardware.model_validate(told).told() == {
        "cpus": 8, "ram_total": 9, "ram_available": 9, "gpus": [GPU], "os": "linux"
    }  # fmt: skip
    assert Hardware.model_validate({}).told() == {}


BACKEND = {"name": "echo", "version": "1", "digest": "a" * 64}


def test_a_backend_is_told_with_when_it_was_installed() -> None:
    assert Hardware(backends=[{**BACKEND, "installed_at": 1e11}]).told()["backends"][0]["installed_at"] == 1e11


@pytest.mark.parametrize(
    "told",
    [
        {"cpus": -1}, {"cpus": "8"}, {"cpus": 1.5}, {"cpus": True}, {"cpus": 1 << 40}, {"ram_total": -1},
        {"ram_total": 1 << 61}, {"ram_total": float("inf")}, {"ram_total": 5, "ram_available": 6},
        {"disk_total": 5, "disk_free": 6}, {"gpus": {}}, {"gpus": ["A"]}, {"gpus": [{"name": "A"}]},
        {"gpus": [{**GPU, "vram_free": 25 * GIB}]}, {"gpus": [{**GPU, "name": "A" * 129}]},
        {"gpus": [{**GPU, "index": n} for n in range(MOST_GPUS + 1)]}, {"os": "x" * 33}, {"arch": 64},
        {"backends": [{**BACKEND, "installed_at": float("inf")}]}, {"backends": [{**BACKEND, "installed_at": float("nan")}]},
        {"backends": [{**BACKEND, "installed_at": 1e12}]}, {"builds": ["x" * 33]}, {"runtimes": ["x" * 33]},
        {"runtimes": ["x"] * 17},
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(told: dict) -> None:
    with pytest.raises(ValidationError):
        Hardware.model_validate(told)


KNOWN = {"cpus": 8, "ram_total": 64, "ram_available": 60, "disk_total": 9, "disk_free": 8, "gpus": [GPU], "os": "linux"}


@pytest.mark.parametrize(
    "told",
    [
        {}, {"gpus": []}, {"cpus": 0}, {"ram_total": 0, "ram_available": 0}, {"disk_total": 0, "disk_free": 0},
        {"gpus": [{**GPU, "vram_total": 0, "vram_free": 0}]},
    ],
)  # fmt: skip
def test_a_reading_that_failed_changes_nothing(told: dict) -> None:
    assert refreshed(KNOWN, told) == KNOWN


def test_a_reading_that_succeeded_counts_even_where_nothing_is_free() -> None:
    told = {"cpus": 4, "ram_total": 32, "ram_available": 0, "gpus": [{**GPU, "vram_free": 0}, {**GPU, "index": 1}]}
    assert refreshed(KNOWN, told) == {**KNOWN, **told}
    assert refreshed({}, told) == told
    assert refreshed({}, {"gpus": []}) == {"gpus": []}
