"""What a machine has: processors, memory, disk, GPUs. Reads only; what cannot be read is left out.

In a container, or under a service manager's limits, what it has is what it is allowed.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from ctypes.util import find_library
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pynvml

from localai_q.cluster.builds import BUILDS, Build, leave_gpus_alone
from workers.node import cgroups
from workers.node.store import Store

log = logging.getLogger(__name__)
MOST_FILES = 2000  # as the API takes them
DRM = Path("/sys/class/drm")
VENDORS = {"0x1002": "amd", "0x8086": "intel"}  # by PCI's number
LIBRARIES: dict[Build, str] = {"rocm": "amdhip64", "vulkan": "vulkan"}  # which each of these builds needs
LEAST_VRAM = 1 << 30  # bytes; less is what firmware sets aside for a screen
_said: set[str] = set()  # complaints: each is made once


def read(models: Path, budget_of: Callable[[int], int], builds: Sequence[str] = BUILDS) -> dict[str, Any]:
    """Bytes and counts: cpus, ram_total, ram_available, disk_total, disk_free (of the models' folder), gpus; os, arch;
    runtimes, the libraries for GPUs that the system has; files, the SHA-256 of the models that lie here; and budget.

    `budget` is how much models may take in all: of the GPUs' memory, or where there are none of RAM; `budget_of` tells
    it from the total. It is left out where it cannot be told whether there are GPUs. `builds` are those of backends that
    the owner wants here.
    """
    found: dict[str, Any] = {"os": platform.system().lower(), "arch": platform.machine().lower(),
                             "builds": list(builds)}  # fmt: skip
    for part in (_processors, _memory, lambda: _disk(models), _devices):
        found |= _tolerant(part)
    if "gpus" not in found:  # what could not be read is not what is not there
        return found
    usable = [] if leave_gpus_alone(builds) else found["gpus"]
    total = sum(gpu.get("vram_total", 0) for gpu in usable) or found.get("ram_total", 0)
    return found | {"budget": budget_of(total)} if total else found


def _tolerant(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A part of the reading, or nothing: a node whose disk cannot be asked is no dead node."""
    try:
        return part()
    except (OSError, psutil.Error, pynvml.NVMLError, ValueError) as error:
        if str(error) not in _said:
            _said.add(str(error))
            log.warning("a part of the hardware cannot be read: %s", error)
        return {}


def _processors() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    return {"cpus": min(usable, cgroups.read().cpus or usable)}


def _memory() -> dict[str, Any]:
    memory, limits = psutil.virtual_memory(), cgroups.read()
    total = min(memory.total, limits.memory or memory.total)
    free = memory.available if limits.memory_free is None else min(memory.available, limits.memory_free)
    return {"ram_total": total, "ram_available": min(free, total)}


def _disk(models: Path) -> dict[str, Any]:
    disk = shutil.disk_usage(_existing(models))
    return {"disk_total": disk.total, "disk_free": disk.free, "files": Store(models).files()[:MOST_FILES]}


def _devices() -> dict[str, Any]:
    """Every device that computes; one whose memory is the machine's own has no numbers of memory."""
    found = [*_nvidia(), *_others()]
    gpus = [{"index": index, **device} for index, device in enumerate(found)]
    return {"gpus": gpus, "runtimes": _runtimes()} if gpus else {"gpus": gpus}


@cache
def _runtimes() -> list[str]:
    """As this process finds them when it first looks, which takes other programs."""
    return [name for name, library in LIBRARIES.items() if find_library(library)]


def _nvidia() -> list[dict[str, Any]]:
    """NVIDIA devices by NVML. None where there is no driver."""
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return []
    try:
        driver = _asked(lambda: {"driver": str(pynvml.nvmlSystemGetDriverVersion())})
        own = _own_processes()
        return [{**_nvidia_device(index, own), **driver} for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _nvidia_device(index: int, own: set[int]) -> dict[str, Any]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    found: dict[str, Any] = {"vendor": "nvidia"}
    found |= _asked(lambda: {"name": str(pynvml.nvmlDeviceGetName(handle))})
    found |= _asked(lambda: {"compute_capability": _capability(handle)})
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError_NotSupported:  # it has none of its own
        return found
    found |= {"vram_total": int(memory.total), "vram_free": int(memory.free)}
    return found | _asked(lambda: _used_by_others(handle, int(memory.total) - int(memory.free), own))


def _capability(handle: Any) -> str:
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return f"{major}.{minor}"


def _used_by_others(handle: Any, used: int, own: set[int]) -> dict[str, Any]:
    """What processes that are not this node's use. Not known where the system does not say what each uses, as WSL."""
    ours = [process.usedGpuMemory for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            if process.pid in own]  # fmt: skip
    return {} if None in ours else {"vram_others": max(used - sum(ours), 0)}


def _own_processes() -> set[int]:
    """This node and all below it."""
    node = psutil.Process()
    return {node.pid, *(child.pid for child in node.children(recursive=True))}


def _asked(question: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer, or nothing from a device or driver that does not say."""
    try:
        return question()
    except (pynvml.NVMLError, psutil.Error):
        return {}


def _others() -> list[dict[str, Any]]:
    """Devices of other vendors whose driver tells of their memory in sysfs, in the order of their numbers."""
    cards = sorted(DRM.glob("card[0-9]*/device"), key=lambda path: (len(path.parent.name), path.parent.name))
    return [device for card in cards if (device := _card(card))]


def _card(folder: Path) -> dict[str, Any] | None:
    vendor = VENDORS.get(_text(folder / "vendor"))
    total, used = (_text(folder / f"mem_info_vram_{what}") for what in ("total", "used"))
    if vendor is None or not total.isdecimal() or int(total) < LEAST_VRAM:
        return None
    name = _text(folder / "product_name") or f"{vendor} {_text(folder / 'device')}"
    found = {"vendor": vendor, "name": name, "vram_total": int(total)}
    return found | ({"vram_free": max(int(total) - int(used), 0)} if used.isdecimal() else {})


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
