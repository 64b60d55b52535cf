"""Where a model's file comes from: the forms that a `source` can have, and the one place that reads them. Pure.

What a form means on the network is the nodes' business (`workers.node.sources`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from localai_q.errors import InvalidValue

FORMS = (
    ("https://host/path", "or http://; with mirrors: further URLs of the same file"),
    ("huggingface://owner/repo/file[@revision]", ""),
    ("ollama://name[:tag]", ""),
    ("oci://registry/repository:tag", "or @sha256:digest"),
    ("s3://bucket/key", ""),
    ("pypi:package==version#path/in/wheel", ""),
    ("store:sha256", "a file that was uploaded"),
    ("file:/absolute/path", "a file that lies on the nodes"),
)
MOST_MIRRORS = 8
OLLAMA = "ollama"  # stands for the registry that a node's settings name

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_SHA256 = r"[0-9a-f]{64}"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_HOST = r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
_PATH = r"[a-z0-9][a-z0-9._/-]{0,254}"
_HUGGING_FACE = re.compile(rf"(?:huggingface|hf)://({_PART}/{_PART})/([^@?#]+)(?:@([^@?#]+))?")
_OLLAMA = re.compile(rf"ollama://((?:{_PART}/)?{_PART})(?::({_TAG}))?", re.ASCII)
_OCI = re.compile(rf"oci://({_HOST})/({_PATH}?)(?::({_TAG})|@(sha256:{_SHA256}))")
_S3 = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(.{1,1024})")
_PYPI = re.compile(r"pypi:([A-Za-z0-9._-]+)==([A-Za-z0-9.!+_-]+)#(.+)")
_STORE = re.compile(rf"store:({_SHA256})")
_FILE = re.compile(r"file:(?://)?(/.+)")


@dataclass(frozen=True)
class Web:
    """A file behind a URL, or behind any of several."""

    urls: tuple[str, ...]


@dataclass(frozen=True)
class HuggingFace:
    """A file of a repository of models."""

    repository: str  # owner/name
    file: str
    revision: str


@dataclass(frozen=True)
class Image:
    """The model in an image of a registry. `registry` is host[:port], or `OLLAMA`."""

    registry: str
    repository: str
    reference: str  # a tag, or sha256:…


@dataclass(frozen=True)
class Bucket:
    """An object of an S3-compatible store."""

    bucket: str
    key: str


@dataclass(frozen=True)
class Wheel:
    """A file within a wheel of a Python package."""

    package: str
    version: str
    member: str


@dataclass(frozen=True)
class Stored:
    """A file that was uploaded to the API."""

    sha256: str


@dataclass(frozen=True)
class OnNode:
    """A file that lies on the node that wants it."""

    path: str


Source = Web | HuggingFace | Image | Bucket | Wheel | Stored | OnNode
TELLS_SHA256 = (HuggingFace, Image)  # of whose files the source itself tells it


def parse(text: str, mirrors: Sequence[str] = ()) -> Source:
    """What a source names.

    Raises:
        InvalidValue: it has none of the forms, or mirrors where none can be.
    """
    if text.startswith(("http://", "https://")):
        if len(mirrors) > MOST_MIRRORS:
            raise InvalidValue(f"A model can have {MOST_MIRRORS} mirrors, not {len(mirrors)}.", param="mirrors")
        return Web((_url(text, "source"), *(_url(mirror, "mirrors") for mirror in mirrors)))
    if mirrors:
        raise InvalidValue("Mirrors go with a source of the form https://host/path.", param="mirrors")
    for form, make in _MAKERS:
        if found := form.fullmatch(text):
            return make(found)
    raise _no_source(text)


def _hugging_face(found: re.Match[str]) -> HuggingFace:
    return HuggingFace(found[1], _inside(found[2]), _inside(found[3] or "main"))


def _ollama(found: re.Match[str]) -> Image:
    name = found[1] if "/" in found[1] else f"library/{found[1]}"
    return Image(OLLAMA, _inside(name), found[2] or "latest")


def _oci(found: re.Match[str]) -> Image:
    _url(f"https://{found[1]}", "source")
    return Image(found[1], _inside(found[2]), found[3] or found[4])


def _s3(found: re.Match[str]) -> Bucket:
    return Bucket(found[1], _printable(found[2]))


def _pypi(found: re.Match[str]) -> Wheel:
    return Wheel(found[1], found[2], _inside(found[3]))


def _on_node(found: re.Match[str]) -> OnNode:
    path = _printable(found[1])
    if ".." in path.split("/"):
        raise InvalidValue(f"The path {path!r} must not have '..' in it.", param="source")
    return OnNode(path)


_MAKERS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Source]], ...] = (
    (_HUGGING_FACE, _hugging_face),
    (_OLLAMA, _ollama),
    (_OCI, _oci),
    (_S3, _s3),
    (_PYPI, _pypi),
    (_STORE, lambda found: Stored(found[1])),
    (_FILE, _on_node),
)


def _url(text: str, field: str) -> str:
    """The URL, if it is one of a web server and says nothing that should not be shown."""
    try:
        parts = urlsplit(_printable(text))
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidValue(f"{text!r} is no URL: {error}.", param=field) from error
    if parts.scheme not in ("http", "https") or not host:
        raise InvalidValue(f"{text!r} is no URL of the form https://host/path.", param=field)
    if parts.username is not None or parts.password is not None:
        raise InvalidValue("A URL with a user or a password in it would be shown to everybody.", param=field)
    return text


def _inside(path: str) -> str:
    """A relative path that stays below where it begins."""
    if path.startswith("/") or "\\" in path or {"", ".", ".."} & set(path.split("/")):
        raise InvalidValue(f"{path!r} is no path below the source: no '..', no '\\', no '//'.", param="source")
    return _printable(path)


def _printable(text: str) -> str:
    if not text.isprintable():
        raise InvalidValue(f"{text!r} has characters that cannot be shown.", param="source")
    return text


def _no_source(text: str) -> InvalidValue:
    forms = "; ".join(f"{form} ({note})" if note else form for form, note in FORMS)
    return InvalidValue(f"{text[:200]!r} is no source of a model's file. It can be: {forms}.", param="source")
