"""Quantizations: what can be asked for, on which node one goes, what becomes of it, and how it is told. Pure.

A quantization is a wish for a file, which stays until it is fulfilled, stopped or has failed for good. On its way it has
one job after the other on one node: the backend is installed, then the file is made. Where that fails it begins again,
elsewhere if it can.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from localai_q.cluster.builds import Build, suitable
from localai_q.cluster.builds import choose as build_for
from localai_q.cluster.capacity import Site, disk_free, disk_spare, human, is_silent
from localai_q.cluster.events import LARGEST as LARGEST_AMOUNT
from localai_q.cluster.events import Progress
from localai_q.cluster.fleet import Fleet
from localai_q.cluster.jobs import Job
from localai_q.cluster.models import LARGEST, SHA256, File, ModelConfig, ModelName
from localai_q.cluster.nodes import on_nodes
from localai_q.cluster.parts import MOST_FILES, whole
from localai_q.cluster.sources import MOST_MIRRORS
from localai_q.cluster.states import JobState, NodeState

KIND = "quantize"  # of the job that makes the file
CAPABILITY = "quantize"  # of a backend that can
SIMILARITY = "cosine_similarity"  # what a result tells of itself whose source embeds
MOST = 1000  # quantizations that are remembered, for each may keep a file
MOST_ATTEMPTS = 4
FIRST_PAUSE = 30.0  # seconds before a node on which it failed is tried again; each further time twice as long
FOR_GOOD = ("InvalidValue", "NotFound", "Forbidden", "UnsupportedByModel")  # errors that no other node has not

BUFFERS = 1 << 30  # bytes of RAM that the quantizer takes, beside a file that it has loaded
LEAST_BITS = 4.0  # for each weight of a source that is quantized already; others have 16
BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5}  # for each weight of a result
OTHER_BITS = 7.0  # at most, with the tensors that are not quantized so far

Quantized = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0",
    "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "q2_k_s", "iq4_nl", "iq4_xs", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs", "iq2_m",
    "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s", "tq2_0", "tq1_0", "q2_0", "mxfp4_moe",
]  # fmt: skip
TensorType = Literal[
    "f32", "f16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k", "q2_k", "iq4_nl", "iq4_xs",
    "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s",
]  # fmt: skip
TYPES: tuple[Quantized, ...] = get_args(Quantized)
WITH_IMATRIX: frozenset[Quantized] = frozenset({"iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s", "q2_k_s"})


class Part(File):
    """A file of what is quantized."""

    mirrors: tuple[Annotated[str, Field(max_length=2000)], ...] = Field((), max_length=MOST_MIRRORS)


class Source(Part):
    """What is quantized: its file, or the first of several."""

    parts: tuple[Part, ...] = Field((), max_length=MOST_FILES - 1)  # the files behind the first

    @classmethod
    def of(cls, config: ModelConfig) -> Source:
        """The own files of a model that has some."""
        first, *others = [{**file.model_dump(), "mirrors": config.mirrors_of(number)}
                          for number, file in enumerate(config.own)]  # fmt: skip
        return cls.model_validate({**first, "parts": others})

    @property
    def files(self) -> tuple[Part, ...]:
        """All its files, in their order."""
        return (self, *self.parts)

    @property
    def whole_size(self) -> int:
        """Bytes of all its files, as far as they are known."""
        return sum(file.size for file in self.files)


class Options(BaseModel):
    """What the library's quantizer can be told besides the type of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    imatrix: File | None = None  # which columns of the weights matter most
    output_tensor_type: TensorType | None = None
    token_embedding_type: TensorType | None = None
    tensor_types: dict[Annotated[str, StringConstraints(min_length=1, max_length=200)], TensorType] = Field(
        default_factory=dict, max_length=256
    )  # by a pattern of the tensor's name
    prune_layers: tuple[Annotated[int, Field(ge=0, lt=1 << 16)], ...] = Field((), max_length=1024)
    allow_requantize: bool = False  # the source may be quantized already
    quantize_output_tensor: bool = True
    pure: bool = False  # every tensor gets the same type


