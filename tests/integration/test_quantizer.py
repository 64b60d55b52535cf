"""Quantized files made as a node makes them: with the real engine, in processes of their own; and how that is ended."""

import hashlib
import json
import os
import random
import re
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest
from cluster_data import add_model, api_over_http, model_named, ready_node
from file_server import Remote, serve
from gguf_files import PAIRS, embedder, gguf, speaker, split_into, text, value
from waiting import LIMIT, wait_for

from localai_q import gguf as headers
from localai_q import names
from localai_q.bus import journal
from localai_q.cluster.events import Progress, decode
from localai_q.cluster.nodes import Node
from localai_q.cluster.quantizing import FETCHING, KIND, SPANS, TYPES, Order, TensorType, percentage
from localai_q.cluster.states import JobState
from localai_q.config import load_settings, settings
from localai_q.gallery import catalog
from localai_q.services import jobs, nodes, quantizations
from localai_q.services.wiring import Services
from localai_q.store import jobs as job_rows
from localai_q.store import quantizations as rows
from workers.child import ChildSpec
from workers.identity import Identity
from workers.node import leftovers
from workers.node.installer import Kit, install_backend, python_of
from workers.node.jobs import Jobs
from workers.node.sources import Access
from workers.node.wheels import Wheels

pytestmark = pytest.mark.timeout(3600)  # the engine is compiled where it never was

LONG = 170.0  # seconds that work at the lowest priority may take on a crowded machine


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a node's backends, with the engine in it."""
    wheels = Wheels(Access(load_settings(), "", "", ""), cpus=2, progress=lambda _: None)
    root = tmp_path_factory.mktemp("backends")
    install_backend(catalog.backend("llama-cpp"), root, lambda _: None, Kit(wheel=wheels.bring))
    return root


@pytest.fixture(scope="module")
def folder(backends: Path) -> Path:
    return (backends / "llama-cpp" / "current").resolve()


class Quantizer:
    """A node that does what control asks of it, one stage after the other."""

    def __init__(self, services: Services, node: Node, worker: Jobs, models: Path) -> None:
        self.services = services
        self.node = node
        self.worker = worker
        self.models = models

    def begin(self, **order: Any) -> str:
        """Ask for a quantization, and have the backend installed for it; the quantization's id."""
        made = quantizations.create(self.services, Order(**order))["id"]
        nodes.heartbeat(self.services, self.node, hardware={"cpus": 2})
        quantizations.advance(self.services)
        self.stage(made)
        return made

    def stage(self, made: str) -> dict[str, Any]:
        """Do the stage that is under way; how the quantization is then."""
        self.worker.run(self.job(made))
        jobs.apply_ends(self.services)
        quantizations.advance(self.services)
        return quantizations.show(self.services, made)

    def job(self, made: str) -> str:
        return quantizations.show(self.services, made)["job"]

    def make(self, **order: Any) -> dict[str, Any]:
        return self.stage(self.begin(**order))

    def file(self, sha256: str) -> Path:
        return self.models / "blobs" / sha256

    def left(self) -> list[str]:
        """What lies on the node beside whole files, and in the API's store."""
        stored = self.services.settings.home / "files"
        folders = [self.models / "blobs", *([stored] if stored.exists() else [])]
        return sorted(
            path.name for folder in folders for path in folder.iterdir() if "part" in path.name or folder is stored
        )


@pytest.fixture
def node(services: Services, tmp_path: Path, backends: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Quantizer]:
    """A node that has the engine, and as much memory and disk as it needs."""
    monkeypatch.setenv("LOCALAI_Q_DISK_SPARE", "0")
    settings.cache_clear()
    identity, models = Identity(tmp_path / "identity.json"), tmp_path / "models"
    found = ready_node(services, secret=identity.secret())
    with api_over_http(services) as url:
        spec = ChildSpec(
            node_id=found.id, node_name=found.name, redis_url=services.settings.redis_url, lease=5.0, journal_ttl=60.0,
            journal_max=10_000, load_stall=120.0, status_fd=-1, backends=backends, models=models, api_url=url,
            identity=identity.path,
        )  # fmt: skip
        yield Quantizer(services, found, Jobs(spec, identity, tmp_path / "run"), models)
    settings.cache_clear()


