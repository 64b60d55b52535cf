"""What one node has, the next one has from it: whatever becomes of its source, of a holder, of a byte, or of the disk."""

import hashlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from e2e_cluster import Cluster, processes_of, until
from small_disks import fill, small_disk

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from file_server import FileServer, Remote, serve
from gguf_files import projector, split

PIECE = 8 << 20
CONTENT, OTHER, THIRD = os.urandom(20 << 20), os.urandom(20 << 20), os.urandom(20 << 20)
PULSE = 0.02  # seconds for which a process that is to be caught in the middle may run


@pytest.fixture(scope="module")
def source() -> Iterator[FileServer]:
    with serve() as found:
        yield found


@pytest.fixture(scope="module")
def nodes(homes: Path) -> Iterator[Cluster]:
    """A cluster of three nodes; the third one's models lie on a disk of 200 MiB, where one can be mounted."""
    found = Cluster(
        homes / "sharing", "--no-model", "--nodes", "3", LOCALAI_HEARTBEAT_INTERVAL="1", LOCALAI_Q_DISK_SPARE="0",
        LOCALAI_Q_ALLOW_PRIVATE_SOURCES="true",
    )  # fmt: skip
    with ExitStack() as stack:
        with suppress(pytest.skip.Exception):
            stack.enter_context(small_disk(models_of(found, "alpha-3"), 200))
        stack.callback(found.kill)
        found.start()
        yield found
        found.stop()


def models_of(nodes: Cluster, node: str) -> Path:
    return nodes.home / "worker" / "nodes" / node / "models"


def blob(nodes: Cluster, node: str, content: bytes) -> Path:
    return models_of(nodes, node) / "blobs" / hashlib.sha256(content).hexdigest()


def add(nodes: Cluster, model: str, node: str, url: str, content: bytes, backend: str = "echo") -> None:
    """A model of that file for that node."""
    nodes.cli("models", "add", model, "--backend", backend, "--source", url, "--sha256",
              hashlib.sha256(content).hexdigest(), "--memory", "300000000" if backend != "echo" else "1000000",
              "--selector", f"node.name={node}")  # fmt: skip


