"""The catalogue: which backends and models can be installed by name. Owns the shape of `backends.yaml` and
`models.yaml`, and of galleries.

It leaves making an entry into files to the nodes (`workers.node.installer`, `workers.node.fetcher`), and what a cluster
has installed to `localai_q.store`.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from localai_q.cluster.builds import Build
from localai_q.cluster.models import Document, ModelName
from localai_q.cluster.sources import TELLS_SHA256, Image, parse
from localai_q.cluster.sources import Source as AnySource
from localai_q.cluster.wheels import Level
from localai_q.documents import read_yaml
from localai_q.errors import InvalidValue, NotFound, StartupError

MOST_MODELS = 10_000  # of one gallery
FOREIGN = {"url", "urls", "files", "overrides", "config_file"}  # fields of an entry in LocalAI's form
MOST_REQUIREMENTS = 200
MOST_COMPILED = 8


def _parsed_source(text: str) -> AnySource:
    try:
        return parse(text)
    except InvalidValue as error:
        raise ValueError(error.message) from error


def _source(text: str) -> str:
    _parsed_source(text)
    return text


def _requirement(text: str) -> str:
    try:
        found = Requirement(text)
    except InvalidRequirement as error:
        raise ValueError(f"it is no requirement as 'package==1.0': {str(error).splitlines()[0]}") from error
    if found.url:
        raise ValueError("a package comes from an index, not from an address")
    return text


def _pinned(text: str) -> str:
    found = Requirement(_requirement(text))
    specifiers = [str(one) for one in found.specifier]
    plain = not (found.extras or found.marker)
    if not plain or len(specifiers) != 1 or not specifiers[0].startswith("==") or specifiers[0].endswith("*"):
        raise ValueError("what is compiled names one version, as 'package==1.0', and nothing else")
    return text


Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Wanted = Annotated[str, StringConstraints(pattern=r"^(.{1,100}@)?[a-z0-9][a-z0-9._-]{0,63}$")]  # name, or gallery@name
Version = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Source = Annotated[str, AfterValidator(_source)]
WebAddress = Annotated[str, StringConstraints(pattern=r"^https?://[^\s/?#@]+(/[^\s?#@]*)?$", max_length=500)]
PythonRequirement = Annotated[str, StringConstraints(max_length=500), AfterValidator(_requirement)]
PinnedRequirement = Annotated[str, StringConstraints(max_length=200), AfterValidator(_pinned)]
SettingName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,100}$")]
SettingValue = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]{0,500}$")]
_Entry = TypeVar("_Entry", bound=BaseModel)
Capability = Literal["chat", "completion", "embedding", "rerank", "tokenize", "quantize", "shard"]
SERVES: tuple[Capability, ...] = ("chat", "completion", "embedding", "rerank", "tokenize")  # what models are for


class Archive(BaseModel):
    """A tar archive, plain or compressed, with `run.sh` or `server.py` at its top."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Source
    sha256: Digest | None = Field(None, validate_default=True)  # None: its source tells it

    @field_validator("sha256")
    @classmethod
    def _can_be_checked(cls, sha256: str | None, info: ValidationInfo) -> str | None:
        source = info.data.get("source")
        if source and not sha256 and not isinstance(_parsed_source(source), TELLS_SHA256):
            raise ValueError(f"{source} needs its SHA-256, for it does not tell it itself")
        return sha256


class CompiledPackage(BaseModel):
    """A package that comes as source only, so that a node compiles it, or takes the wheel of one that has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requirement: PinnedRequirement
    settings: dict[SettingName, SettingValue] = Field(default_factory=dict, max_length=64)  # of PEP 517
    # The x86 processors that these settings make code for. Older ones are refused; None: the code is for processors of
    # the same level as that of the machine that compiles it. Of no meaning on other processors.
    level: Level | None = None

    @property
    def name(self) -> str:
        """The package's name, normalized."""
        return canonicalize_name(Requirement(self.requirement).name)

    @property
    def version(self) -> str:
        return next(iter(Requirement(self.requirement).specifier)).version