@pytest.fixture
def smol(services: Services, weights: Path) -> str:
    add_model(services, "smol", backend="xllamacpp", source=f"file:{weights}", sha256=weights.name,
              size=weights.stat().st_size)  # fmt: skip
    return "smol"


def sha_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def given(path: Path) -> dict[str, str]:
    """A file of the machine, as a file that is asked for."""
    return {"source": f"file:{path}", "sha256": sha_of(path)}


def source(path: Path) -> dict[str, str]:
    """A file of the machine, as what is to be quantized."""
    return {"model": f"file:{path}", "sha256": sha_of(path)}


AGAIN = {"allow_requantize": True}


def test_a_model_becomes_q8_0_and_that_becomes_q4_k_m(node: Quantizer, smol: str, weights: Path) -> None:
    eight = node.make(model=smol, quantization_type="q8_0", extra_options=AGAIN)
    assert eight["status"] == "completed", eight
    made = eight["result"]
    assert (made["source_sha256"], made["source_size"]) == (weights.name, weights.stat().st_size)
    assert made["size"] == node.file(made["sha256"]).stat().st_size == 144811072
    assert sha_of(node.file(made["sha256"])) == made["sha256"]
    assert headers.read_tensors(node.file(made["sha256"])).types == {"f32", "q8_0"}
    assert (round(made["bits_per_weight"], 1), round(made["source_bits_per_weight"], 1)) == (8.5, 5.7)
    assert made["perplexity"] == pytest.approx(made["source_perplexity"], rel=0.02)
    assert 0 < made["kl_divergence"] < 0.03
    assert node.left() == [made["sha256"]], "in the API's store"
    assert_it_only_grows(node.services, SPANS.keys() - {"installing", "downloading", FETCHING})
    quantizations.import_model(node.services, eight["id"], "eight")
    four = node.make(model="eight", quantization_type="q4_k_m", extra_options=AGAIN)
    assert four["status"] == "completed", four
    smaller = four["result"]
    assert smaller["source_perplexity"] == pytest.approx(made["perplexity"], rel=1e-3)
    assert smaller["size"] < made["size"]
    assert made["kl_divergence"] < smaller["kl_divergence"] < 0.5
    assert four["model"] == "eight"


def assert_it_only_grows(services: Services, expected: Collection[str]) -> None:
    """Whatever the last job has said of its progress, the percentage never fell."""
    with services.db.transaction() as db:
        one = rows.every(db)[0]
        job = job_rows.listed(db, kinds=[KIND])[0]
    said = [decode(event["e"]) for _, event in services.redis.xrange(names.journal_key(job.id))]
    stages = [asdict(event) for event in said if isinstance(event, Progress)]
    assert {stage["stage"] for stage in stages} >= expected
    told = [percentage(replace(one, state=JobState.OPEN), stage) for stage in stages]
    assert told == sorted(told)


def in_several(weights: Path, folder: Path) -> list[dict[str, str]]:
    """The model in three files of the machine, the first without tensors."""
    return [given(path) for path in split_into(folder, weights.read_bytes(), 3, bare=True)]


