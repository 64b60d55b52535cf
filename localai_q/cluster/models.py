"""What a model is: the document that the registry keeps, and what can be read off it. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from localai_q.cluster.labels import LabelKey, LabelValue
from localai_q.cluster.parts import MOST_FILES, part
from localai_q.cluster.sampling import INT32_MAX, Parameters
from localai_q.cluster.sources import MOST_MIRRORS
from localai_q.cluster.wishes import Unmet
from localai_q.errors import InvalidValue

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
SHA256 = r"^[0-9a-f]{64}$"
LARGEST = 1 << 50  # of any number that a header says
LARGEST_TEXT = 1 << 16  # characters of a template or a prompt
MOST_ADAPTERS = 8

# Fields that only say where replicas are and how many, which of them gets a request and with what, and where their file
# can be had, too. A change of any other makes another replica: it gives the model a new revision.
AROUND_REPLICAS = frozenset({
    "spread_all", "min_replicas", "max_replicas", "idle_timeout", "pinned", "concurrency_groups", "selector",
    "route_policy", "min_prefix_match", "balance_abs_threshold", "balance_rel_threshold", "mirrors",
    "parameters", "system_prompt", "disabled", "preload", "origin",
})  # fmt: skip
OF_ONE_FILE: Mapping[str, Any] = {
    "mirrors": (),
    "sha256": None,
    "size": 0,
    "parts": (),
    "origin": "",
}  # where nothing is known of it
NOT_FOR_ALL = ("chat_template", "mmproj", "draft_model", "loras")  # fields that not every backend takes


def _named(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError("needs to begin with a letter or digit and may go on with those and . _ : / - (128 at most)")
    return value


GroupName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
ModelName = Annotated[str, AfterValidator(_named)]


class File(BaseModel):
    """A file of a model. Its source has one of the forms of `localai_q.cluster.sources`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(min_length=1, max_length=2000)
    sha256: str | None = Field(None, pattern=SHA256)  # None: its source tells it, and nobody has asked that yet
    size: int = Field(0, ge=0, le=LARGEST)  # bytes; 0: not known


class Adapter(File):
    """A LoRA adapter."""

    scale: float = Field(1.0, ge=-100, le=100)


