"""A model that is named by a URI: what people want of it besides, in LocalAI's words (`preferences`), and which file of a
repository of Hugging Face they mean. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from localai_q.cluster.localai_yaml import says
from localai_q.cluster.parts import part, whole
from localai_q.errors import InvalidValue

USUAL = "q4_k_m"  # what is taken where nobody says more, as LocalAI does
MOST_SHOWN = 30  # files in a message
MOST_FILES = 10_000  # of a repository that are looked through
MOST_LEFT_OUT = 32  # preferences that have no effect
LONGEST_NAME = 64  # of these

_NAME = r"([A-Za-z0-9][A-Za-z0-9._-]{0,127}/[A-Za-z0-9][A-Za-z0-9._-]{0,127})"
_FORMS = (
    re.compile(rf"(?:(?:huggingface|hf)://)?{_NAME}(?:@([^@?#]+))?/?"),
    re.compile(rf"https://huggingface\.co/{_NAME}(?:/tree/([^/?#]+))?/?"),
)
_NO_MODEL = re.compile(r"mmproj|(?:^|/)imatrix|imatrix\.gguf$")  # what else lies beside models
_ELSEWHERE = "it is for models that this cluster does not serve"
_LEFT_OUT = {
    "description": "it only describes the model",
    "mmproj_quantizations": "give the model its projector as 'mmproj'",
    **dict.fromkeys(("type", "model_type", "pipeline_type", "scheduler_type", "enable_parameters", "cuda"), _ELSEWHERE),
}

Quantization = Annotated[
    str, StringConstraints(strip_whitespace=True, to_lower=True, pattern=r"^[A-Za-z0-9._-]{1,32}$")
]


class Preferences(BaseModel):
    """What is wanted of the model. What is not known here is kept, to be named as left out."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field("", max_length=128)
    backend: str = ""
    embeddings: bool = False  # or a word for it
    quantizations: tuple[Quantization, ...] = Field((), max_length=32)  # the most wanted first; a text with commas, too

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nothing(cls, content: Any) -> Any:
        return {name: value for name, value in content.items() if says(value)} if isinstance(content, dict) else content

    @field_validator("quantizations", mode="before")
    @classmethod
    def _one_by_one(cls, value: Any) -> Any:
        return [word for word in value.split(",") if word.strip()] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _leaves_out_little(self) -> Self:
        """What is left out is told to who asked, and so is bounded."""
        names = self.model_extra or {}
        if len(names) > MOST_LEFT_OUT:
            raise ValueError(f"{len(names)} of the names mean nothing here, and {MOST_LEFT_OUT} such can be given")
        if too_long := next((name for name in names if len(name) > LONGEST_NAME), None):
            raise ValueError(f"the name {too_long[:LONGEST_NAME]!r}… has more than {LONGEST_NAME} characters")
        return self

    @property
    def fields(self) -> dict[str, Any]:
        """Those that are fields of a document of LocalAI's, too."""
        return self.model_dump(include={"backend", "embeddings"}, exclude_defaults=True)

    def left_out(self, *, from_repository: bool) -> list[str]:
        """A warning for each that has no effect."""
        reasons = {name: _LEFT_OUT.get(name, "it means nothing here") for name in self.model_extra or ()}
        if self.quantizations and not from_repository:
            reasons["quantizations"] = "the URI names no repository of Hugging Face"
        return [f"preferences.{name} is left out: {reason}" for name, reason in reasons.items()]


@dataclass(frozen=True)
class Repository:
    """A repository of Hugging Face, as it is or was at some point."""

    name: str  # owner/name
    revision: str = "main"

    def source(self, file: str) -> str:
        """One of its files as the source of a model."""
        return f"huggingface://{self.name}/{file}" + ("" if self.revision == "main" else f"@{self.revision}")


def repository(uri: str) -> Repository | None:
    """The repository that a URI names; None of a URI of a file, and of anything else.

    Raises:
        InvalidValue: its revision would lead elsewhere in a URL.
    """
    found = next((match for form in _FORMS if (match := form.fullmatch(uri))), None)
    if found is None:
        return None
    revision = found[2] or "main"
    revision = unquote(revision) if uri.startswith("https:") else revision
    if {"", ".", ".."} & set(revision.split("/")):
        raise InvalidValue(f"{revision!r} is no revision of a repository.", param="uri")
    return Repository(found[1], revision)


def choose(name: str, files: Collection[str], wanted: Sequence[str] = ()) -> str:
    """The file of a repository that a model is made of; of a model in several files the first.

    Of several files with a quantization it is the one to whose name the others only add words ("x-UD-Q4_K_M.gguf").

    Args:
        name: of the repository.
        wanted: quantizations, the most wanted first; none: the usual one, or the only model that there is.

    Raises:
        InvalidValue: none of them is there, or it is not clear which, and the message lists what there is; or there are
            too many files.
    """
    if len(files) > MOST_FILES:
        raise InvalidValue(f"{name} has {len(files)} files, and {MOST_FILES} are looked through: name the file itself: "
                           "huggingface://owner/repo/file.", param="uri")  # fmt: skip
    models = {file: file.lower() for file in sorted(files) if _is_model(file)}
    for quantization in wanted or (USUAL,):
        found = [file for file, lower in models.items() if _says(lower, quantization.lower())]
        if found:
            return _plainest(name, quantization, found)
    if len(models) == 1 and not wanted:
        return next(iter(models))
    raise _unclear(
        f"{name} has no GGUF file with {' or '.join(wanted or (USUAL,))}; it has: {_shown(list(models)) or 'none'}"
    )


def _is_model(file: str) -> bool:
    """Whether a file is a model's only one, or its first, and has a name that a source can say."""
    several = part(file)
    lower = file.lower()
    return (
        lower.endswith(".gguf")
        and not set("@?#") & set(file)
        and not _NO_MODEL.search(lower)
        and (several is None or several.number == 1)
    )


def _says(name: str, quantization: str) -> bool:
    """Whether a name says this quantization, both in small letters: not another one that begins or ends with it."""
    return quantization in name and bool(re.search(rf"(?<![a-z0-9]){re.escape(quantization)}(?![a-z0-9_])", name))


def _plainest(name: str, quantization: str, found: Sequence[str]) -> str:
    """The file to whose name all others add words."""
    words = {file: _words(file) for file in found}
    plainest = min(found, key=lambda file: len(words[file]))
    if any(not words[plainest] < words[file] for file in found if file != plainest):
        raise _unclear(f"{name} has several files with {quantization}: {_shown(found)}")
    return plainest


def _words(file: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", whole(file).lower()))


def _shown(files: Sequence[str]) -> str:
    more = f" and {len(files) - MOST_SHOWN} more" if len(files) > MOST_SHOWN else ""
    return ", ".join(file[:200] for file in files[:MOST_SHOWN]) + more


def _unclear(message: str) -> InvalidValue:
    return InvalidValue(f"{message}. Say which in 'quantizations', or name the file itself: "
                        "huggingface://owner/repo/file.", param="quantizations")  # fmt: skip