class BuildEntry(BaseModel):
    """How a backend is made for one kind of hardware."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    compiled: tuple[CompiledPackage, ...] = Field((), max_length=MOST_COMPILED)  # besides the requirements
    requirements: tuple[PythonRequirement, ...] = Field((), max_length=MOST_REQUIREMENTS)  # instead of requirements.txt
    archive: Archive | None = None  # instead of a folder of this version
    index: WebAddress | None = None  # a further package index, which goes before the machine's own


class BackendEntry(BaseModel):
    """A backend that can be installed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    version: Version
    description: str
    source: Name | None = None  # a folder of workers/backends; None: each build has an archive
    builds: dict[Build, BuildEntry] = Field({"cpu": BuildEntry()}, min_length=1)
    capabilities: tuple[Capability, ...] = Field(min_length=1)
    default: bool = False
    takes: tuple[Literal["chat_template", "mmproj", "draft_model", "loras"], ...] = ()  # of a model's document
    most_slots: int | None = Field(None, ge=1, le=256)  # requests that one replica works on at once; None: any number
    alias: Name | None = None  # another name by which models can name it

    @model_validator(mode="after")
    def _is_made_of_something(self) -> Self:
        if any((build.archive is None) == (self.source is None) for build in self.builds.values()):
            raise ValueError("it needs either 'source', or an 'archive' in each of its 'builds'")
        return self

    @property
    def record(self) -> dict[str, Any]:
        """It as it goes with a job: a node knows a backend by its name only. It says what is not so by itself, for the node
        may be of an older version, which knows fewer fields."""
        return self.model_dump(mode="json", exclude={"alias"}, exclude_defaults=True)

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Self:
        """The entry of such a record, perhaps of another version: what this one does not know of it is left out.

        Raises:
            ValidationError: it is none.
        """
        return cls.model_validate(record, extra="ignore")


class External(Archive):
    """A backend that an admin gives the archive of, in the words of LocalAI's API."""

    source: Source = Field(alias="uri")
    name: Name
    alias: Name | None = None

    @property
    def entry(self) -> BackendEntry:
        """It as an entry: for any machine, and for all that models are for, as nobody knows better before it is asked."""
        archive = Archive(source=self.source, sha256=self.sha256)
        return BackendEntry(name=self.name, alias=self.alias, version=self._version, description=f"From {self.source}",
                            builds={"cpu": BuildEntry(archive=archive)}, capabilities=SERVES)  # fmt: skip

    @property
    def _version(self) -> str:
        """The beginning of the digest, or the tag or revision that the source names."""
        if self.sha256:
            return self.sha256[:12]
        found = _parsed_source(self.source)
        told = found.reference if isinstance(found, Image) else getattr(found, "revision", "")
        return re.sub(r"^[^A-Za-z0-9]|[^A-Za-z0-9.+_-]", "x", told.removeprefix("sha256:"))[:64]


class ModelEntry(Document):
    """A model that can be installed: a document of it, and what people want to know before."""

    description: str = ""
    license: str = Field("", max_length=100)
    tags: tuple[str, ...] = Field((), max_length=32)
    default: bool = False

    @model_validator(mode="after")
    def _can_be_had(self) -> Self:
        for file in self.files:
            if not isinstance(_parsed_source(file.source), TELLS_SHA256) and not file.sha256:
                raise ValueError(f"{file.source} needs its sha256: it does not tell it itself")
        return self

    @property
    def document(self) -> Document:
        """It without what is only said of it."""
        given = self.model_fields_set & Document.model_fields.keys()
        return Document.model_validate({name: getattr(self, name) for name in given})