def test_a_model_in_several_files_becomes_the_same_as_in_one(
    node: Quantizer, smol: str, weights: Path, tmp_path: Path
) -> None:
    first, *others = in_several(weights, tmp_path)
    options = {**AGAIN, "prune_layers": list(range(3, 30))}  # with fewer layers it does not take long
    one = node.make(model=smol, quantization_type="q8_0", extra_options=options)["result"]
    add_model(node.services, "split", backend="xllamacpp", **first, parts=others)
    made = node.make(model="split", quantization_type="q8_0", extra_options=options)
    assert made["status"] == "completed", made
    result = made["result"]
    same = ("sha256", "size", "perplexity", "source_perplexity", "kl_divergence", "source_bits_per_weight")
    assert [result[name] for name in same] == [one[name] for name in same]
    sizes = [Path(file["source"].removeprefix("file:")).stat().st_size for file in (first, *others)]
    assert (result["source_sha256"], result["source_size"]) == (first["sha256"], sum(sizes))
    assert_it_only_grows(node.services, {FETCHING})
    asked = {"model": first["source"], "sha256": first["sha256"], "parts": others[::-1], "extra_options": options}
    assert "says that it is file 3" in node.make(**asked, quantization_type="q8_0")["message"]
    assert links(node) == []


def links(node: Quantizer) -> list[Path]:
    """What jobs of the node have left of their temporary folders."""
    return list(Path(tempfile.gettempdir()).glob(f"{leftovers.scratch(node.node.id)}*"))


def embedding_model(folder: Path, **changes: Any) -> dict[str, str]:
    (folder / "e.gguf").write_bytes(embedder(**changes))
    return source(folder / "e.gguf")


def test_a_model_that_embeds_is_compared_by_its_vectors(node: Quantizer, tmp_path: Path) -> None:
    wanted = embedding_model(tmp_path)
    made = {type_: node.make(**wanted, quantization_type=type_) for type_ in ("f32", "q8_0", "q4_k_m", "q2_k")}
    assert {one["status"] for one in made.values()} == {"completed"}, made
    results = [one["result"] for one in made.values()]
    found = [result["cosine_similarity"] for result in results]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(1.0, abs=1e-6)
    assert 0.9 < found[-1] < found[-2] < found[1] < 1.0
    assert {result["texts"] for result in results} == {16}
    assert [round(result["bits_per_weight"]) for result in results[:2]] == [32, 9]
    assert not {"perplexity", "kl_divergence"} & results[0].keys()
    assert_it_only_grows(node.services, {"reading with the source", "reading with the result"})
    quantizations.import_model(node.services, made["q8_0"]["id"], "small")
    assert model_named(node.services, "small").config.embeddings


def test_a_model_that_is_said_to_embed_is_compared_so_too(node: Quantizer, weights: Path) -> None:
    add_model(
        node.services, "vectors", backend="xllamacpp", source=f"file:{weights}", sha256=weights.name, embeddings=True
    )
    one = node.make(model="vectors", quantization_type="q4_k_m", extra_options=AGAIN)
    assert one["status"] == "completed", one
    assert 0.8 < one["result"]["cosine_similarity"] < 0.9999
    assert "perplexity" not in one["result"]


@pytest.mark.parametrize(
    ("changes", "type_", "says"),
    [
        ({"spread": 1e20}, "f32", "the source is of no use: its vectors are no numbers"),
        ({"spread": 1e4}, "f16", "the result is of no use: its vectors are no numbers"),
        ({"bert.pooling_type": 4}, "q8_0", "the source ranks documents"),
    ],
)
def test_vectors_that_cannot_be_compared_fail_it(
    node: Quantizer, tmp_path: Path, changes: dict, type_: str, says: str
) -> None:
    one = node.make(**embedding_model(tmp_path, **changes), quantization_type=type_)
    assert (one["status"], one["failures"]) == ("failed", []), one
    assert says in one["message"]
    assert node.left() == []


def test_a_model_that_knows_nothing_fails_it_at_once(node: Quantizer, tmp_path: Path) -> None:
    (tmp_path / "s.gguf").write_bytes(speaker(2.0))
    one = node.make(**source(tmp_path / "s.gguf"), quantization_type="f16")
    assert (one["status"], one["failures"]) == ("failed", []), one
    assert re.search(r"the source is of no use: its perplexity is [0-9.]+e\+[0-9]+$", one["message"]), one


