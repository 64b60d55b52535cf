"""What a node has left, and the words in which a model is refused a place there."""

from dataclasses import replace

import pytest

from localai_q.cluster.capacity import UNLIMITED, Seeker, Site, Verdict, booking, budget, examine, human, weigh
from localai_q.cluster.memory import Memory
from localai_q.cluster.models import Facts, Model, ModelConfig
from localai_q.cluster.nodes import Node, Replica
from localai_q.cluster.states import NodeState, ReplicaState

NOW = 10_000.0
GB = 10**9
S = ReplicaState
FACTS = Facts(architecture="llama", blocks=30, context_length=8192, embedding_length=576, heads=9, kv_heads=90,
              key_length=64, value_length=64, vocabulary=49152, file_size=98362432, layer_bytes=66493440,
              other_bytes=30083328)  # fmt: skip


def node(*, ram: float = 8, state: NodeState = NodeState.READY, heard: float = NOW, labels=None, **hardware) -> Node:
    """A node of so many GB."""
    hardware = {"ram_available": int(ram * GB), **hardware}
    return Node(id="n", name="n", state=state, approved=True, secret_hash="", hardware=hardware, last_heartbeat=heard,
                labels=labels or {})  # fmt: skip


def gpu(vram: float) -> dict:
    return {"vendor": "nvidia", "vram_free": int(vram * GB), "vram_total": 80 * GB}


def replica(state: ReplicaState, ram: float = 2, *, of: str = "o", changed: float = NOW - 60, **values) -> Replica:
    return Replica(id=f"{of}{state}", model_id=of, node_id="n", number=1, revision=1, state=state, slots=1,
                   changed=changed, reserved=Memory(ram=int(ram * GB)), **values)  # fmt: skip


def model(facts: Facts | None = None, **config) -> Model:
    return Model(id="m", name="m", revision=1, config=ModelConfig(**{"backend": "echo", **config}), facts=facts)


def free(at: Node, there: list[Replica]) -> Memory:
    return Site(at, there).free


def judged(
    of: Model, at: Node, *there: Replica, uses_gpu: bool = False, rivals: dict[str, str] | None = None
) -> Verdict:
    builds = ("cuda12", "cpu") if uses_gpu else ("cpu",)
    return examine(Seeker(of, builds=builds, rivals=rivals), Site(at, there), NOW)


def refused(at: Node, of: Model, *there: Replica, uses_gpu: bool = False) -> str:
    return judged(of, at, *there, uses_gpu=uses_gpu).reason


