"""Hugging Face, or a mirror that speaks as it does, as web asks it: what a repository has. Files are fetched by nodes."""

from __future__ import annotations

from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from localai_q.cluster.importing import Repository
from localai_q.config import Settings
from localai_q.errors import NotFound, Unavailable
from localai_q.network import trust_in
from localai_q.services.galleries import network

HIDDEN = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN, httpx.codes.NOT_FOUND)


class _File(BaseModel):
    rfilename: str


class _Told(BaseModel):
    siblings: list[_File]


def files_of(repository: Repository, settings: Settings) -> list[str]:
    """The paths of all files of a repository.

    Raises:
        NotFound: the hub has no such repository, or does not show it.
        Unavailable: it cannot be asked.
    """
    path = f"{repository.name}/revision/{quote(repository.revision, safe='')}"
    headers = {"Authorization": f"Bearer {settings.hf_token}"} if settings.hf_token else {}
    url = f"{settings.hf_endpoint.rstrip('/')}/api/models/{path}"
    try:
        response, body = network(settings).read(url, headers, trust_in(settings.hf_endpoint))
    except httpx.HTTPError as error:
        raise Unavailable(f"cannot read {url}: {error}") from error
    if response.status_code in HIDDEN:
        raise NotFound(f"The hub shows no repository '{repository.name}' with the revision '{repository.revision}' "
                       f"({response.status_code}). If it is not public, HF_TOKEN needs to be set for the API, too.")  # fmt: skip
    if response.status_code != httpx.codes.OK:
        raise Unavailable(f"{url} answers with status {response.status_code}")
    try:
        return [file.rfilename for file in _Told.model_validate_json(body).siblings]
    except ValidationError as error:
        raise Unavailable(f"{url} answers with something else than a repository") from error
