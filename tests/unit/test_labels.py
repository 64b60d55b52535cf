"""Which labels a machine has by what it is, and what may be one."""

import pytest
from pydantic import ValidationError

from localai_q.cluster.labels import MOST_LABELS, Labels, found_labels

MIB = 1 << 20


def test_a_machine_is_labelled_by_what_it_says_of_itself() -> None:
    assert found_labels("n1", {"os": "linux", "arch": "x86_64", "gpus": []}, 3) == {
        "node.name": "n1", "node.os": "linux", "node.arch": "x86_64", "node.replica-slots": "3"
    }  # fmt: skip
    assert found_labels("n1", {}, 1) == {"node.name": "n1", "node.replica-slots": "1"}


@pytest.mark.parametrize(
    ("mib", "bucket"),
    [(4096, None), (8188, "8GB"), (15360, "16GB"), (24564, "24GB"), (23034, "24GB"), (49140, "48GB"), (81559, "80GB+")],
)
def test_the_size_class_is_that_of_the_largest_device(mib: int, bucket: str | None) -> None:
    gpus = [{"vendor": "other", "vram_total": 0}, {"vendor": "nvidia", "vram_total": mib * MIB}]
    labels = found_labels("n1", {"gpus": gpus}, 1)
    assert (labels["gpu.vendor"], labels.get("gpu.vram")) == ("nvidia", bucket)


@pytest.mark.parametrize("labels", [{}, {"zone": "attic"}, {"a/b.c_d-e": "NVIDIA A100: 80GB+"}, {"x" * 63: "y" * 63}])
def test_short_words_are_labels(labels: dict) -> None:
    assert Labels.model_validate(labels).root == labels


@pytest.mark.parametrize(
    "labels",
    [
        [], {"": "x"}, {"a ": "x"}, {"a-": "x"}, {"a=b": "x"}, {"x" * 64: "y"}, {"x": "y" * 64}, {"x": 1}, {"x": None},
        {"x": "a=b"}, {"x": "a,b"}, {"x": "a\n"}, {"x\n": "a"}, {f"k{n}": "" for n in range(MOST_LABELS + 1)},
    ],
)  # fmt: skip
def test_anything_else_is_none(labels) -> None:
    with pytest.raises(ValidationError):
        Labels.model_validate(labels)
