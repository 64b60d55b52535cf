"""Holders of files as the node runs them: real processes on loopback."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from localai_q.cluster import tickets
from localai_q.processes import spawn, stop, tail
from workers.child import ChildSpec, read_statuses, write_spec
from workers.identity import Identity
from workers.node.digests import Digest
from workers.node.store import Store


@dataclass
class Running:
    """A holder that serves."""

    id: str
    store: Store
    identity: Identity
    address: str
    process: Popen[bytes]

    def url(self, sha256: str) -> str:
        return f"http://{self.address}/blobs/{sha256}"

    def ticket(self, sha256: str, **changes: object) -> str:
        told = {"secret_hash": self.identity.hash, "node_id": self.id, "sha256": sha256, "now": time.time(), **changes}
        return tickets.issue(**told)

    def told(self, sha256: str) -> dict[str, str]:
        """As the API names it."""
        return {"node": self.id, "name": self.id, "url": self.url(sha256), "ticket": self.ticket(sha256)}


def lay(store: Store, content: bytes) -> str:
    """Have a whole, verified file in a store; its SHA-256."""
    store.folder.mkdir(parents=True, exist_ok=True)
    digest = Digest()
    digest.update(content)
    part = store.part(digest.sha256)
    part.write_bytes(content)
    store.keep(part, digest.sha256, digest.beginnings)
    return digest.sha256


@contextmanager
def holder(home: Path, node_id: str = "h1", **environment: str) -> Iterator[Running]:
    """A holder of what lies in `home`."""
    home.mkdir(parents=True, exist_ok=True)
    identity, log = Identity(home / "identity.json"), home / "files.log"
    read_end, write_end = os.pipe()
    spec = ChildSpec(
        node_id=node_id, node_name=node_id, redis_url="", lease=5.0, journal_ttl=60.0, journal_max=1000, load_stall=300.0,
        status_fd=write_end, backends=home, models=home, api_url="http://127.0.0.1:9", identity=identity.path,
    )  # fmt: skip
    write_spec(home / "spec.json", spec)
    process = spawn(
        [sys.executable, "-m", "workers.node.holder"], log=log, pass_fds=(write_end,),
        env={**os.environ, "LOCALAI_Q_CHILD_SPEC": str(home / "spec.json"), **environment},
    )  # fmt: skip
    os.close(write_end)
    try:
        said = next(read_statuses(read_end), None)
        assert said, tail(log)
        assert said["state"] == "ready", json.dumps(said)
        yield Running(node_id, Store(home), identity, said["files_address"], process)
    finally:
        stop(process, 2.0)