class ModelConfig(BaseModel):
    """How a model is fetched, loaded and placed, and what it adds to requests.

    `source` has one of the forms of `localai_q.cluster.sources`, or is empty for a backend without weights. The SHA-256
    of one that tells it itself is noted when a node has fetched it. Where it is the first of several files, the others are
    its `parts`; the sources that these do not say are named after the first's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str = Field("xllamacpp", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    source: str = Field("", max_length=2000)
    mirrors: tuple[Annotated[str, Field(max_length=2000)], ...] = Field((), max_length=MOST_MIRRORS)  # of a URL
    sha256: str | None = Field(None, pattern=SHA256)
    size: int = Field(0, ge=0, le=LARGEST)  # bytes of the file; 0: not known
    parts: tuple[File, ...] = Field(
        (), max_length=MOST_FILES - 1, validate_default=True
    )  # of a model in several files: all behind the first
    origin: str = Field("", max_length=2200)  # what the file was made of, where that is known
    mmproj: File | None = None  # what makes images into the model's tokens
    draft_model: File | None = None  # a smaller model that guesses ahead
    loras: tuple[Adapter, ...] = Field((), max_length=MOST_ADAPTERS)
    context_size: int = Field(4096, ge=16, le=1 << 24)  # tokens that one request may use
    slots: int = Field(4, ge=1, le=256)  # requests that one replica works on at once; no more than its backend can
    threads: int = Field(0, ge=0, le=1024)  # 0: the engine decides
    gpu_layers: int = Field(0, ge=0, le=INT32_MAX)  # 0: as many as fit
    cache_type: Literal["f16", "q8_0", "q4_0"] = "f16"  # of the KV cache's numbers
    memory: int = Field(0, ge=0, le=1 << 50)  # bytes that one replica takes; 0: estimated
    fit_context: bool = False  # cut the context to what a node has room for, rather than refuse the node
    embeddings: bool = False  # the model embeds; it does not chat
    rerank: bool = False
    chat_template: str = Field("", max_length=LARGEST_TEXT)  # Jinja, instead of the model's own; empty: that
    options: tuple[str, ...] = Field((), max_length=64)  # "key:value", for the backend
    parameters: Parameters = Field(default_factory=Parameters)  # of requests that do not say them
    system_prompt: str = Field("", max_length=LARGEST_TEXT)  # of chats that have none
    disabled: bool = False  # no request is accepted, and nothing is loaded
    preload: bool = False  # its files are on a node before anybody asks
    spread_all: bool = False  # one replica on every ready node, before anybody asks; there may be any number of them
    min_replicas: int = Field(0, ge=0, le=1000)  # that are loaded although nobody asks
    max_replicas: int = Field(1, ge=1, le=1000)
    idle_timeout: float = Field(
        0.0, ge=0, le=1e9
    )  # seconds after which an unused replica above the least goes; 0: never
    pinned: bool = False  # no replica is stopped to make room for another model
    concurrency_groups: tuple[GroupName, ...] = Field((), max_length=16)  # models that share one never share a node
    route_policy: Literal["prefix_cache", "round_robin"] = "prefix_cache"
    min_prefix_match: float = Field(0.0, ge=0, le=1)
    balance_abs_threshold: int = Field(0, ge=0, le=1000)
    balance_rel_threshold: float = Field(0.0, ge=0, le=1000)
    selector: dict[LabelKey, LabelValue] = Field(default_factory=dict, max_length=16)  # labels that a node must have

    @field_validator("parts", mode="before")
    @classmethod
    def _names_its_parts(cls, parts: Any, others: ValidationInfo) -> Any:
        first = part(others.data.get("source", ""))
        if first is None or first.number != 1 or first.count > MOST_FILES:
            return parts
        given = parts or [{}] * (first.count - 1)
        if not isinstance(given, list | tuple):
            return parts
        if len(given) != first.count - 1:
            raise ValueError(f"it needs the {first.count - 1} files behind the first, in their order")
        return [{"source": first.beside(number), **each} if isinstance(each, dict) else each
                for number, each in enumerate(given, 2)]  # fmt: skip

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.min_replicas > self.max_replicas and not self.spread_all:
            raise ValueError(f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})")
        if self.spread_all and self.idle_timeout:
            raise ValueError("idle_timeout would stop what spread_all loads on every node: give one of them")
        if (self.parts or self.further) and not self.source:
            raise ValueError("parts, mmproj, draft_model and loras go with a model's own file: give 'source'")
        return self

    def makes_same_replica(self, other: ModelConfig) -> bool:
        """Whether replicas of this and of the other are alike, so that one can stay when the other is wanted."""
        return self.model_dump(exclude=set(AROUND_REPLICAS)) == other.model_dump(exclude=set(AROUND_REPLICAS))

    @property
    def own(self) -> tuple[File, ...]:
        """The model's own file, or all of them where it is in several; none for a backend without weights."""
        first = (File(source=self.source, sha256=self.sha256, size=self.size),) if self.source else ()
        return (*first, *self.parts)

    @property
    def further(self) -> tuple[File, ...]:
        """The files that the model needs besides its own."""
        return (*(file for file in (self.mmproj, self.draft_model) if file), *self.loras)

    @property
    def files(self) -> tuple[File, ...]:
        """All files of the model, its own first; none for a backend without weights."""
        return (*self.own, *self.further)

    def mirrors_of(self, number: int) -> tuple[str, ...]:
        """Where the file with this place in `files` can be had, too."""
        if not number:
            return self.mirrors
        named = map(part, self.mirrors if number < len(self.own) else ())
        return tuple(first.beside(number + 1) for first in named if first)

    @property
    def contents(self) -> frozenset[str]:
        """The SHA-256 of its files, as far as they are known."""
        return frozenset(file.sha256 for file in self.files if file.sha256)

    def knowing(self, contents: Sequence[Mapping[str, Any]]) -> ModelConfig:
        """This, with the `sha256` and `size` of those of its files of which they were not known.

        Args:
            contents: what was fetched, in the order of `files`.

        Raises:
            ValueError: that is nothing that a file could be.
        """
        values = self.model_dump()
        others = [values[name] for name in ("mmproj", "draft_model") if values[name]]
        files = [values, *values["parts"], *others, *values["loras"]]
        for file, content in zip(files, contents, strict=False):
            if not file["sha256"] or (not file["size"] and file["sha256"] == content.get("sha256")):
                file |= {"sha256": content.get("sha256"), "size": content.get("size")}
        return ModelConfig.model_validate(values)

    def like(self, known: ModelConfig) -> ModelConfig:
        """This, with what is known of the files that it shares with another."""
        there = {file.source: file for file in known.files}
        return self.knowing([there.get(file.source, file).model_dump() for file in self.files])

    @property
    def needs(self) -> tuple[str, ...]:
        """The fields that it has of those that not every backend takes."""
        return tuple(name for name in NOT_FOR_ALL if getattr(self, name))

    @property
    def tasks(self) -> frozenset[str]:
        """The kinds of request that the model serves."""
        if self.embeddings:
            return frozenset({"embedding"})
        if self.rerank:
            return frozenset({"rerank"})
        return frozenset({"chat", "completion"})


