"""Models in registries of images: OCI artifacts, Docker's model images, and ollama's library.

Speaks the distribution specification as far as an anonymous reader needs it. The digest of a layer is the SHA-256 of
its bytes.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import platform
import re
from typing import Any
from urllib.parse import urlencode, urlsplit

import httpx

from localai_q import network
from localai_q.cluster.sources import OLLAMA, Image
from localai_q.errors import InvalidValue, Unavailable
from localai_q.network import Network, Trust, trust_in
from workers.node.sources.origin import Origin, ask, refusal

MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MODELS = ("application/vnd.ollama.image.model", "application/vnd.docker.ai.gguf.v3")  # media types of a model's layer
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # registries' names by those of Python
TITLE = "org.opencontainers.image.title"
HINT = "only public images can be fetched"

_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


def resolve(image: Image, net: Network, *, ollama: str) -> Origin:
    """Find the layer of an image that is the model. `ollama`: the URL of ollama's registry."""
    base, trust = (ollama.rstrip("/"), trust_in(ollama)) if image.registry == OLLAMA else (_base(image), network.NONE)
    registry = _Registry(net, f"{base}/v2/{image.repository}", trust)
    manifest = registry.manifest(image.reference)
    if _media_type(manifest) in INDEXES:
        manifest = registry.manifest(_chosen(manifest))
    layer = _model_layer(manifest)
    digest = _digest(layer)
    size = layer.get("size")
    return Origin(
        urls=(f"{base}/v2/{image.repository}/blobs/sha256:{digest}",),
        headers=registry.headers,
        sha256=digest,
        size=size if type(size) is int and size > 0 else 0,
        trust=trust,
    )


class _Registry:
    """A repository of a registry, read without an account."""

    def __init__(self, net: Network, url: str, trust: Trust) -> None:
        self._net = net
        self._url = url
        self._trust = trust
        self.headers: dict[str, str] = {}  # with the token, where the registry gives one to anybody

    def manifest(self, reference: str) -> dict[str, Any]:
        url = f"{self._url}/manifests/{reference}"
        response, body = self._get(url)
        if response.status_code == httpx.codes.UNAUTHORIZED and not self.headers:
            self.headers = self._token(response)
            response, body = self._get(url)
        if not response.is_success:
            raise refusal(response, HINT)
        wanted = _DIGEST.fullmatch(reference)
        found = hashlib.sha256(body).hexdigest()
        if wanted and found != wanted[1]:
            raise Unavailable(f"the manifest {reference} has another content: its SHA-256 is {found}")
        return _object(body, "manifest")

    def _get(self, url: str) -> tuple[httpx.Response, bytes]:
        return ask(self._net, url, {"Accept": ", ".join((*MANIFESTS, *INDEXES)), **self.headers}, self._trust)

    def _token(self, response: httpx.Response) -> dict[str, str]:
        kind, _, rest = response.headers.get("www-authenticate", "").partition(" ")
        told = dict(_CHALLENGE.findall(rest))
        realm = told.pop("realm", "")
        if kind.lower() != "bearer" or not realm.startswith(("http://", "https://")):
            raise refusal(response, HINT)
        query = urlencode({name: told[name] for name in ("service", "scope") if name in told})
        answer, body = ask(self._net, f"{realm}{'&' if '?' in realm else '?'}{query}", trust=self._trust)
        if not answer.is_success:
            raise refusal(answer, HINT)
        found = _object(body, "token")
        token = found.get("token") or found.get("access_token")
        if not (isinstance(token, str) and token.isascii() and token.isprintable()):
            raise Unavailable(f"{answer.request.url.host} gives no token")
        return {"Authorization": f"Bearer {token}"}


def _base(image: Image) -> str:
    """The URL of a registry; one on this machine speaks plain HTTP, as container tools have it."""
    host = urlsplit(f"//{image.registry}").hostname or ""
    return f"{'http' if _is_loopback(host) else 'https'}://{image.registry}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _object(body: bytes, what: str) -> dict[str, Any]:
    try:
        found: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Unavailable(f"the registry's {what} cannot be read") from error
    if not isinstance(found, dict):
        raise Unavailable(f"the registry's {what} is no object")
    return found


def _media_type(manifest: dict[str, Any]) -> str:
    given = manifest.get("mediaType")
    return given if isinstance(given, str) else INDEXES[0] if "manifests" in manifest else MANIFESTS[0]


def _chosen(index: dict[str, Any]) -> str:
    """The one manifest of an index, or else the one for machines like this: a model is the same on every platform."""
    every = _parts(index, "manifests")
    found = every if len(every) == 1 else [manifest for manifest in every if _is_for_this_machine(manifest)]
    if len(found) != 1:
        raise InvalidValue(f"the image has {len(every)} variants, and {len(found)} of them are for a machine like this: name "
                           "one by its digest, @sha256:…", param="source")  # fmt: skip
    return f"sha256:{_digest(found[0])}"


def _is_for_this_machine(manifest: dict[str, Any]) -> bool:
    told, machine = manifest.get("platform"), platform.machine().lower()
    own = (platform.system().lower(), ARCHITECTURES.get(machine, machine))
    return isinstance(told, dict) and (told.get("os"), told.get("architecture")) == own


def _model_layer(manifest: dict[str, Any]) -> dict[str, Any]:
    layers = _parts(manifest, "layers")
    by_type = [layer for layer in layers if layer.get("mediaType") in MODELS]
    by_name = [layer for layer in layers if _title(layer).endswith(".gguf")]
    for found in (by_type, by_name, layers):
        if len(found) == 1:
            return found[0]
        if found:
            break
    kinds = ", ".join(str(layer.get("mediaType"))[:80] for layer in layers[:10]) or "none"
    raise InvalidValue(f"it cannot be told which layer of the image is the file; its layers: {kinds}", param="source")


def _parts(manifest: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = manifest.get(name)
    return [part for part in found if isinstance(part, dict)] if isinstance(found, list) else []


def _title(layer: dict[str, Any]) -> str:
    notes = layer.get("annotations")
    return str(notes.get(TITLE, "")) if isinstance(notes, dict) else ""


def _digest(part: dict[str, Any]) -> str:
    found = _DIGEST.fullmatch(str(part.get("digest")))
    if found is None:
        raise Unavailable(f"the registry names a content by {str(part.get('digest'))[:80]!r}, which is no SHA-256")
    return found[1]