Figure = Annotated[float, Field(ge=0, le=LARGEST_AMOUNT, allow_inf_nan=False)]


class OrderedPart(BaseModel):
    """What is said of a file behind the first, of a source in several; without a source, it is called like the first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field("", max_length=2000)
    sha256: str | None = Field(None, pattern=SHA256)
    size: int = Field(0, ge=0)


class Order(BaseModel):
    """What is asked for. LocalAI's names, where it has them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, max_length=2000)  # the name of a model, or a source
    mirrors: tuple[Annotated[str, Field(max_length=2000)], ...] = Field((), max_length=MOST_MIRRORS)  # of a source
    sha256: str | None = Field(None, pattern=SHA256)  # of a source
    size: int = Field(0, ge=0)  # bytes of a source; 0: not known
    parts: tuple[OrderedPart, ...] = Field((), max_length=MOST_FILES - 1)  # of a source in several files
    quantization_type: Quantized = "q4_k_m"
    backend: str = Field("", max_length=64)  # empty: the first that can
    name: ModelName | None = None  # of the model that the result becomes; None: made of the source's and the type
    text: File | None = None  # what is read to compare the result with its source; None: one that the backend brings
    extra_options: Options = Field(default_factory=Options)

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Order:
        if self.quantization_type in WITH_IMATRIX and not self.extra_options.imatrix:
            raise ValueError(f"{self.quantization_type} needs an importance matrix: give extra_options.imatrix")
        return self


class Spec(BaseModel):
    """What is to be made of what."""

    model_config = ConfigDict(frozen=True)

    source: Source
    quantization_type: Quantized
    backend: str
    entry: dict[str, Any] | None = None  # of the backend, where a gallery has it
    text: File | None = None
    options: Options = Field(default_factory=Options)
    model: str = ""  # the name of the model that the source is of
    config: ModelConfig = Field(default_factory=ModelConfig)  # what a model that is made of the result begins with

    @property
    def pooling(self) -> str | None:
        """How the model makes its vectors, where that is said."""
        return dict(option.split(":", 1) for option in self.config.options if ":" in option).get("pooling")


class Made(BaseModel):
    """What a node says of the file that it has made, and of the source."""

    model_config = ConfigDict(frozen=True)

    sha256: str = Field(pattern=SHA256)
    size: int = Field(gt=0, le=LARGEST)
    source_sha256: str = Field(pattern=SHA256)
    source_size: int = Field(gt=0, le=LARGEST)
    architecture: str = Field(max_length=256)
    bits_per_weight: Figure
    source_bits_per_weight: Figure

    @staticmethod
    def told(result: Mapping[str, Any]) -> Made:
        """What a node says, by what it has compared. Raises pydantic's `ValidationError`."""
        return (ComparedByVectors if SIMILARITY in result else ComparedByText).model_validate(result)


class ComparedByText(Made):
    """A file that generates text, as its source does. Both have read the same."""

    perplexity: Figure
    source_perplexity: Figure
    kl_divergence: Figure  # nats
    tokens: int = Field(ge=0, le=LARGEST)