class ForeignEntry(BaseModel):
    """A model of a gallery in LocalAI's form. What it says of icons and the like is nobody's business here."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: ModelName
    description: str = ""
    license: str = ""
    tags: tuple[str, ...] = ()
    url: str = ""  # of the document that it is made of
    config_file: dict[str, Any] = Field(default_factory=dict)  # that document itself
    overrides: dict[str, Any] = Field(default_factory=dict)
    files: tuple[dict[str, Any], ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nothing(cls, content: Any) -> Any:
        """Without fields that say null, as people leave them behind."""
        if not isinstance(content, dict):
            return content
        return {name: value for name, value in content.items() if value is not None}


class Catalog(BaseModel):
    """Every entry, checked against the others."""

    model_config = ConfigDict(frozen=True)

    backends: tuple[BackendEntry, ...]
    models: tuple[ModelEntry, ...]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        for kind, entries in (("backend", self.backends), ("model", self.models)):
            names = [entry.name for entry in entries]
            if len(set(names)) != len(names):
                raise ValueError(f"two entries of the same {kind} name: {sorted(names)}")
            if sum(entry.default for entry in entries) != 1:
                raise ValueError(f"exactly one {kind} must say 'default: true'")
        known = {entry.name for entry in self.backends}
        for model in self.models:
            if model.backend not in known:
                raise ValueError(f"model {model.name!r} names the unknown backend {model.backend!r}")
        return self

    def backend(self, name: str) -> BackendEntry:
        """The backend of that name.

        Raises:
            NotFound: there is none; the message lists those that are.
        """
        for entry in self.backends:
            if entry.name == name:
                return entry
        known = ", ".join(entry.name for entry in self.backends)
        raise NotFound(f"there is no backend {name!r} in the catalogue; there are: {known}")

    def model(self, name: str) -> ModelEntry:
        """The model of that name.

        Raises:
            NotFound: there is none; the message lists those that are.
        """
        for entry in self.models:
            if entry.name == name:
                return entry
        known = ", ".join(entry.name for entry in self.models)
        raise NotFound(f"there is no model {name!r} in the catalogue; there are: {known}")

    def default_backend(self) -> BackendEntry:
        """The backend that serves a model which names none."""
        return next(entry for entry in self.backends if entry.default)

    def default_model(self) -> ModelEntry:
        """The model that a new cluster starts with."""
        return next(entry for entry in self.models if entry.default)


def load_catalog(folder: Path) -> Catalog:
    """The catalogue of a folder that holds `backends.yaml` and `models.yaml`.

    Raises:
        StartupError: a file is missing or says something impossible; the message names the file and the entry.
    """
    backends = _entries(folder / "backends.yaml", BackendEntry)
    models = _entries(folder / "models.yaml", ModelEntry)
    try:
        return Catalog(backends=backends, models=models)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise StartupError(f"the catalogue in {folder} is wrong: {reason}") from error


def read_gallery(text: str, place: str) -> tuple[BackendEntry, ...]:
    """The backends that a gallery lists, in the form of `backends.yaml`.

    Raises:
        InvalidValue: it says something impossible, or what only this version's own list may say; the message names where.
    """
    try:
        entries = _parsed(text, place, BackendEntry)
    except StartupError as error:
        raise InvalidValue(error.message) from error
    own = {entry.name for entry in catalog().backends}
    names = [entry.name for entry in entries]
    for entry in entries:
        if entry.name in own or names.count(entry.name) > 1:
            raise InvalidValue(f"the gallery {place} names a backend that there is already: {entry.name!r}")
        if entry.source or entry.default:
            raise InvalidValue(
                f"the gallery {place} is wrong at {entry.name!r}: 'source' and 'default' are not for galleries"
            )
    return entries


def read_models(text: str, place: str) -> tuple[tuple[ModelEntry | ForeignEntry, ...], str]:
    """The models that a gallery lists, in the form of `models.yaml` or in LocalAI's, and what is wrong with others in
    LocalAI's form: a list of theirs is long, and no single entry takes the rest away.

    Raises:
        InvalidValue: it says something impossible; the message names where.
    """
    try:
        found: Any = next(iter(read_yaml(text)), [])
    except InvalidValue as error:
        raise InvalidValue(f"cannot read the gallery {place}: {error.message}") from error
    if not isinstance(found, list) or len(found) > MOST_MODELS:
        raise InvalidValue(f"the gallery {place} is no list of {MOST_MODELS} models at most")
    entries: list[ModelEntry | ForeignEntry] = []
    wrong: list[str] = []
    for number, content in enumerate(found):
        kind = ForeignEntry if isinstance(content, dict) and FOREIGN & content.keys() else ModelEntry
        try:
            entries.append(kind.model_validate(content))
        except ValidationError as error:
            problem = error.errors()[0]
            where = _place(found, (number, *problem["loc"]))
            if kind is ModelEntry:
                raise InvalidValue(f"the gallery {place} is wrong at {where}: {problem['msg']}") from error
            wrong.append(f"{where}: {problem['msg']}")
    left_out = f"{len(wrong)} models of {place} are left out, the first at {wrong[0]}" if wrong else ""
    return tuple(entries), left_out


def _entries(path: Path, kind: type[_Entry]) -> tuple[_Entry, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"cannot read the catalogue {path}: {error}") from error
    return _parsed(text, str(path), kind)


def _parsed(text: str, place: str, kind: type[_Entry]) -> tuple[_Entry, ...]:
    try:
        found: Any = next(iter(read_yaml(text)), None)
        return TypeAdapter(tuple[kind, ...]).validate_python(found)  # type: ignore[valid-type]
    except InvalidValue as error:
        raise StartupError(f"cannot read the catalogue {place}: {error.message}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = _place(found, problem["loc"])
        raise StartupError(f"the catalogue {place} is wrong at {where}: {problem['msg']}") from error


def _place(entries: Any, location: tuple[int | str, ...]) -> str:
    """The entry and field of a mistake, as a person would say it."""
    if not location or not isinstance(entries, list):
        return "the top: it must be a list of entries"
    entry = entries[int(location[0])]
    name = entry.get("name") if isinstance(entry, dict) else None
    shown = name[:100] if isinstance(name, str) else location[0]
    return f"{shown!r}, {'.'.join(str(part) for part in location[1:]) or 'the whole entry'}"


@cache
def catalog() -> Catalog:
    """The catalogue that comes with this version, read once."""
    return load_catalog(Path(__file__).parent)


def backend(name: str) -> BackendEntry:
    """The backend of that name in this version's catalogue; `NotFound` if there is none."""
    return catalog().backend(name)


def model(name: str) -> ModelEntry:
    """The model of that name in this version's catalogue; `NotFound` if there is none."""
    return catalog().model(name)


def default_model() -> ModelEntry:
    """The model that a new cluster starts with."""
    return catalog().default_model()
