"""What a node says that it has."""

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pynvml
import pytest

from localai_q.cluster.builds import BUILDS
from localai_q.cluster.hardware import Hardware, refreshed
from localai_q.cluster.labels import found_labels
from localai_q.config import Settings
from workers.node import hardware


def test_memory_disk_and_budget_are_in_bytes_and_files_by_their_content(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in ("a" * 64, ".a.part", ".lock", "a", "beef.gguf", "b" * 65):
        (blobs / name).touch()
    (blobs / ("c" * 64)).mkdir()
    found = hardware.read(tmp_path, lambda total: total // 2)
    Hardware.model_validate(found)
    total = sum(gpu["vram_total"] for gpu in found["gpus"]) or psutil.virtual_memory().total
    assert found["budget"] == total // 2
    assert found["files"] == ["a" * 64]
    assert 0 < found["ram_available"] < found["ram_total"]
    assert 0 < found["disk_free"] < found["disk_total"]


def test_a_folder_that_is_not_there_yet_has_no_files(tmp_path: Path) -> None:
    assert hardware.read(tmp_path / "models", Settings().budget_of)["files"] == []


GIB = 1 << 30
ERRORS = (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission, pynvml.NVMLError_Unknown)


class Driver:
    """Stands in for the module `pynvml` on a machine without a device: one of 24 GiB, of which 6 are used, 4 by us."""

    NVMLError = pynvml.NVMLError
    NVMLError_LibraryNotFound = pynvml.NVMLError_LibraryNotFound
    NVMLError_DriverNotLoaded = pynvml.NVMLError_DriverNotLoaded
    NVMLError_NotSupported = pynvml.NVMLError_NotSupported

    def __init__(self, **failing: type[Exception]) -> None:
        self.failing = failing
        self.ours: int | None = 4 * GIB
        self.open = 0

    def __getattribute__(self, name: str):
        failing = object.__getattribute__(self, "__dict__").get("failing", {})
        if name in failing:
            return lambda *_: (_ for _ in ()).throw(failing[name]())
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.95"

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "A5000"

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return 8, 6

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=24 * GIB, free=18 * GIB, used=6 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        known = [(os.getpid(), self.ours), (1, 2 * GIB)]
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in known]


WHOLE = {"index": 0, "name": "A5000", "vendor": "nvidia", "vram_total": 24 * GIB, "vram_free": 18 * GIB,
         "vram_others": 2 * GIB, "compute_capability": "8.6", "driver": "580.95"}  # fmt: skip


def read_with(driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drm: Path | None = None) -> dict:
    monkeypatch.setattr(hardware, "pynvml", driver)
    monkeypatch.setattr(hardware, "DRM", drm or tmp_path / "drm")
    found = hardware.read(tmp_path, Settings().budget_of)
    Hardware.model_validate(found)
    assert driver.open == 0
    return found


def test_a_device_is_read_with_what_others_use_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_with(Driver(), tmp_path, monkeypatch)
    assert found["gpus"] == [WHOLE]
    assert found["budget"] == 24 * GIB
    labels = found_labels("n", found, 1)
    assert (labels["gpu.vendor"], labels["gpu.vram"], labels["gpu.compute-capability"]) == ("nvidia", "24GB", "8.6")


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("call", "missing"),
    [
        ("nvmlDeviceGetName", ["name"]),
        ("nvmlSystemGetDriverVersion", ["driver"]),
        ("nvmlDeviceGetCudaComputeCapability", ["compute_capability"]),
        ("nvmlDeviceGetComputeRunningProcesses", ["vram_others"]),
    ],
)
def test_what_a_driver_does_not_say_is_left_out_and_the_rest_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], call: str, missing: list[str]
) -> None:
    found = read_with(Driver(**{call: error}), tmp_path, monkeypatch)
    assert found["gpus"] == [{name: value for name, value in WHOLE.items() if name not in missing}]
    assert refreshed({"gpus": [WHOLE]}, Hardware.model_validate(found).told())["gpus"] == [WHOLE]


def test_processes_whose_use_is_not_told_leave_that_of_others_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver()
    driver.ours = None  # as on WSL
    assert "vram_others" not in read_with(driver, tmp_path, monkeypatch)["gpus"][0]


