"""A model that is named by a URI: what people want of it besides, in LocalAI's words (`preferences`), and which file of a
repository of Hugging Face they mean. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from localai_q.cluster.localai_yaml import says
from localai_q.cluster.parts import part
from localai_q.errors import InvalidValue

USUAL = "q4_k_m"  # what is taken where nobody says more, as LocalAI does
MOST_SHOWN = 30  # files in a message

_NAME = r"([A-Za-z0-9][A-Za-z0-9._-]{0,127}/[A-Za-z0-9][A-Za-z0-9._-]{0,127})"
_FORMS = (
    re.compile(rf"(?:(?:huggingface|hf)://)?{_NAME}(?:@([^@?#]+))?/?"),
    re.compile(rf"https://huggingface\.co/{_NAME}(?:/tree/([^/?#]+))?/?"),
)
_NO_MODEL = re.compile(r"mmproj|(?:^|/)imatrix|imatrix\.gguf$")  # what else lies beside models
_ELSEWHERE = "it is for models that this cluster does not serve"
_LEFT_OUT = {
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
    description: str = ""
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
        return value.split(",") if isinstance(value, str) else value

    @property
    def fields(self) -> dict[str, Any]:
        """Those that are fields of a document of LocalAI's, too."""
        return self.model_dump(include={"description", "backend", "embeddings"}, exclude_defaults=True)

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
    """The repository that a URI names; None of a URI of a file, and of anything else."""
    found = next((match for form in _FORMS if (match := form.fullmatch(uri))), None)
    return Repository(found[1], found[2] or "main") if found else None


def choose(name: str, files: Collection[str], wanted: Sequence[str] = ()) -> str:
    """The file of a repository that a model is made of; of a model in several files the first.

    Args:
        name: of the repository.
        wanted: quantizations, the most wanted first; none: the usual one, or the only model that there is.

    Raises:
        InvalidValue: none of them is there, or several files have it; the message lists what there is.
    """
    models = [file for file in sorted(files) if _is_model(file)]
    for quantization in wanted or (USUAL,):
        found = [file for file in models if _has(file, quantization)]
        if len(found) > 1:
            raise _unclear(f"{name} has several files with {quantization}: {_shown(found)}")
        if found:
            return found[0]
    if len(models) == 1 and not wanted:
        return models[0]
    raise _unclear(
        f"{name} has no GGUF file with {' or '.join(wanted or (USUAL,))}; it has: {_shown(models) or 'none'}"
    )


def _is_model(file: str) -> bool:
    """Whether a file is a model's only one, or its first."""
    several = part(file)
    lower = file.lower()
    return lower.endswith(".gguf") and not _NO_MODEL.search(lower) and (several is None or several.number == 1)


def _has(file: str, quantization: str) -> bool:
    """Whether the name of a file says this quantization: not another one that begins or ends with it."""
    return bool(re.search(rf"(?<![a-z0-9]){re.escape(quantization.lower())}(?![a-z0-9_])", file.lower()))


def _shown(files: Sequence[str]) -> str:
    more = f" and {len(files) - MOST_SHOWN} more" if len(files) > MOST_SHOWN else ""
    return ", ".join(file[:200] for file in files[:MOST_SHOWN]) + more


def _unclear(message: str) -> InvalidValue:
    return InvalidValue(f"{message}. Say which in 'quantizations', or name the file itself: "
                        "huggingface://owner/repo/file.", param="quantizations")  # fmt: skip