def test_vectors_are_made_as_the_model_says(node: Quantizer, tmp_path: Path) -> None:
    (tmp_path / "e.gguf").write_bytes(embedder())
    made = {}
    for pooling in ("mean", "cls", "none"):
        options = (f"pooling:{pooling}",)
        add_model(
            node.services, pooling, backend="xllamacpp", **given(tmp_path / "e.gguf"), embeddings=True, options=options
        )
        made[pooling] = node.make(model=pooling, quantization_type="q4_0")
    mean, cls = (made[pooling]["result"]["cosine_similarity"] for pooling in ("mean", "cls"))
    assert 0.9 < cls < mean, "what many tokens make of it hides the errors of one"
    assert "pooling 'none' is none of mean, cls, last" in made["none"]["message"]


def test_what_the_library_can_be_told(node: Quantizer, smol: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("It was the best of times, it was the worst of times. " * 8)
    options = {**AGAIN, "token_embedding_type": "q5_0", "tensor_types": {"blk.0.attn_q": "q4_1"}}
    made = node.make(model=smol, quantization_type="q8_0", extra_options=options, text=given(tmp_path / "text"))[
        "result"
    ]
    assert headers.read_tensors(node.file(made["sha256"])).types == {"f32", "q8_0", "q5_0", "q4_1"}
    assert 32 < made["tokens"] < 200


def test_a_text_may_be_any_bytes(node: Quantizer, smol: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(random.Random(1).randbytes(100_000))
    made = node.make(model=smol, quantization_type="q8_0", extra_options=AGAIN, text=given(tmp_path / "text"))
    assert made["result"]["tokens"] == 256


def dat(entries: dict[str, list[float]]) -> bytes:
    """An importance matrix in the older form, of two chunks."""
    found = struct.pack("<i", len(entries))
    for name, values in entries.items():
        doubled = [2 * value for value in values]
        found += struct.pack("<i", len(name)) + name.encode()
        found += struct.pack(f"<ii{len(values)}f", 2, len(values), *doubled)
    return found


def matrix(entries: dict[str, list[float]]) -> bytes:
    """The same as GGUF: sums of four, and how many these were."""
    tensors = {}
    for name, values in entries.items():
        tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"] = [4 * value for value in values], [4.0]
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1) + text("general.type") + value("imatrix")
    data = b""
    for name, values in tensors.items():
        header += text(name) + struct.pack("<IQIQ", 1, len(values), 0, len(data))
        data += struct.pack(f"<{len(values)}f", *values)
        data += bytes(-len(data) % 32)
    return header + bytes(-len(header) % 32) + data


ROWS = {"blk.0.ffn_down.weight": [1.0, 2.5, 0.25], "output.weight": [3.0]}
READ = "import sys, imatrix; print([(row.name, list(row.data[: row.size])) for row in imatrix.read(imatrix.Path(sys.argv[1]))[:-1]])"


def in_backend(folder: Path, code: str, *arguments: str) -> str:
    """What code that runs in the backend's folder prints, or how it ends."""
    done = subprocess.run(
        [python_of(folder), "-c", code, *arguments], cwd=folder, capture_output=True, text=True, timeout=LONG
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("write", [dat, matrix])
def test_both_forms_of_an_importance_matrix_say_the_same(
    folder: Path, tmp_path: Path, write: Callable[..., bytes]
) -> None:
    (tmp_path / "m").write_bytes(write(ROWS))
    found = in_backend(folder, READ, str(tmp_path / "m"))
    assert found == str([(name.encode(), values) for name, values in ROWS.items()])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is cut off"),
        (b"\x01\x00\x00\x00", "it is cut off"),
        (struct.pack("<i", -5), "it claims -5 entries"),
        (struct.pack("<ii", 1, 1 << 30), "a name of 1073741824 bytes"),
        (dat(ROWS)[:-2], "it is cut off"),
        (dat({"a": [float("nan")]}), "are no numbers"),
        (matrix(ROWS)[:-40], "it is cut off"),
        (b"GGUF" + bytes(30), "no whole GGUF file"),
        (matrix({}), "says nothing of any tensor"),
    ],
)
def test_what_is_no_importance_matrix_is_refused(folder: Path, tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "m").write_bytes(content)
    assert says in in_backend(folder, READ, str(tmp_path / "m"))