class TestFree:
    @pytest.mark.parametrize("state", [S.PLACED, S.INSTALLING, S.STAGING, S.LOADING])
    def test_what_is_on_its_way_is_booked(self, state: ReplicaState) -> None:
        assert free(node(), [replica(state)]) == Memory(ram=6 * GB)

    def test_a_ready_replica_is_booked_until_its_node_has_reported_since(self) -> None:
        ready = replica(S.READY, changed=NOW)
        assert free(node(heard=NOW - 1), [ready]).ram == 6 * GB
        assert free(node(heard=NOW), [ready]).ram == 8 * GB, "the report that it is ready tells what is left"

    def test_of_a_reported_replica_only_what_its_node_does_not_see_stays_booked(self) -> None:
        assert free(node(heard=NOW), [replica(S.READY, unseen=GB // 2)]).ram == 7.5 * GB

    @pytest.mark.parametrize("state", [S.FAILED, S.GONE])
    def test_what_has_no_process_holds_nothing(self, state: ReplicaState) -> None:
        assert free(node(budget=8 * GB), [replica(state)]).ram == 8 * GB

    def test_a_budget_is_kept_by_all_together(self) -> None:
        there = [replica(S.READY), replica(S.STOPPING), replica(S.LOADING)]
        assert free(node(ram=100, budget=7 * GB), there).ram == 1 * GB

    def test_on_a_node_with_gpus_the_budget_is_of_their_memory(self) -> None:
        found = free(node(budget=10 * GB, gpus=[gpu(8), gpu(8)]), [])
        assert found == Memory(ram=8 * GB, vram=10 * GB)

    @pytest.mark.parametrize(
        ("given", "hardware", "bytes_"),
        [
            ("", {"budget": 5 * GB, "ram_total": 10 * GB}, 5 * GB),
            ("80%", {"budget": 5 * GB, "ram_total": 10 * GB}, 8 * GB),
            ("2GB", {"budget": 5 * GB, "ram_total": 10 * GB}, 2 * GB),
            ("20GB", {"ram_total": 10 * GB}, 10 * GB),
            ("50%", {"ram_total": 10 * GB, "gpus": [gpu(8), gpu(8)]}, 80 * GB),
            ("50%", {"budget": 5 * GB}, 5 * GB),
            ("50%", {}, UNLIMITED),
            ("3GB", {}, 3 * GB),
        ],
    )
    def test_what_an_admin_allows_goes_before_what_the_node_says(self, given: str, hardware: dict, bytes_: int) -> None:
        limited = replace(node(ram=100, **hardware), given_budget=given)
        assert budget(limited) == bytes_
        room = free(limited, [replica(S.LOADING)])
        assert (room.vram if hardware.get("gpus") else room.ram) == min(bytes_ - 2 * GB, 98 * GB) or hardware.get(
            "gpus"
        )

    def test_a_node_that_says_nothing_or_nonsense_is_taken_to_have_room(self) -> None:
        for hardware in ({}, {"ram_available": "x", "gpus": 5, "budget": -1}, {"ram_available": float("nan")}):
            assert free(replace(node(), hardware=hardware), []).ram == UNLIMITED


class TestExamine:
    def test_what_fits_has_no_reason_against_it(self) -> None:
        assert refused(node(), model(memory=8 * GB)) == ""

    @pytest.mark.parametrize("state", [state for state in NodeState if state is not NodeState.READY])
    def test_a_node_that_takes_nothing_says_so(self, state: NodeState) -> None:
        assert refused(node(state=state), model()) == state

    @pytest.mark.parametrize(("heard", "reason"), [(NOW - 30, ""), (NOW - 31, "has not reported for 30 s")])
    def test_a_node_that_has_been_silent_gets_nothing_new(self, heard: float, reason: str) -> None:
        assert examine(Seeker(model(), builds=(), patience=30), Site(node(heard=heard), []), NOW).reason == reason

    def test_too_little_memory_is_told_in_numbers(self) -> None:
        verdict = judged(model(memory=3_100_000_000), node(ram=1.2))
        assert verdict.reason == "needs 3.1 GB, 1.2 GB free (as configured)"
        assert verdict.crowded

    def test_a_model_on_gpus_needs_their_memory(self) -> None:
        assert refused(node(gpus=[gpu(2)]), model(memory=3 * GB), uses_gpu=True) == (
            "needs 3.0 GB of GPU memory, 2.0 GB free (as configured)"
        )
        assert refused(node(gpus=[gpu(2), gpu(2)]), model(memory=3 * GB), uses_gpu=True) == ""

    def test_a_backend_that_uses_no_gpu_takes_ram_beside_them(self) -> None:
        assert refused(node(gpus=[gpu(1)]), model(memory=3 * GB)) == ""

    def test_a_node_that_takes_no_build_for_its_gpus_has_models_in_ram(self) -> None:
        assert refused(node(gpus=[gpu(1)], builds=["cpu"]), model(memory=3 * GB), uses_gpu=True) == ""
        limited = node(ram=8, gpus=[gpu(80)], builds=["cpu"], budget=2 * GB)
        assert refused(limited, model(memory=3 * GB), uses_gpu=True) == "needs 3.0 GB, 2.0 GB free (as configured)"
        old = {**gpu(1), "driver": "470.1"}
        assert refused(node(gpus=[old]), model(memory=3 * GB), uses_gpu=True) == ""

    def test_on_a_gpu_that_has_no_memory_of_its_own_a_model_takes_the_machines(self) -> None:
        shared = node(ram=3, gpus=[{"index": 0, "vendor": "nvidia"}], budget=2 * GB)
        assert judged(model(memory=2 * GB), shared, uses_gpu=True).need.memory == Memory(ram=2 * GB)
        assert refused(shared, model(memory=2 * GB + 1), uses_gpu=True) == "needs 2.0 GB, 2.0 GB free (as configured)"
        assert refused(shared, model(memory=GB), replica(S.LOADING, 2), uses_gpu=True)

    def test_labels_must_all_be_there(self) -> None:
        asks = model(selector={"zone": "a", "disk": "fast"})
        assert refused(node(labels={"zone": "a", "disk": "slow"}), asks) == "lacks the label disk=fast"
        assert refused(node(labels={"zone": "a", "disk": "fast", "more": "x"}), asks) == ""

    def test_a_node_takes_one_replica_of_a_model_or_as_many_as_it_or_an_admin_says(self) -> None:
        one, two = replica(S.READY, of="m"), replica(S.LOADING, of="m")
        assert refused(node(), model(), one) == "has a replica that is ready"
        several = node(max_replicas_per_model=2)
        assert refused(several, model(), one) == ""
        assert refused(several, model(), one, two) == "has 2 replicas, as many as it may"
        assert refused(several, model(spread_all=True), one) == "has a replica that is ready"
        assert refused(replace(several, given_slots=3), model(), one, two) == ""
        assert refused(replace(several, given_slots=1), model(), one) == "has a replica that is ready"
        assert refused(node(max_replicas_per_model="x"), model(), one) == "has a replica that is ready"

    def test_models_that_exclude_each_other_are_never_on_one_node(self) -> None:
        beside = judged(model(memory=GB), node(), replica(S.READY), rivals={"o": "other"})
        assert (beside.reason, beside.crowded, beside.rivals) == ("shares a group with other", True, {"oready"})
        tight = judged(model(memory=9 * GB), node(), replica(S.STOPPING), rivals={"o": "other"})
        assert tight.reason == "shares a group with other and needs 9.0 GB, 8.0 GB free (as configured)"
        assert judged(model(), node(), replica(S.FAILED), rivals={"o": "other"}).fits
        assert judged(model(), node(), replica(S.READY, of="x"), rivals={"o": "other"}).fits

    def test_one_that_failed_may_be_tried_again_after_its_back_off(self) -> None:
        failed = replica(S.FAILED, of="m", failures=1, reason="no network", changed=NOW)
        assert refused(node(), model(), failed) == "failed: no network"
        assert refused(node(), model(), replace(failed, changed=NOW - 2)) == ""

    def test_the_file_needs_room_on_the_disk_unless_it_lies_there(self) -> None:
        big = {"source": "file:/x", "sha256": "a" * 64, "size": 3 * GB}
        assert refused(node(disk_free=GB), model(**big)) == "needs 4.1 GB of disk, 1.0 GB free"
        assert refused(node(disk_free=GB, files=["a" * 64]), model(**big)) == ""
        assert refused(node(disk_free=GB, disk_spare=0), model(**big)) == "needs 3.1 GB of disk, 1.0 GB free"
        assert refused(node(disk_free=4 * GB), model(**{**big, "source": "pypi:a==1#b"})) == (
            "needs 7.1 GB of disk, 4.0 GB free"
        )

    def test_of_several_files_those_need_room_that_are_not_there(self) -> None:
        parts = [{"source": "file:/y", "sha256": "b" * 64, "size": 3 * GB}]
        big = model(source="file:/x", sha256="a" * 64, size=2 * GB, parts=parts)
        known = big.model_copy(update={"facts": replace(FACTS, file_size=5 * GB)})
        for one in (big, known):
            assert refused(node(disk_free=GB, disk_spare=0), one) == "needs 5.2 GB of disk, 1.0 GB free"
            assert (
                refused(node(disk_free=GB, disk_spare=0, files=["a" * 64]), one) == "needs 3.1 GB of disk, 1.0 GB free"
            )
            assert refused(node(disk_free=GB, files=["a" * 64, "b" * 64]), one) == ""

    def test_a_context_is_cut_to_what_fits_and_booked_so(self) -> None:
        small = node(ram=1.2)
        of = model(FACTS, backend="xllamacpp", context_size=8192)
        assert "needs 1.6 GB" in refused(small, of)
        cut = of.model_copy(update={"config": of.config.model_copy(update={"fit_context": True})})
        verdict = judged(cut, small)
        assert verdict.reason == ""
        assert 512 <= booking(cut, verdict).context_size < 8192
        assert booking(cut, judged(cut, node())).context_size == 0

    def test_of_what_nothing_is_known_nothing_is_booked(self) -> None:
        verdict = weigh(Seeker(model(), builds=()), Site(node(ram=0), []))
        assert (verdict.reason, booking(model(), verdict).memory) == ("", Memory())


def test_bytes_in_words() -> None:
    assert [human(n) for n in (0, 999, 1500, 3_100_000_000, 2 * 10**12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "3.1 GB",
        "2.0 TB",
    ]
