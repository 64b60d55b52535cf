"""Labels of nodes: what may be one, and which a machine has by what it is. Pure."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, RootModel

MOST_LABELS = 64  # that an admin gives one node
VRAM_BUCKETS = {80: "80GB+", 48: "48GB", 24: "24GB", 16: "16GB", 8: "8GB"}  # from so many 10⁹ bytes on

LabelKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$")]
LabelValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:/+ -]{0,63}$")]


class Labels(RootModel[dict[LabelKey, LabelValue]]):
    """Labels that an admin gives."""

    root: dict[LabelKey, LabelValue] = Field(max_length=MOST_LABELS)


def found_labels(name: str, hardware: dict[str, Any], slots: int) -> dict[str, str]:
    """The labels that a node has by its name and its hardware, with LocalAI's names where it has them.

    `node.name`, `node.os`, `node.arch`; `node.replica-slots`, the replicas of one model that it may have; of the largest
    GPU `gpu.vendor`, `gpu.compute-capability` and `gpu.vram`, its size class.
    """
    found = {"node.name": name, "node.os": hardware.get("os"), "node.arch": hardware.get("arch"),
             "node.replica-slots": str(slots)}  # fmt: skip
    largest = max(hardware.get("gpus") or [{}], key=lambda gpu: int(gpu.get("vram_total", 0)))
    found["gpu.vendor"] = largest.get("vendor")
    found["gpu.compute-capability"] = largest.get("compute_capability")
    size = largest.get("vram_total", 0) / 1e9
    found["gpu.vram"] = next((bucket for least, bucket in VRAM_BUCKETS.items() if size >= least), None)
    return {key: value for key, value in found.items() if value}