def test_a_type_that_needs_an_importance_matrix_is_made_with_one(node: Quantizer, smol: str, tmp_path: Path) -> None:
    tensors = {f"blk.{layer}.{name}.weight": [1.0] * (1536 if name == "ffn_down" else 576) for layer in range(30)
               for name in ("ffn_down", "ffn_up", "ffn_gate", "attn_q", "attn_k", "attn_v", "attn_output")}  # fmt: skip
    (tmp_path / "m").write_bytes(dat(tensors))
    options = {**AGAIN, "imatrix": given(tmp_path / "m"), "prune_layers": list(range(8, 30))}
    one = node.make(model=smol, quantization_type="q2_k_s", extra_options=options)
    assert one["status"] == "completed", one
    file = node.file(one["result"]["sha256"])
    assert "q2_k" in headers.read_tensors(file).types
    assert headers.read_facts(file).blocks == 8


def test_every_type_is_known_to_the_library(folder: Path) -> None:
    code = "import sys, quantize; print(*map(quantize.file_type, sys.argv[1].split()), *map(quantize.tensor_type, sys.argv[2].split()))"
    found = in_backend(folder, code, " ".join(TYPES), " ".join(get_args(TensorType)))
    assert len(found.split()) == len(TYPES) + len(get_args(TensorType)), found


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (b"no model", AGAIN, "no usable GGUF file"),
        (gguf()[:100], AGAIN, "no usable GGUF file"),
        (gguf({**PAIRS, "split.count": 3}), AGAIN, "one of 3, and the others are missing"),
        (gguf(), {}, "cannot be quantized: "),
    ],
)
def test_a_file_that_is_no_model_fails_with_the_reason(
    node: Quantizer, tmp_path: Path, content: bytes, options: dict, says: str
) -> None:
    (tmp_path / "m").write_bytes(content)
    one = node.make(**source(tmp_path / "m"), extra_options=options)
    assert (one["status"], one["failures"]) == ("failed", [])
    assert says in one["message"]
    assert node.left() == []


def test_a_file_that_this_node_does_not_have_may_lie_on_another(node: Quantizer, tmp_path: Path) -> None:
    one = node.make(model=f"file:{tmp_path}/m", sha256="0" * 64)
    assert one["state"] == "open"
    assert "this node has no such file" in one["failures"][0]["reason"]


def test_what_is_quantized_already_is_so_again_only_where_that_is_allowed(node: Quantizer, smol: str) -> None:
    one = node.make(model=smol)
    assert one["status"] == "failed"
    assert "quantized already (q4_1, q8_0), which loses more" in one["message"]
    assert "give allow_requantize" in one["message"]


@pytest.mark.parametrize("content", ["Too short.", " " * 10_000])
def test_a_text_that_is_too_short_says_so(node: Quantizer, smol: str, tmp_path: Path, content: str) -> None:
    (tmp_path / "text").write_text(content)
    one = node.make(model=smol, quantization_type="q8_0", extra_options=AGAIN, text=given(tmp_path / "text"))
    assert one["status"] == "failed"
    assert "tokens, and 32 are needed" in one["message"]
    assert node.left() == []