class ComparedByVectors(Made):
    """A file that embeds, as its source does. Both have made vectors of the same texts."""

    cosine_similarity: float = Field(ge=-1, le=1, allow_inf_nan=False)
    texts: int = Field(gt=0, le=LARGEST)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An attempt that failed."""

    node_id: str
    reason: str
    until: float  # seconds since the epoch; before that, its node is not tried again


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """A quantization, as its row tells it."""

    id: str
    name: str
    state: JobState
    spec: Spec
    node_id: str | None = None  # on which it is, or was made
    job_id: str | None = None  # of the stage that is under way
    failures: tuple[Failure, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)  # why not there, by the node's name, while it waits
    output: str | None = None  # the SHA-256 of what has come to the API's store
    result: dict[str, Any] | None = None  # `Made`, once it is done
    error: str = ""
    imported: str = ""  # the name of the model that was made of it
    created: float = 0.0  # seconds since the epoch
    ended: float | None = None

    @property
    def files(self) -> frozenset[str]:
        """The SHA-256 of all files that it needs."""
        spec = self.spec
        wanted = [*spec.source.files, spec.text, spec.options.imatrix] if self.state is JobState.OPEN else []
        return frozenset(filter(None, [self.output, *(file.sha256 for file in wanted if file)]))


class Step(StrEnum):
    """What to do about a quantization now."""

    WAIT = "wait"
    PLACE = "place"  # find it a node, and have that install the backend
    QUANTIZE = "quantize"  # have its node make the file
    DONE = "done"
    CANCELLED = "cancelled"
    AGAIN = "again"  # the attempt has failed
    FAIL = "fail"  # it will always fail


def next_step(one: Quantization, job: Job | None) -> Step:
    """The step, given the job of the stage that is under way."""
    if one.state is not JobState.OPEN:
        return Step.WAIT
    if one.job_id is None:
        return Step.PLACE
    if job is None:
        return Step.AGAIN
    match job.state:
        case JobState.DONE:
            return Step.DONE if job.kind == KIND else Step.QUANTIZE
        case JobState.CANCELLED:
            return Step.CANCELLED
        case JobState.FAILED:
            hopeless = job.kind == KIND and (job.error or {}).get("error") in FOR_GOOD
            return Step.FAIL if hopeless or len(one.failures) + 1 >= MOST_ATTEMPTS else Step.AGAIN
    return Step.WAIT


def failure(one: Quantization, node_id: str, reason: str, now: float) -> Failure:
    """The attempt that failed there now. `now`: seconds since the epoch."""
    before = sum(each.node_id == node_id for each in one.failures)
    return Failure(node_id=node_id, reason=reason, until=now + FIRST_PAUSE * 2**before)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Where a quantization goes."""

    node_id: str | None  # None: it waits
    threads: int = 0  # that it may use there
    reasons: dict[str, str]  # why not there, by the node's name


def choose(one: Quantization, fleet: Fleet, builds: Collection[Build], working: Collection[str]) -> Choice:
    """The node that has the file rather than not, and the least to do of those that it would not starve.

    Args:
        builds: of the backend.
        working: the ids of nodes that work on another quantization.
    """
    there = on_nodes(fleet.replicas)
    sites = [Site(node, there[node.id]) for node in fleet.nodes]
    idle = {site.node.id: _idle_cores(site, fleet) for site in sites}
    reasons = {site.node.id: _unfit(one, site, fleet, builds, working, idle[site.node.id]) for site in sites}
    fit = [site for site in sites if not reasons[site.node.id]]
    best = min(fit, key=lambda site: _rank(one, site, fleet, idle[site.node.id]), default=None)
    told = {site.node.name: reasons[site.node.id] or "would do, too" for site in sites if site is not best}
    if best is None:
        return Choice(node_id=None, reasons=told)
    return Choice(node_id=best.node.id, threads=idle[best.node.id], reasons=told)


def result_size(spec: Spec) -> int:
    """Bytes that the result takes at most; 0 where nothing is known of the source."""
    before = LEAST_BITS if spec.options.allow_requantize else 16.0
    return int(spec.source.whole_size * BITS.get(spec.quantization_type, OTHER_BITS) / before)


def default_name(model: str, quantization_type: str) -> str:
    """A name for the result of a model's name or a source."""
    last = re.split(r"[/#]", re.sub(r"(@|\?).*", "", model).rstrip("/"))[-1]
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", whole(last).removesuffix(".gguf")).strip("-._") or "model"
    return f"{plain[:100]}-{quantization_type}"