def fitted(
    config: ModelConfig, *, capabilities: Collection[str], most_slots: int | None, given: Collection[str]
) -> ModelConfig:
    """The configuration as its backend can serve it: slots that nobody asked for are no more than it has.

    Args:
        config: what is wanted.
        capabilities: of the backend.
        most_slots: requests that one replica can work on at once; None: as many as one likes.
        given: the fields that somebody has chosen, as opposed to defaults.

    Raises:
        InvalidValue: the backend does not do what the model is for, or not for so many requests at once.
    """
    if not config.tasks & set(capabilities):
        raise InvalidValue(
            f"The backend '{config.backend}' does not do {' or '.join(sorted(config.tasks))}; "
            f"it does: {', '.join(capabilities)}.",
            param="backend",
        )
    if most_slots is None or config.slots <= most_slots:
        return config
    if "slots" in given:
        raise InvalidValue(
            f"The backend '{config.backend}' works on {most_slots} request(s) at a time: 'slots' can be {most_slots} at "
            "most. More replicas (max_replicas) serve more.",
            param="slots",
        )
    return config.model_copy(update={"slots": most_slots})


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the header of a model's file says of its memory."""

    architecture: str
    blocks: int  # layers
    context_length: int  # tokens that it was trained for; 0: not said
    embedding_length: int
    heads: int  # of one layer, at most
    kv_heads: int  # of all layers together
    key_length: int  # numbers of one head's key
    value_length: int
    vocabulary: int  # tokens
    file_size: int  # bytes, like the next two
    layer_bytes: int  # tensors of all layers
    other_bytes: int  # tensors of no layer: embeddings, output

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self | None:
        """The facts that `asdict` made; None of anything else, as a node of another version may send it."""
        names = {field.name for field in fields(cls)}
        if set(record) != names or not isinstance(record["architecture"], str):
            return None
        numbers = [record[name] for name in names - {"architecture"}]
        sound = all(type(number) is int and 0 <= number < LARGEST for number in numbers)
        return cls(**record) if sound else None

    @property
    def tensor_bytes(self) -> int:
        return self.layer_bytes + self.other_bytes


class Document(ModelConfig):
    """A model as people write it down: its name beside what `ModelConfig` has."""

    name: ModelName

    @property
    def config(self) -> ModelConfig:
        """The same, with what was written down as what is set of it."""
        written = self.model_fields_set & ModelConfig.model_fields.keys()
        return ModelConfig.model_validate({name: getattr(self, name) for name in written})


class Model(BaseModel):
    """A registered model."""

    model_config = ConfigDict(frozen=True)

    id: str
    name: str
    revision: int
    config: ModelConfig
    is_default: bool = False
    created: float = 0.0  # seconds since the epoch
    facts: Facts | None = None  # once the file's header was read
    unmet: Unmet | None = None  # while it has fewer replicas than it should, and there is room for no more

    def spec(self) -> dict[str, Any]:
        """What a node is told of the model: not what is done with requests before they come there."""
        config = self.config.model_dump(exclude={"parameters", "system_prompt"})
        return {"id": self.id, "name": self.name, "revision": self.revision, **config}
