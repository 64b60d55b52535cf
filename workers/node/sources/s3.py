"""Objects of S3-compatible stores. The credentials are the node's own, as AWS' tools find them."""

from __future__ import annotations

import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from localai_q import network
from localai_q.cluster.sources import Bucket
from localai_q.errors import InvalidValue
from localai_q.network import trust_in
from workers.node.sources.origin import Origin

LIFE = 7 * 24 * 3600 - 1  # seconds for which a signed URL is good: the longest that there is
REGION = "us-east-1"


def resolve(source: Bucket, *, endpoint: str) -> Origin:
    """Sign a URL with which the object can be read; without credentials, the URL of a public object."""
    try:
        session = botocore.session.get_session()
        style = {"addressing_style": "path"} if endpoint else {}
        signature = "s3v4" if session.get_credentials() else UNSIGNED
        client = session.create_client(
            "s3",
            region_name=session.get_config_variable("region") or REGION,
            endpoint_url=endpoint or None,
            config=Config(signature_version=signature, s3=style),
        )
        wanted = {"Bucket": source.bucket, "Key": source.key}
        url = client.generate_presigned_url("get_object", Params=wanted, ExpiresIn=LIFE)
    except (BotoCoreError, ValueError) as error:
        raise InvalidValue(f"S3 on this node: {error}", param="source") from error
    return Origin(urls=(url,), trust=trust_in(endpoint) if endpoint else network.NONE)
