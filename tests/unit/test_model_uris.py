"""Models that are named by a URI: which repository it names, which of its files is meant, and what is wanted besides."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localai_q.cluster.importing import Preferences, Repository, choose, repository
from localai_q.cluster.sources import HuggingFace, parse
from localai_q.documents import checked
from localai_q.errors import InvalidRequest, InvalidValue

FILES = [
    "README.md", "config.json", "mmproj-F16.gguf", "imatrix_own.gguf", "Tiny.imatrix.gguf", "Tiny-BF16.gguf", "Tiny-F16.gguf",
    "Tiny-IQ4_XS.gguf", "Tiny-Q4_K.gguf", "Tiny-Q4_K_M.gguf", "Tiny-UD-Q4_K_XL.gguf", "Tiny_q5_0.GGUF",
    "Q8_0/Tiny-Q8_0-00001-of-00002.gguf", "Q8_0/Tiny-Q8_0-00002-of-00002.gguf", "Tiny-Q4_K_M.safetensors",
]  # fmt: skip


@pytest.mark.parametrize(
    ("uri", "name", "revision"),
    [
        ("huggingface://o/r", "o/r", "main"),
        ("hf://o/r/", "o/r", "main"),
        ("hf://o/r@refs/pr/1", "o/r", "refs/pr/1"),
        ("https://huggingface.co/o/r-1.5_x", "o/r-1.5_x", "main"),
        ("https://huggingface.co/o/r/tree/v2", "o/r", "v2"),
        ("https://huggingface.co/o/r/tree/refs%2Fpr%2F1", "o/r", "refs/pr/1"),
        ("o/r", "o/r", "main"),
    ],
)
def test_a_repository_is_named_as_people_find_it(uri: str, name: str, revision: str) -> None:
    assert repository(uri) == Repository(name, revision)


@pytest.mark.parametrize(
    "uri",
    ["huggingface://o/r/f.gguf", "https://huggingface.co/o/r/resolve/main/f.gguf", "https://huggingface.co/o", "ollama://o/r",
     "https://h/o/r", "o", "", "../r", "o/..", "hf://o/r?x", "file:/o/r", "/o/r", "oci://h/o:r"],
)  # fmt: skip
def test_what_names_no_repository(uri: str) -> None:
    assert repository(uri) is None


@pytest.mark.parametrize(
    "uri",
    [
        "hf://o/r@..",
        "o/r@.",
        "o/r@a/../b",
        "https://huggingface.co/o/r/tree/..",
        "https://huggingface.co/o/r/tree/a%2F..",
    ],
)
def test_a_revision_that_leads_elsewhere_is_refused(uri: str) -> None:
    with pytest.raises(InvalidValue, match="is no revision of a repository") as error:
        repository(uri)
    assert error.value.param == "uri"


@pytest.mark.parametrize(
    ("wanted", "file"),
    [
        ((), "Tiny-Q4_K_M.gguf"),
        (("q4_k_m",), "Tiny-Q4_K_M.gguf"),
        (("Q4_K",), "Tiny-Q4_K.gguf"),
        (("f16",), "Tiny-F16.gguf"),
        (("bf16",), "Tiny-BF16.gguf"),
        (("q4_k_xl",), "Tiny-UD-Q4_K_XL.gguf"),
        (("ud-q4_k_xl",), "Tiny-UD-Q4_K_XL.gguf"),
        (("q5_0",), "Tiny_q5_0.GGUF"),
        (("q2_k", "q8_0", "f16"), "Q8_0/Tiny-Q8_0-00001-of-00002.gguf"),
    ],
)
def test_the_first_wanted_quantization_that_is_there_is_taken(wanted: tuple[str, ...], file: str) -> None:
    assert choose("o/r", FILES, wanted) == choose("o/r", FILES[::-1], wanted) == file


@pytest.mark.parametrize(
    ("files", "wanted", "says"),
    [
        (FILES, ("q2_k", "q3_k"), "no GGUF file with q2_k or q3_k; it has: Q8_0/Tiny-Q8_0-00001-of-00002.gguf, Tiny-BF16.gguf"),
        (FILES, ("q4",), "no GGUF file with q4;"),
        (["a-q8_0.gguf", "b-q8_0.gguf"], ("q8_0",), "several files with q8_0: a-q8_0.gguf, b-q8_0.gguf"),
        (["a-q8_0.gguf", "b-q8_0.gguf"], (), "no GGUF file with q4_k_m; it has: a-q8_0.gguf, b-q8_0.gguf"),
        (["a-q8_0.gguf"], ("q4_0",), "no GGUF file with q4_0; it has: a-q8_0.gguf"),
        (["mmproj-q4_k_m.gguf", "x-00002-of-00002.gguf", "model.safetensors"], (), "it has: none"),
        (["a-7b-q8_0.gguf", "a-13b-q8_0.gguf"], ("q8_0",), "several files with q8_0: a-13b-q8_0.gguf, a-7b-q8_0.gguf"),
        ([f"{n}.gguf" for n in range(40)], (), "and 10 more"),
        (["x"] * 10_001, (), "o/r has 10001 files, and 10000 are looked through"),
    ],
)  # fmt: skip
def test_what_is_there_is_listed_where_it_is_not_clear_what_is_meant(files: list, wanted: tuple, says: str) -> None:
    with pytest.raises(InvalidValue) as error:
        choose("o/r", files, wanted)
    assert says in error.value.message
    assert "Tiny.imatrix.gguf" not in error.value.message


def test_the_only_model_of_a_repository_needs_no_word() -> None:
    assert choose("o/r", ["mmproj.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf"]) == "b-00001-of-00002.gguf"
    assert choose("o/r", ["a.gguf", "b@c.gguf", "b#c.gguf", "b?c.gguf"]) == "a.gguf", "no source can say the others"


@pytest.mark.parametrize(
    ("files", "file"),
    [
        (["x-UD-Q4_K_M.gguf", "x-Q4_K_M.gguf", "x-Q4_K_M-imat.gguf"], "x-Q4_K_M.gguf"),
        (["Q4_K_M/x-Q4_K_M-00001-of-00002.gguf", "x-UD-Q4_K_M.gguf"], "Q4_K_M/x-Q4_K_M-00001-of-00002.gguf"),
        (["UD/x-UD-Q4_K_M-00001-of-00002.gguf", "x-Q4_K_M-00001-of-00003.gguf"], "x-Q4_K_M-00001-of-00003.gguf"),
    ],
)
def test_the_file_is_taken_to_whose_name_others_only_add_words(files: list[str], file: str) -> None:
    assert choose("o/r", files) == choose("o/r", files[::-1]) == file


@given(
    st.lists(st.text("aQ4_K-./", max_size=12).map(lambda text: f"{text}.gguf"), max_size=6),
    st.lists(st.sampled_from(["q4", "q4_k", "a", "k"]), max_size=2),
)
def test_only_a_file_that_is_there_is_chosen(files: list[str], wanted: list[str]) -> None:
    with suppress(InvalidValue):
        assert choose("o/r", files, wanted) in files


@pytest.mark.parametrize("revision", ["main", "v1"])
def test_a_file_of_a_repository_is_a_source(revision: str) -> None:
    assert parse(Repository("o/r", revision).source("d/f.gguf")) == HuggingFace("o/r", "d/f.gguf", revision)


def test_preferences_are_read_as_localai_sends_them() -> None:
    found = checked(Preferences, {"name": "n", "description": "d", "backend": "echo", "embeddings": "yes", "cuda": True,
                                  "quantizations": " Q8_0,q4_k_m ", "type": "", "enable_parameters": None, "new": "x"})  # fmt: skip
    assert (found.name, found.quantizations) == ("n", ("q8_0", "q4_k_m"))
    assert found.fields == {"backend": "echo", "embeddings": True}
    assert found.left_out(from_repository=True) == [
        "preferences.description is left out: it only describes the model",
        "preferences.cuda is left out: it is for models that this cluster does not serve",
        "preferences.new is left out: it means nothing here",
    ]
    assert found.left_out(from_repository=False)[-1].startswith(
        "preferences.quantizations is left out: the URI names no"
    )
    assert checked(Preferences, {"embeddings": "false", "quantizations": ["f16"]}).fields == {}
    assert checked(Preferences, {"quantizations": "q4_k_m, q8_0,"}).quantizations == ("q4_k_m", "q8_0")
    assert Preferences().left_out(from_repository=False) == []


@pytest.mark.parametrize(
    "wrong", [{"embeddings": "maybe"}, {"quantizations": "a b"}, {"quantizations": ["q"] * 33}, {"quantizations": "a,b c,"},
              {"backend": ["x"]}, {"name": "n" * 129}, {"quantizations": [3]}]
)  # fmt: skip
def test_preferences_that_make_no_sense_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(InvalidRequest, match=f"'{next(iter(wrong))}"):
        checked(Preferences, wrong)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({f"n{number}": 1 for number in range(33)}, "33 of the names mean nothing"), ({"n" * 65: 1}, "more than 64 characters")],
)  # fmt: skip
def test_what_is_left_out_is_bounded(wrong: dict, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        checked(Preferences, wrong)
    checked(Preferences, {f"{number:064}": 1 for number in range(32)})
