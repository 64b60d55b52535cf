"""Which build of a backend a machine can use: with which of its devices it computes. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

Build = Literal[
    "cuda13", "cuda12", "rocm", "metal", "vulkan", "cpu"
]  # the fastest first, for a machine that can several

BUILDS: tuple[Build, ...] = get_args(Build)
CUDA_DRIVERS: dict[Build, int] = {
    "cuda13": 580,
    "cuda12": 570,
}  # NVIDIA's first driver for its wheels, without its last parts
RUNTIMES: tuple[Build, ...] = ("rocm", "vulkan")  # that need libraries of the system besides a device and its driver
CUDA_DEVICES: dict[Build, float] = {"cuda13": 7.5, "cuda12": 5.0}  # the oldest compute capability that it still serves


def suitable(hardware: Mapping[str, Any]) -> tuple[Build, ...]:
    """The builds that run on a machine, by what its node says of its hardware; the best first.

    `builds` in it are those that the machine's owner wants; `cpu` is always one. What a device does not say counts as
    enough: a build that does not run fails its check when it is installed.
    """
    wanted = {*hardware.get("builds", BUILDS), "cpu"}
    return tuple(build for build in BUILDS if build in wanted and _runs(build, hardware))


def choose(offered: Collection[Build], hardware: Mapping[str, Any]) -> Build | None:
    """The best of the offered builds for a machine; None if none runs on it."""
    return next((build for build in suitable(hardware) if build in offered), None)


def uses_gpus(offered: Collection[Build], hardware: Mapping[str, Any]) -> bool:
    """Whether what a machine gets of the offered builds computes on its devices."""
    return choose(offered, hardware) not in (None, "cpu")


def leave_gpus_alone(builds: Collection[str]) -> bool:
    """Whether an owner who wants these builds wants none for GPUs."""
    return set(builds) <= {"cpu"}


def _runs(build: Build, hardware: Mapping[str, Any]) -> bool:
    devices = hardware.get("gpus") or []
    vendors = {device.get("vendor") for device in devices}
    if build in RUNTIMES and build not in hardware.get("runtimes", RUNTIMES):
        return False
    match build:
        case "cuda13" | "cuda12":
            return any(_serves_cuda(build, device) for device in devices if device.get("vendor") == "nvidia")
        case "rocm":
            return "amd" in vendors
        case "vulkan":
            return bool(vendors & {"nvidia", "amd", "intel"})
        case "metal":
            return hardware.get("os") == "darwin" and hardware.get("arch") == "arm64"
        case "cpu":
            return True


def _serves_cuda(build: Build, device: Mapping[str, Any]) -> bool:
    driver = str(device.get("driver") or "").partition(".")[0]
    capability = device.get("compute_capability")
    old = driver.isdecimal() and int(driver) < CUDA_DRIVERS[build]
    return not old and not (capability and float(capability) < CUDA_DEVICES[build])