def test_a_device_with_the_machines_memory_has_no_numbers_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_with(Driver(nvmlDeviceGetMemoryInfo=pynvml.NVMLError_NotSupported), tmp_path, monkeypatch)
    assert found["gpus"][0].keys() == {"index", "name", "vendor", "compute_capability", "driver"}
    assert found["budget"] == found["ram_total"]


@pytest.mark.parametrize(
    "call", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMemoryInfo"]
)
def test_a_device_that_cannot_be_read_changes_nothing_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    found = read_with(Driver(**{call: pynvml.NVMLError_Unknown}), tmp_path, monkeypatch)
    known = {"gpus": [WHOLE], "budget": 24 * GIB}
    after = refreshed(known, Hardware.model_validate(found).told())
    assert {name: after[name] for name in known} == known, "nor is the budget that of RAM"


@pytest.mark.parametrize("error", [pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded])
def test_without_a_driver_there_is_no_device_of_its_vendor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    driver = Driver(nvmlInit=error)
    assert read_with(driver, tmp_path, monkeypatch)["gpus"] == []
    card(tmp_path / "drm", 1, vendor="0x1002", product_name="MI", mem_info_vram_total=8 * GIB)
    assert [gpu["name"] for gpu in read_with(driver, tmp_path, monkeypatch)["gpus"]] == ["MI"]


def card(drm: Path, number: int, **files: object) -> None:
    folder = drm / f"card{number}" / "device"
    folder.mkdir(parents=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


def test_devices_of_other_vendors_are_read_from_sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drm = tmp_path / "drm"
    card(drm, 10, vendor="0x8086", device="0x56a0", mem_info_vram_total=16 * GIB)
    card(drm, 2, vendor="0x1002", product_name="MI", mem_info_vram_total=8 * GIB, mem_info_vram_used=3 * GIB)
    card(drm, 0, vendor="0x1002", mem_info_vram_total=GIB // 2, mem_info_vram_used=0)  # a part of RAM
    card(drm, 1, vendor="0x8086", device="0x9a49")  # draws only
    card(drm, 3, vendor="0x10de", mem_info_vram_total=8 * GIB, mem_info_vram_used=0)  # NVML tells of it, or nobody
    card(drm, 4, vendor="0x1002", mem_info_vram_total="garbage", mem_info_vram_used=0)
    card(drm, 5, vendor="0x1002", mem_info_vram_total=8 * GIB, mem_info_vram_used="garbage", product_name="x")
    (drm / "card5" / "device" / "product_name").write_bytes(b"M\xff5")
    (drm / "card2-DP-1").mkdir()
    found = read_with(Driver(), tmp_path, monkeypatch, drm)
    assert found["gpus"] == [
        WHOLE,
        {"index": 1, "vendor": "amd", "name": "MI", "vram_total": 8 * GIB, "vram_free": 5 * GIB},
        {"index": 2, "vendor": "amd", "name": "M\ufffd5", "vram_total": 8 * GIB},
        {"index": 3, "vendor": "intel", "name": "intel 0x56a0", "vram_total": 16 * GIB},
    ]
    assert found["budget"] == 56 * GIB


def test_libraries_for_devices_are_looked_for_where_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hardware._runtimes.cache_clear()
    monkeypatch.setattr(hardware, "LIBRARIES", {"vulkan": "c", "rocm": "not-there"})
    try:
        assert read_with(Driver(), tmp_path, monkeypatch)["runtimes"] == ["vulkan"]
        assert "runtimes" not in read_with(Driver(nvmlInit=pynvml.NVMLError_LibraryNotFound), tmp_path, monkeypatch)
    finally:
        hardware._runtimes.cache_clear()


def test_where_models_may_not_use_gpus_the_budget_is_of_ram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "pynvml", Driver())
    found = hardware.read(tmp_path, lambda total: total, ["cpu"])
    assert found["budget"] == found["ram_total"]
    assert hardware.read(tmp_path, lambda total: total, ["cuda12"])["budget"] >= 24 * GIB


def test_the_builds_that_the_owner_wants_are_told(tmp_path: Path) -> None:
    wanted = Settings(LOCALAI_Q_BACKEND_BUILDS="cuda12, vulkan").builds
    assert hardware.read(tmp_path, Settings().budget_of, wanted)["builds"] == ["cuda12", "vulkan"]
    found = hardware.read(tmp_path, Settings().budget_of, Settings().builds)
    assert found["builds"] == list(BUILDS), "also when fewer were wanted before"
