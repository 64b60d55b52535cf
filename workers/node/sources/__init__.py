"""From what a source says to what can be fetched: one module for each family of sources, one form for all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from localai_q import network
from localai_q.cluster.sources import Bucket, HuggingFace, Image, OnNode, Source, Stored, Web, Wheel
from localai_q.config import Settings
from localai_q.errors import NotFound
from localai_q.network import Network, Trust
from workers.child import ChildSpec
from workers.identity import Identity
from workers.node.api import NodeApi
from workers.node.installer import certificates
from workers.node.sources import huggingface, images, s3, wheels
from workers.node.sources.origin import Origin


@dataclass(frozen=True)
class Access:
    """What a node has to fetch with: its settings, and the API that it belongs to."""

    settings: Settings
    api_url: str
    node_id: str
    secret: str
    redis_url: str = ""
    peers: NodeApi | None = None  # None: other nodes are not asked

    @classmethod
    def of(cls, settings: Settings, spec: ChildSpec) -> Access:
        identity = Identity(spec.identity)
        api = NodeApi(spec.api_url, spec.node_id, identity)
        return cls(settings, spec.api_url, spec.node_id, identity.secret(), spec.redis_url, api)

    def network(self) -> Network:
        """The network as sources may use it."""
        urls = tuple(url for url in (self.api_url, self.redis_url) if url)
        return Network(
            allow_private=self.settings.allow_private_sources,
            cluster_urls=urls,
            certificates=certificates(),
        )


def resolve(source: Source, access: Access, net: Network) -> Origin:
    """What to fetch for a source.

    Raises:
        LocalAIError: the source has no such file, may not be asked, or cannot be asked.
    """
    settings = access.settings
    match source:
        case Web():
            return Origin(urls=source.urls)
        case HuggingFace():
            return huggingface.resolve(source, net, endpoint=settings.hf_endpoint, token=settings.hf_token)
        case Image():
            return images.resolve(source, net, ollama=settings.ollama_registry)
        case Bucket():
            return s3.resolve(source, endpoint=settings.s3_endpoint)
        case Wheel():
            return wheels.resolve(source)
        case Stored():
            return uploaded(source, access)
        case OnNode():
            return _on_node(source)


def uploaded(source: Stored, access: Access) -> Origin:
    """What the API's own store has."""
    url = f"{access.api_url}/api/node/{access.node_id}/files/{source.sha256}"
    headers = {"Authorization": f"Bearer {access.secret}"}
    trust = Trust(origins=network.trust_in(url).origins, direct=True)
    return Origin(urls=(url,), headers=headers, sha256=source.sha256, trust=trust)


def _on_node(source: OnNode) -> Origin:
    path = Path(source.path)
    if not path.is_file():
        raise NotFound("this node has no such file")
    return Origin(urls=(path.as_uri(),), size=path.stat().st_size)