def reported(nodes: Cluster, node: str, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() in nodes.node(node)["hardware"].get("files", [])


def answers(nodes: Cluster, model: str) -> str:
    return nodes.say("hello", model=model, max_tokens=8).choices[0].message.content


def fetched(nodes: Cluster, node: str) -> list[str]:
    return [job["state"] for job in nodes.jobs(kind="fetch_model") if job["node"] == node]


@contextmanager
def standing_still(pids: list[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def in_the_middle(nodes: Cluster, part: Path, size: int) -> Iterator[None]:
    """A fetch stands still while some of the file has come, and not all."""
    until(part.exists, 60, "the begin of the fetch")
    pids = nodes.pids("workers.node.job_child")
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        with standing_still(pids):
            if part.exists() and PIECE <= part.stat().st_size < size:
                yield
                return
            assert part.exists(), "it was faster than this looked"
        time.sleep(PULSE)
    pytest.fail("the fetch was not seen in its middle")


def processes_of_node(nodes: Cluster, name: str) -> list[psutil.Process]:
    found = []
    for process in processes_of(nodes.home):
        with suppress(psutil.Error):
            if process.environ().get("LOCALAI_NODE_NAME") == name and "celery" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_the_second_node_has_a_file_from_the_first_while_its_source_is_gone(nodes: Cluster, source: FileServer) -> None:
    url = source.put("/m.gguf", Remote(CONTENT))
    add(nodes, "first", "alpha", url, CONTENT)
    assert answers(nodes, "first")
    source.files.clear()
    until(lambda: reported(nodes, "alpha", CONTENT), 60, "the report of the file")
    assert nodes.node("alpha")["hardware"]["files_address"].startswith("127.0.0.1:")
    add(nodes, "second", "alpha-2", url, CONTENT)
    assert answers(nodes, "second")
    assert len(list(nodes.home.glob(f"**/blobs/{blob(nodes, 'alpha', CONTENT).name}"))) == 2
    assert all(blob(nodes, node, CONTENT).read_bytes() == CONTENT for node in ("alpha", "alpha-2"))
    assert fetched(nodes, "alpha-2") == ["done"]


def test_a_byte_that_went_wrong_at_a_holder_is_refused_and_comes_from_elsewhere(
    nodes: Cluster, source: FileServer
) -> None:
    url = source.put("/other.gguf", Remote(OTHER))
    add(nodes, "wrong", "alpha", url, OTHER)
    assert answers(nodes, "wrong")
    until(lambda: reported(nodes, "alpha", OTHER), 60, "the report of the file")
    with blob(nodes, "alpha", OTHER).open("r+b") as file:
        file.seek(PIECE + 5)
        file.write(bytes([OTHER[PIECE + 5] ^ 1]))
    add(nodes, "right", "alpha-2", url, OTHER)
    assert answers(nodes, "right")
    assert blob(nodes, "alpha-2", OTHER).read_bytes() == OTHER
    assert source.ranges()[-1].startswith("bytes="), "the source goes on where the holder is left"


def test_a_holder_that_is_killed_in_the_middle_is_replaced_and_the_model_chats(
    nodes: Cluster, source: FileServer, weights: Path
) -> None:
    content = weights.read_bytes()
    url = source.put("/smollm2.gguf", Remote(content))
    for model, node in (("held", "alpha"), ("held-too", "alpha-2")):
        add(nodes, model, node, url, content)
        assert answers(nodes, model)
        until(lambda node=node: reported(nodes, node, content), 60, "the report of the file")
    source.files.clear()
    add(nodes, "chats", "alpha-3", url, content, backend="xllamacpp")
    part = blob(nodes, "alpha-3", content).with_name(f".{blob(nodes, 'alpha-3', content).name}.part")
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(answers, nodes, "chats")
        with standing_still([nodes.process.pid]):  # it would start the node again
            with in_the_middle(nodes, part, len(content)):
                for process in processes_of_node(nodes, "alpha"):
                    process.kill()
            until(lambda: blob(nodes, "alpha-3", content).exists(), 60, "the whole file")
        assert said.result()
    assert hashlib.sha256(blob(nodes, "alpha-3", content).read_bytes()).hexdigest() == weights.name
    assert fetched(nodes, "alpha-3") == ["done"]


def test_where_the_only_holder_is_killed_the_source_goes_on(nodes: Cluster, source: FileServer) -> None:
    content = os.urandom(96 << 20)
    url = source.put("/alone.gguf", Remote(content))
    add(nodes, "alone", "alpha", url, content)
    until(lambda: nodes.node("alpha")["state"] == "ready", 60, "the node that was killed before")
    assert answers(nodes, "alone")
    until(lambda: reported(nodes, "alpha", content), 60, "the report of the file")
    source.seen.clear()
    add(nodes, "follows", "alpha-2", url, content)
    whole = blob(nodes, "alpha-2", content)
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(answers, nodes, "follows")
        with standing_still([nodes.process.pid]):  # it would start the holder again
            with in_the_middle(nodes, whole.with_name(f".{whole.name}.part"), len(content)):
                for process in processes_of_node(nodes, "alpha"):
                    process.kill()
            until(whole.exists, 60, "the whole file")
        assert said.result()
    assert whole.read_bytes() == content
    (asked,) = source.ranges()
    assert int(asked.removeprefix("bytes=").removesuffix("-")) >= PIECE


def test_a_model_in_several_files_comes_from_the_first_node_to_the_second_and_says_on_both_what_the_whole_one_does(
    nodes: Cluster, source: FileServer, weights: Path
) -> None:
    parts = split(weights.read_bytes(), 3, bare=True)
    digests = [hashlib.sha256(part).hexdigest() for part in parts]
    whole = source.put("/whole.gguf", Remote(weights.read_bytes()))
    first, *_ = [source.put(f"/split-0000{number}-of-00003.gguf", Remote(part)) for number, part in enumerate(parts, 1)]
    told = [word for digest in digests for word in ("--sha256", digest)]
    said = []
    until(lambda: nodes.node("alpha")["state"] == "ready", 60, "the node that was killed before")
    for model, node, at in (("whole", "alpha", [whole, "--sha256", weights.name]), ("split", "alpha", [first, *told]),
                            ("split-too", "alpha-2", [first, *told])):  # fmt: skip
        nodes.cli("models", "add", model, "--selector", f"node.name={node}", "--memory", "300000000", "--source", *at)
        said.append(nodes.say("Name a river.", model=model, max_tokens=12, temperature=0).choices[0].message.content)
        if model == "split":
            until(lambda: all(reported(nodes, "alpha", part) for part in parts), 60, "the report of the files")
            source.files.clear()
        assert not list(nodes.home.glob("worker/nodes/*/run/*.gguf"))
    assert said[0] == said[1] == said[2]
    assert all(blob(nodes, "alpha-2", part).read_bytes() == part for part in parts)
    assert fetched(nodes, "alpha-2")[0] == "done"
    facts = nodes.http.get("/api/models/vram-estimate/split").json()
    assert facts["size_bytes"] == sum(map(len, parts))
    for model in ("whole", "split", "split-too"):
        nodes.cli("models", "remove", model)


def test_a_projector_comes_with_its_model_and_is_loaded_with_it(
    nodes: Cluster, source: FileServer, weights: Path
) -> None:
    eyes, wrong = projector(576), projector(512)
    told = [{"source": source.put(f"/{len(each)}.gguf", Remote(each)), "sha256": hashlib.sha256(each).hexdigest()}
            for each in (eyes, wrong)]  # fmt: skip
    model = {"name": "sees", "source": source.put("/blind.gguf", Remote(weights.read_bytes())), "sha256": weights.name,
             "mmproj": told[0], "selector": {"node.name": "alpha-2"}, "memory": 300_000_000}  # fmt: skip
    nodes.http.post("/api/models", json=model).raise_for_status()
    assert answers(nodes, "sees")
    assert blob(nodes, "alpha-2", eyes).read_bytes() == eyes
    nodes.http.post("/api/models", json={**model, "name": "squints", "mmproj": told[1]}).raise_for_status()
    body = {"model": "squints", "messages": [{"role": "user", "content": "hello"}]}
    refused = nodes.http.post("/v1/chat/completions", json=body)
    assert (refused.status_code, f"MMProj {blob(nodes, 'alpha-2', wrong)}" in refused.text) == (503, True), refused.text
    for name in ("sees", "squints"):
        nodes.cli("models", "remove", name)


def test_a_node_whose_disk_is_full_says_what_is_missing_serves_on_and_tries_again(
    nodes: Cluster, source: FileServer
) -> None:
    models = models_of(nodes, "alpha-3")
    if not models.is_mount():
        pytest.skip("a small disk cannot be mounted here, which takes root's rights")
    ballast = fill(models, leaving=10 << 20)
    url = source.put("/third.gguf", Remote(THIRD))
    add(nodes, "third", "alpha-3", url, THIRD)
    body = {"model": "third", "messages": [{"role": "user", "content": "hello"}]}
    refused = nodes.http.post("/v1/chat/completions", json=body)
    assert (refused.status_code, "needs 20 MiB and 1 MiB to spare" in refused.text) == (503, True), refused.text
    assert not list(models.glob("blobs/.*part*"))
    assert answers(nodes, "chats")
    ballast.unlink()
    until(lambda: nodes.http.post("/v1/chat/completions", json=body).status_code == 200, 120, "an answer of the model")
    assert blob(nodes, "alpha-3", THIRD).read_bytes() == THIRD
