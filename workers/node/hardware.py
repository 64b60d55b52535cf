"""What a machine has: processors, memory, disk, GPUs. Reads only; what cannot be read is left out."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pynvml

log = logging.getLogger(__name__)


def read(models: Path, budget_of: Callable[[int], int]) -> dict[str, Any]:
    """Bytes and counts: cpus, ram_total, ram_available, disk_total, disk_free (of the models' folder), gpus, budget, files.

    `budget` is how much models may take in all: of the GPUs' memory, or where there are none of RAM; `budget_of` tells
    it from the total. `files` are the SHA-256 of the models that lie here.
    """
    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(_existing(models))
    found = gpus()
    total = sum(gpu["vram_total"] for gpu in found) or memory.total
    return {
        "cpus": psutil.cpu_count() or 1,
        "ram_total": memory.total,
        "ram_available": memory.available,
        "disk_total": disk.total,
        "disk_free": disk.free,
        "gpus": found,
        "budget": budget_of(total),
        "files": sorted(path.name for path in (models / "blobs").glob("[0-9a-f]*")),
    }


def gpus() -> list[dict[str, Any]]:
    """NVIDIA devices by NVML: index, name, vram_total, vram_free. Empty where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        log.warning("the GPUs cannot be read: %s", error)
        return []
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int) -> dict[str, Any]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {"index": index, "name": str(pynvml.nvmlDeviceGetName(handle)), "vram_total": int(memory.total),
            "vram_free": int(memory.free)}  # fmt: skip


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
