"""Which build of a backend a machine gets."""

import pytest

from localai_q.cluster.builds import BUILDS, choose, suitable, uses_gpus


def nvidia(driver: str | None = "580.65.06", capability: str | None = "9.0") -> dict:
    return {"gpus": [{"index": 0, "vendor": "nvidia", "driver": driver, "compute_capability": capability}]}


@pytest.mark.parametrize(
    ("hardware", "builds"),
    [
        ({}, ("cpu",)),
        ({"os": "linux", "arch": "x86_64", "gpus": []}, ("cpu",)),
        (nvidia(), ("cuda13", "cuda12", "vulkan", "cpu")),
        (nvidia(driver="579.99"), ("cuda12", "vulkan", "cpu")),
        (nvidia(driver="569.9"), ("vulkan", "cpu")),
        (nvidia(driver=None, capability=None), ("cuda13", "cuda12", "vulkan", "cpu")),
        (nvidia(capability="7.5"), ("cuda13", "cuda12", "vulkan", "cpu")),
        (nvidia(capability="7.0"), ("cuda12", "vulkan", "cpu")),
        (nvidia(capability="10.3"), ("cuda13", "cuda12", "vulkan", "cpu")),
        (nvidia(capability="3.7"), ("vulkan", "cpu")),
        ({"gpus": [{"vendor": "amd"}]}, ("rocm", "vulkan", "cpu")),
        ({"gpus": [{"vendor": "intel"}]}, ("vulkan", "cpu")),
        ({"gpus": [{"vendor": "acme"}]}, ("cpu",)),
        ({"gpus": [{"vendor": "amd"}], "runtimes": ["vulkan"]}, ("vulkan", "cpu")),
        ({"gpus": [{"vendor": "amd"}], "runtimes": ["rocm"]}, ("rocm", "cpu")),
        ({**nvidia(), "runtimes": []}, ("cuda13", "cuda12", "cpu")),
        ({**nvidia(), "builds": ["vulkan", "cuda12"]}, ("cuda12", "vulkan", "cpu")),
        ({**nvidia(), "builds": ["cpu"]}, ("cpu",)),
        ({**nvidia(), "builds": ["rocm"]}, ("cpu",)),
        ({"os": "darwin", "arch": "arm64", "gpus": []}, ("metal", "cpu")),
        ({"os": "darwin", "arch": "x86_64"}, ("cpu",)),
        ({"os": "linux", "arch": "arm64"}, ("cpu",)),
    ],
)
def test_the_builds_that_a_machine_can_use_are_the_best_first(hardware: dict, builds: tuple[str, ...]) -> None:
    assert suitable(hardware) == builds


def test_the_best_of_what_is_offered_is_chosen() -> None:
    assert choose(BUILDS, nvidia()) == "cuda13"
    assert choose(("cpu", "cuda12"), nvidia()) == "cuda12"
    assert choose(("rocm", "cpu"), nvidia()) == "cpu"
    assert choose(("rocm", "metal"), nvidia()) is None


def test_one_device_of_several_is_enough() -> None:
    assert choose(BUILDS, {"gpus": [{"vendor": "intel"}, *nvidia()["gpus"]]}) == "cuda13"


def test_only_what_is_made_for_devices_uses_them() -> None:
    assert uses_gpus(("cpu", "cuda12"), nvidia())
    assert not uses_gpus(("cpu", "cuda12"), {})
    assert not uses_gpus(("cpu",), nvidia())
    assert not uses_gpus(("rocm",), nvidia())
    assert not uses_gpus((), nvidia())
