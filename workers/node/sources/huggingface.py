"""Files of Hugging Face, or of a mirror that speaks as it does. The hub tells the SHA-256 of what it keeps in LFS."""

from __future__ import annotations

import re
from urllib.parse import quote

from localai_q.cluster.sources import HuggingFace
from localai_q.network import Network, trust_in
from workers.node.sources.origin import Origin, ask, refusal, size_said

DIGEST = "x-linked-etag"
HINT = "set HF_TOKEN on the node to a token that may read this repository"


def resolve(source: HuggingFace, net: Network, *, endpoint: str, token: str) -> Origin:
    """Ask the hub what the file is; its bytes come from wherever the hub redirects to."""
    path = f"{source.repository}/resolve/{quote(source.revision, safe='')}/{quote(source.file)}"
    url = f"{endpoint.rstrip('/')}/{path}"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    trust = trust_in(endpoint)
    # The hub's own answer says more than the one that it redirects to.
    told, _ = ask(net, url, headers, trust, method="HEAD", until=DIGEST)
    if not (told.is_success or told.is_redirect):
        raise refusal(told, HINT)
    digest = told.headers.get(DIGEST, "").strip('"')
    return Origin(
        urls=(url,),
        headers=headers,
        sha256=digest if re.fullmatch("[0-9a-f]{64}", digest) else None,
        size=size_said(told.headers.get("x-linked-size", "")),
        trust=trust,
    )
