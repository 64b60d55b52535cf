"""The scripts that run inside Redis: where they lie and how a client gets hold of one."""

from __future__ import annotations

from importlib import resources

import redis
from redis.commands.core import Script


def script(client: redis.Redis, name: str) -> Script:
    """The script of this name, to be called with `keys` and `args`; Redis is given it again after a restart."""
    text = (resources.files("localai_q.bus") / "scripts" / f"{name}.lua").read_text()
    return client.register_script(text)