def quantizers() -> list[psutil.Process]:
    """The processes of this test that quantize."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "quantize.py" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def reaches(node: Quantizer, job_id: str, stage: str) -> Callable[[], bool]:
    def told() -> bool:
        event = journal.latest(node.services.redis, [job_id]).get(job_id)
        return isinstance(event, Progress) and event.stage == stage and event.done > 0

    return told


@pytest.mark.parametrize(
    ("stage", "type_"),
    [("quantizing", "iq3_s"), ("reading with the result", "q8_0")],
)
def test_stopped_at_any_stage_it_leaves_no_file_and_no_process(
    node: Quantizer, smol: str, stage: str, type_: str
) -> None:
    made = node.begin(model=smol, quantization_type=type_, extra_options=AGAIN)
    job_id = node.job(made)
    working = threading.Thread(target=node.worker.run, args=(job_id,))
    working.start()
    assert wait_for(reaches(node, job_id, stage), LONG), stage
    assert quantizers()
    assert quantizations.stop(node.services, made)["status"] == "stopped"
    working.join(LIMIT)
    assert wait_for(lambda: not quantizers())
    assert node.left() == []


def test_stopped_in_the_middle_nothing_is_left_of_a_source_in_several_files(
    node: Quantizer, weights: Path, tmp_path: Path
) -> None:
    first, *others = in_several(weights, tmp_path)
    made = node.begin(model=first["source"], sha256=first["sha256"], parts=others, quantization_type="iq3_s",
                      extra_options=AGAIN)  # fmt: skip
    job_id = node.job(made)
    working = threading.Thread(target=node.worker.run, args=(job_id,))
    working.start()
    assert wait_for(reaches(node, job_id, "quantizing"), LONG)
    assert [len(list(folder.glob("*/*.gguf"))) for folder in links(node)] == [3]
    quantizations.stop(node.services, made)
    working.join(LIMIT)
    assert wait_for(lambda: not quantizers())
    assert (node.left(), links(node)) == ([], [])


@pytest.mark.parametrize("behind", [0, 1])
def test_stopped_while_its_source_comes_it_leaves_nothing_of_that(
    node: Quantizer, monkeypatch: pytest.MonkeyPatch, behind: int
) -> None:
    monkeypatch.setenv("LOCALAI_Q_ALLOW_PRIVATE_SOURCES", "true")
    content = gguf() + bytes(1 << 22)
    slow, first = hashlib.sha256(content).hexdigest(), hashlib.sha256(gguf()).hexdigest()
    with serve() as server:
        server.put("/m-00001-of-00002.gguf", Remote(gguf()))
        url = server.put("/m-00002-of-00002.gguf" if behind else "/m.gguf", Remote(content, pause=0.5))
        order = {"model": url.replace("00002-of", "00001-of"), "sha256": first if behind else slow}
        made = node.begin(**order, parts=[{"sha256": slow}] * behind, extra_options=AGAIN)
        job_id = node.job(made)
        working = threading.Thread(target=node.worker.run, args=(job_id,))
        working.start()
        assert wait_for(reaches(node, job_id, FETCHING if behind else "downloading"), LONG)
        assert wait_for(node.left)
        quantizations.stop(node.services, made)
        working.join(30)
    assert node.left() == []


def test_a_quantizer_that_dies_is_tried_again_later_and_leaves_nothing(node: Quantizer, smol: str) -> None:
    made = node.begin(model=smol, quantization_type="iq3_s", extra_options=AGAIN)
    job_id = node.job(made)
    working = threading.Thread(target=node.worker.run, args=(job_id,))
    working.start()
    assert wait_for(reaches(node, job_id, "quantizing"), LONG)
    quantizers()[0].kill()
    working.join(LIMIT)
    jobs.apply_ends(node.services)
    quantizations.advance(node.services)
    one = quantizations.show(node.services, made)
    assert (one["state"], [failure["reason"] for failure in one["failures"]]) == (
        "open", ["the quantizer ended with exit code -9"],
    )  # fmt: skip
    assert node.left() == []


def test_a_quantizer_ends_with_whoever_has_started_it(folder: Path, weights: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([python_of(folder), "quantize.py"], cwd=folder, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    order = {"source": str(weights), "result": str(tmp_path / "r"), "type": "iq3_s", "threads": 1, "text": None,
             "embeddings": False, "pooling": None, "options": AGAIN}  # fmt: skip
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    assert "progress" in json.loads(process.stdout.readline())
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
    process.stdin.close()
    assert process.wait(LIMIT) == 1
    process.stdout.close()
