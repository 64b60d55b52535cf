"""What a machine has: processors, memory, disk, GPUs. Reads only; what cannot be read is left out.

In a container, or under a service manager's limits, what it has is what it is allowed.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pynvml

from workers.node import cgroups

log = logging.getLogger(__name__)
MOST_FILES = 2000  # as the API takes them
_said: set[str] = set()  # complaints: each is made once


def read(models: Path, budget_of: Callable[[int], int]) -> dict[str, Any]:
    """Bytes and counts: cpus, ram_total, ram_available, disk_total, disk_free (of the models' folder), gpus; os, arch;
    files, the SHA-256 of the models that lie here; and budget.

    `budget` is how much models may take in all: of the GPUs' memory, or where there are none of RAM; `budget_of` tells
    it from the total.
    """
    found: dict[str, Any] = {"os": platform.system().lower(), "arch": platform.machine().lower()}
    for part in (_processors, _memory, lambda: _disk(models), _devices):
        found |= _tolerant(part)
    total = sum(gpu["vram_total"] for gpu in found.get("gpus", [])) or found.get("ram_total", 0)
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
    files = sorted(path.name for path in (models / "blobs").glob("[0-9a-f]*"))
    return {"disk_total": disk.total, "disk_free": disk.free, "files": files[:MOST_FILES]}


def _devices() -> dict[str, Any]:
    """NVIDIA devices by NVML: index, name, vendor, vram_total, vram_free. No devices where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return {"gpus": []}
    try:
        return {"gpus": [_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]}
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int) -> dict[str, Any]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {"index": index, "name": str(pynvml.nvmlDeviceGetName(handle)), "vendor": "nvidia",
            "vram_total": int(memory.total), "vram_free": int(memory.free)}  # fmt: skip


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
