"""What a machine has: processors, memory, disk, GPUs. Reads only; what cannot be read is left out."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import psutil
import pynvml

log = logging.getLogger(__name__)


def read(models: Path) -> dict[str, Any]:
    """Bytes and counts: cpus, ram_total, ram_available, disk_total, disk_free (of the models' folder), gpus."""
    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(_existing(models))
    return {
        "cpus": psutil.cpu_count() or 1,
        "ram_total": memory.total,
        "ram_available": memory.available,
        "disk_total": disk.total,
        "disk_free": disk.free,
        "gpus": gpus(),
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
