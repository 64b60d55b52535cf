"""How fast a file comes from another node: `python -m bench.staging [--mib N] [--rounds N] [--cluster]`.

The same file is copied by `cp`, fetched from `python -m http.server` without any check, and fetched from one holder and
from two as a node does it, with its SHA-256; each time it is on the disk at the end. The ways take turns, and each is
compared with the plain server of its own round; medians are printed, for a machine may be busy. With `--cluster`, how
long a model takes until it is ready, too: on a first node, which has its file from a web server, and on a second one,
which has it from the first.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

from bench.cluster import running
from localai_q import ports
from localai_q.cluster import tickets
from localai_q.config import load_settings, sync
from workers.child import ChildSpec
from workers.identity import Identity
from workers.node.children import Children
from workers.node.digests import Digest
from workers.node.fetcher import Wanted, fetch
from workers.node.sources import Access
from workers.node.store import Store

BLOCK = 1 << 20
PATIENCE = 30.0  # seconds until a server answers
AIM = 0.7  # of the plain server


class Holder:
    """A node's holder of files, as the node runs it."""

    def __init__(self, home: Path, name: str) -> None:
        self.name = name
        self.store = Store(home)
        self._identity = Identity(home / "identity.json")
        self._children = Children(home, lambda *_: None, drain_timeout=1.0)
        self._children.start_holder(ChildSpec(
            node_id=name, node_name=name, redis_url="", lease=5.0, journal_ttl=1.0, journal_max=1, load_stall=300.0,
            status_fd=-1, backends=home, models=home, api_url="http://127.0.0.1:9", identity=self._identity.path,
        ))  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        while not self._children.files():
            if time.monotonic() > deadline:
                raise RuntimeError("the holder does not come up")
            time.sleep(0.05)

    def told(self, sha256: str) -> dict[str, str]:
        """As the API names it."""
        ticket = tickets.issue(self._identity.hash, self.name, sha256, now=time.time())
        address = self._children.files()["files_address"]
        return {"node": self.name, "name": self.name, "url": f"http://{address}/blobs/{sha256}", "ticket": ticket}

    def stop(self) -> None:
        self._children.stop_all(2.0)


class Api:
    """Names these holders."""

    def __init__(self, holders: list[Holder]) -> None:
        self._holders = holders

    def holders(self, sha256: str) -> dict[str, Any]:
        return {"holders": [holder.told(sha256) for holder in self._holders], "stored": False}

    def blame(self, sha256: str, holder_id: str) -> None:
        raise RuntimeError(f"{holder_id} gave wrong bytes")


def lay(store: Store, mib: int) -> str:
    """A file of random bytes in a store; its SHA-256."""
    store.folder.mkdir(parents=True)
    digest, part = Digest(), store.part("new")
    with part.open("wb") as file:
        for _ in range(mib):
            block = os.urandom(BLOCK)
            digest.update(block)
            file.write(block)
    store.keep(part, digest.sha256, digest.beginnings)
    return digest.sha256


@contextmanager
def plain_server(folder: Path) -> Iterator[str]:
    """`python -m http.server`; its URL."""
    port = ports.choose()
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(folder), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while ports.is_free("127.0.0.1", port):
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def download(url: str, target: Path) -> None:
    """Everything behind a URL in a file, unchecked."""
    buffer = memoryview(bytearray(BLOCK))
    with urllib.request.urlopen(url) as response, target.open("wb") as file:
        while count := response.readinto(buffer):
            file.write(buffer[:count])


def hash_of(path: Path) -> None:
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")


def compare(mib: int, rounds: int) -> None:
    """Print MB/s of each way, and what that is of the plain server's."""
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lqstaging")))
        holders = []
        for name in ("one", "two"):
            (root / name).mkdir()
            holders.append(Holder(root / name, name))
            stack.callback(holders[-1].stop)
        sha256 = lay(holders[0].store, mib)
        file = holders[0].store.folder / sha256
        url = stack.enter_context(plain_server(holders[0].store.folder))
        for path in (holders[0].store.folder).glob(f"*{sha256}*"):
            holders[1].store.folder.mkdir(exist_ok=True)
            os.link(path, holders[1].store.folder / path.name)
        target = root / "target"

        def copied() -> None:
            subprocess.run(["cp", str(file), str(target)], check=True)
            sync(target)

        def plainly() -> None:
            download(f"{url}/{sha256}", target)
            sync(target)

        def pulled(givers: list[Holder]) -> Callable[[], None]:
            access = Access(load_settings(disk_spare=0), "http://127.0.0.1:9", "three", "", peers=Api(givers))  # type: ignore[arg-type]

            def work() -> None:
                path = fetch(Wanted(source=f"{url}/none", sha256=sha256), root / "three", access, lambda _: None)
                path.rename(target)

            return work

        ways: dict[str, Callable[[], None]] = {
            "cp": copied, "plain HTTP server": plainly, "a node, verified": pulled(holders[:1]),
            "two nodes, verified": pulled(holders), "SHA-256 alone": lambda: hash_of(file),
        }  # fmt: skip
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, work in ways.items():
                began = time.perf_counter()
                work()
                speeds[name].append(mib * BLOCK / 1e6 / (time.perf_counter() - began))
                target.unlink(missing_ok=True)
        ratios = {name: median(map(truediv, found, speeds["plain HTTP server"])) for name, found in speeds.items()}
        for name, found in speeds.items():
            print(f"{name:20} {median(found):7.0f} MB/s  {ratios[name]:5.2f} of the plain server")
        ratio = ratios["a node, verified"]
        print(
            f"aim: {AIM} of the plain server; load of this machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        )
        print("reached" if ratio >= AIM else "not reached")


def until_ready(mib: int) -> None:
    """Print how long a model of a file of this size takes until it is ready, on a first and on a second node."""
    with tempfile.TemporaryDirectory(prefix="lqstaging") as folder, plain_server(Path(folder)) as url:
        sha256 = lay(Store(Path(folder)), mib)
        with running(2, LOCALAI_Q_ALLOW_PRIVATE_SOURCES="true", LOCALAI_HEARTBEAT_INTERVAL="1") as cluster:
            cluster.add_model("warm", replicas=2, backend="echo")  # so that the backend is installed
            for model, node in (("first", "one"), ("second", "one-2")):
                began = time.perf_counter()
                cluster.add_model(model, backend="echo", source=f"{url}/blobs/{sha256}", sha256=sha256, memory=1 << 20,
                                  selector={"node.name": node})  # fmt: skip
                print(f"{mib} MiB ready on the {model} node after {time.perf_counter() - began:.1f} s")
                time.sleep(3.0)  # until the first node has reported the file


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--mib", type=int, default=512)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--cluster", action="store_true")
    asked = arguments.parse_args()
    compare(asked.mib, asked.rounds)
    if asked.cluster:
        until_ready(asked.mib)


if __name__ == "__main__":
    main()
