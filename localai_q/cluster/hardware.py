"""What a machine may say of its hardware, and what of that is believed. Pure.

A number that could not be read is left out or 0 where it cannot be 0; then the one that was known before stays.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from localai_q.cluster.nodes import MOST_SLOTS

MOST_GPUS = 64
MOST_FILES = 2000
MOST_RUNTIMES = 16
MOST_BACKENDS = 64
LATEST = 1e11  # seconds since the epoch, of any time: later ones are no dates
FREE_OF = {"ram_total": "ram_available", "disk_total": "disk_free", "vram_total": "vram_free"}

Bytes = Annotated[int, Field(ge=0, le=1 << 60)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Word = Annotated[str, Field(max_length=32)]
Address = Annotated[str, Field(pattern=r"^([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):[1-9][0-9]{0,4}$")]


class _Reading(BaseModel):
    """Numbers of the right type and size; what is not known here is dropped, for a node may be newer than its API."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        for total, free in FREE_OF.items():
            all_of_it, part = getattr(self, total, None), getattr(self, free, None)
            if all_of_it and part and part > all_of_it:
                raise ValueError(f"{free} is more than {total}")
        return self


class Gpu(_Reading):
    """A device that computes."""

    index: int = Field(ge=0, lt=1024)
    name: str = Field("", max_length=128)
    vendor: Word = ""
    vram_total: Bytes = 0
    vram_free: Bytes = 0
    vram_others: Bytes | None = None  # used by processes that are not the node's
    compute_capability: str | None = Field(None, pattern=r"^[0-9]{1,3}\.[0-9]{1,3}$")
    driver: Word | None = None


class InstalledBackend(_Reading):
    """A backend that is installed."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    version: str = Field(max_length=64)
    digest: Sha256  # of all that it was made of
    build: Word = ""
    installed_at: float = Field(0.0, ge=0, le=LATEST, allow_inf_nan=False)  # seconds since the epoch


class Hardware(_Reading):
    """A machine, as its node reads it. What is None could not be read."""

    cpus: int | None = Field(None, ge=0, le=1 << 16)
    ram_total: Bytes | None = None
    ram_available: Bytes | None = None
    disk_total: Bytes | None = None  # of the models' folder
    disk_free: Bytes | None = None
    disk_spare: Bytes | None = None  # that stay free of it, at least, when a model comes
    files: list[Sha256] | None = Field(None, max_length=MOST_FILES)  # models that lie here
    files_address: Address | None = None  # HOST:PORT at which other nodes get these
    transfers: int | None = Field(None, ge=0, le=1 << 16)  # of them, that are under way there
    backends: list[InstalledBackend] | None = Field(None, max_length=MOST_BACKENDS)
    budget: Bytes | None = None  # how much models may take
    max_replicas_per_model: int | None = Field(None, ge=1, le=MOST_SLOTS)
    gpus: list[Gpu] | None = Field(None, max_length=MOST_GPUS)
    runtimes: list[Word] | None = Field(None, max_length=MOST_RUNTIMES)  # for devices, that the system has
    builds: list[Word] | None = Field(None, max_length=MOST_RUNTIMES)  # of backends, that the owner wants
    os: Word | None = None
    arch: Word | None = None

    def told(self) -> dict[str, Any]:
        """What was read."""
        return self.model_dump(exclude_none=True)


def refreshed(known: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """What is known of a machine after it has told this. A reading that failed changes nothing."""
    new = _read(told)
    before = {gpu["index"]: gpu for gpu in known.get("gpus") or []}
    gpus = [{**before.get(gpu["index"], {}), **_read(gpu)} for gpu in new.get("gpus") or []]
    return {**known, **new, "gpus": gpus or known.get("gpus", [])} if before or "gpus" in new else {**known, **new}


def _read(told: dict[str, Any]) -> dict[str, Any]:
    """The part that was read: no machine has nothing."""
    failed = {total for total in FREE_OF if told.get(total) == 0} | ({"cpus"} if told.get("cpus") == 0 else set())
    failed |= {FREE_OF[total] for total in failed & FREE_OF.keys()}
    return {name: value for name, value in told.items() if name not in failed and value != ""}