def _unfit(
    one: Quantization, site: Site, fleet: Fleet, builds: Collection[Build], working: Collection[str], idle: int
) -> str:
    """Why it cannot go there; empty if it can."""
    node, spec = site.node, one.spec
    if node.state is not NodeState.READY:
        return str(node.state)
    if is_silent(node, fleet.now, fleet.patience):
        return f"has not reported for {fleet.patience:.0f} s"
    if build_for(builds, node.hardware) is None:
        return f"has {', '.join(suitable(node.hardware))}, and {spec.backend} is made for {', '.join(builds)}"
    failed = [each for each in one.failures if each.node_id == node.id]
    if failed and fleet.now < failed[-1].until:
        return f"failed: {failed[-1].reason}"
    if node.id in working:
        return "works on another quantization"
    size = spec.source.whole_size
    coming = sum(file.size for file in _lacking(spec.source, site))
    needed, disk = coming + result_size(spec) + disk_spare(node, size), disk_free(node)
    if needed > disk:
        return f"needs {human(needed)} of disk, {human(disk)} free"
    memory, free = max(size, result_size(spec)) + BUFFERS, max(site.free.ram, 0)
    if memory > free:
        return f"needs {human(memory)}, {human(free)} free"
    if idle < 1:
        return f"has no idle core: {_requests(site, fleet)} requests are at work there"
    return ""


def _rank(one: Quantization, site: Site, fleet: Fleet, idle: int) -> tuple[int, bool, int, int, int, str]:
    failed = sum(each.node_id == site.node.id for each in one.failures)
    lacking = len(_lacking(one.spec.source, site))
    return (failed, _requests(site, fleet) > 0, lacking, -idle, len(site.there), site.node.name)


def _lacking(source: Source, site: Site) -> list[Part]:
    """The files of the source that are not there."""
    return [file for file in source.files if file.sha256 not in site.files]


def _requests(site: Site, fleet: Fleet) -> int:
    return sum(fleet.busy.get(replica.id, 0) for replica in site.there)


def _idle_cores(site: Site, fleet: Fleet) -> int:
    """The cores that no replica uses which has requests at work; one that is not limited uses them all."""
    cpus = int(site.node.hardware.get("cpus") or 1)
    threads = {model.id: model.config.threads for model in fleet.models}
    used = [threads.get(each.model_id, 0) or cpus for each in site.there if fleet.busy.get(each.id, 0)]
    return max(cpus - sum(used), 0)


# --- how it is told

FETCHING = "fetching"  # several files
DOWNLOADING = ("installing", "resolving", "downloading", "copying", "verifying", FETCHING)
SPANS = {"installing": (0.0, 5.0), "resolving": (5.0, 5.0), "downloading": (5.0, 15.0), "copying": (5.0, 15.0),
         "verifying": (15.0, 20.0), FETCHING: (5.0, 20.0), "quantizing": (20.0, 60.0),
         "reading with the source": (60.0, 75.0), "reading with the result": (75.0, 90.0),
         "hashing": (90.0, 92.0), "uploading": (92.0, 100.0)}  # fmt: skip
ENDED = {JobState.DONE: "completed", JobState.FAILED: "failed", JobState.CANCELLED: "stopped"}


def status(one: Quantization, stage: str) -> str:
    """LocalAI's word for how far it is. `stage`: what its job does, empty while that has not begun."""
    if one.state is not JobState.OPEN:
        return ENDED[one.state]
    if not stage:
        return "queued"
    return "downloading" if stage in DOWNLOADING else "quantizing"


def percentage(one: Quantization, progress: Mapping[str, Any]) -> float:
    """How far it is in all, of 100. `progress`: of its job."""
    if one.state is not JobState.OPEN:
        return 100.0 if one.state is JobState.DONE else 0.0
    done, total = float(progress.get("done") or 0), float(progress.get("total") or 0)
    return round(_percentage(str(progress.get("stage") or ""), done, total), 1)


def together(progress: Progress, before: int, count: int) -> Progress:
    """What a fetch of one of several files says, as that of all of them. `before`: the files that have come."""
    if count == 1:
        return progress
    begin, end = SPANS[FETCHING]
    part = (max(_percentage(progress.stage, progress.done, progress.total), begin) - begin) / (end - begin)
    return Progress(stage=FETCHING, done=round(before + part, 2), total=count, unit="files", note=progress.note)


def _percentage(stage: str, done: float, total: float) -> float:
    begin, end = SPANS.get(stage, (0.0, 0.0))
    return begin + (min(done / total, 1.0) if total else 0.0) * (end - begin)
