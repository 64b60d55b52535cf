"""LocalAI's model YAML: each field is honoured, left out with a warning, or refused; none disappears."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localai_q.cluster.localai_yaml import LEFT_OUT, REFUSED, SAME, UNSAID, merged, source_of, translate
from localai_q.cluster.models import Document
from localai_q.documents import read_yaml
from localai_q.errors import InvalidRequest, InvalidValue

BACKENDS = ("xllamacpp", "llama-cpp", "echo")
HUB = "huggingface://acme/tiny-GGUF/tiny.Q4_K_M.gguf"


def imported(text: str):
    return translate(read_yaml(text)[0], BACKENDS)


FULL = f"""
name: assistant
backend: llama-cpp
context_size: 8192
threads: 6
f16: true
mmap: true
gpu_layers: 20
cache_type_k: q8_0
cache_type_v: q8_0
pinned: true
concurrency_groups: [big]
system_prompt: Be brief.
stopwords: ["<|im_end|>", "</s>"]
options: ["use_jinja:true", "parallel:3", "cache_ram:64", "context_shift:true"]
parameters:
  model: {HUB}
  temperature: 0
  top_k: 40
  top_p: 0.9
  seed: -1
  batch: 0
template:
  use_tokenizer_template: true
known_usecases: [chat]
"""


def test_a_document_is_taken_field_by_field() -> None:
    found = imported(FULL)
    document = found.document
    assert (document.name, document.backend, document.source, document.sha256) == ("assistant", "xllamacpp", HUB, None)
    assert (document.context_size, document.threads, document.gpu_layers, document.slots) == (8192, 6, 20, 3)
    assert (document.cache_type, document.pinned, document.concurrency_groups) == ("q8_0", True, ("big",))
    assert (document.system_prompt, document.options) == ("Be brief.", ("cache_ram:64",))
    assert document.parameters.model_dump(exclude_none=True) == {
        "temperature": 0, "top_k": 40, "top_p": 0.9, "stop": ["<|im_end|>", "</s>"]}  # fmt: skip
    assert sorted(warning.split()[0] for warning in found.warnings) == [
        "backend:", "f16", "known_usecases", "mmap", "options:"]  # fmt: skip


def test_files_come_from_where_the_document_says() -> None:
    document = imported(f"""
name: seeing
parameters: {{model: models/big.gguf}}
mmproj: eyes.gguf
draft_model: ollama://tiny
lora_adapters: [https://huggingface.co/acme/loras/resolve/v1/polite.gguf]
lora_scales: [0.5]
download_files:
- {{filename: big.gguf, uri: "https://host/big.gguf", sha256: {"a" * 64}}}
- {{filename: vision/eyes.gguf, uri: "https://huggingface.co/acme/eyes/resolve/main/eyes.gguf", sha256: {"b" * 64}}}
""").document
    assert (document.source, document.sha256) == ("https://host/big.gguf", "a" * 64)
    assert document.mmproj is not None
    assert (document.mmproj.source, document.mmproj.sha256) == ("huggingface://acme/eyes/eyes.gguf", "b" * 64)
    assert document.draft_model is not None
    assert document.draft_model.source == "ollama://tiny"
    assert [(lora.source, lora.scale) for lora in document.loras] == [("huggingface://acme/loras/polite.gguf@v1", 0.5)]


def test_a_model_in_several_files_is_taken_with_all_of_them() -> None:
    files = "".join(f"- {{filename: q4/big-0000{n}-of-00003.gguf, uri: 'https://host/{n}', sha256: {'0abc'[n] * 64}}}\n"
                    for n in (1, 2, 3))  # fmt: skip
    named = "name: big\nparameters: {model: models/big-00001-of-00003.gguf}\ndownload_files:\n"
    document = imported(named + files).document
    assert [(file.source, file.sha256) for file in document.own] == [
        (f"https://host/{n}", "0abc"[n] * 64) for n in (1, 2, 3)
    ]
    hub = imported("name: big\nparameters: {model: 'huggingface://o/r/big-00001-of-00002.gguf'}").document
    assert [file.source for file in hub.own] == [f"huggingface://o/r/big-0000{n}-of-00002.gguf" for n in (1, 2)]
    with pytest.raises(InvalidValue, match=r"big-00003-of-00003.gguf lies in LocalAI's own folder"):
        imported(named + files.rpartition("- ")[0])
    with pytest.raises(InvalidValue, match="name the first of them") as caught:
        imported("name: big\nparameters: {model: models/big-00002-of-00003.gguf}")
    assert caught.value.param == "parameters.model"


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("template: {chat: '{{.Input}}'}", "template.chat is left out: it is in Go's language"),
        ("template: {use_tokenizer_template: true}", None),
        ("download_files: [{filename: x, uri: 'https://h/x'}]", "nothing in the document names x"),
        ("backend: cuda12-llama-cpp", "'cuda12-llama-cpp' is served by 'xllamacpp'"),
        ("options: [gpu]", "gpu is left out"),
        ("reasoning_effort: low", "give it with requests"),
        ("embeddings: true", None),
        ("debug: false\ndiffusers: {cuda: false}\ngrammar: ''\nparameters: {tfz: null}", None),
    ],
)
def test_what_is_left_out_is_said(text: str, warning: str | None) -> None:
    warnings = imported(f"name: m\n{text}").warnings
    assert (warning in warnings[0]) if warning else (warnings == [])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("parameters: {model: local.gguf}", "local.gguf lies in LocalAI's own folder"),
        ("backend: vllm", "'vllm' is none of"),
        ("alias: other", "stands for no other"),
        ("rope_scaling: yarn\nenv: {A: b}", "rope_scaling: the model's file says.*env: backends get no"),
        ("cache_type_k: f16\ncache_type_v: q8_0", "keys and values have one type"),
        ("cache_type_k: q5_1", "Invalid value for 'cache_type'"),
        ("lora_adapters: [ollama://a, ollama://b]\nlora_scales: [1.0]", "there are 1 for 2"),
        ("parameters: {temperature: 9}", "Invalid value for 'parameters.temperature'"),
        ("parameters: {tfz: 0.9}", "no tail-free sampling"),
        ("parameters: {frobnicate: 1}", "parameters.frobnicate: no field of a model that is known here"),
        ("frobnicate: 1", "frobnicate: no field of a model that is known here"),
        ("parameters: 3", "'parameters' must be an object"),
        ("context_size: huge", "Invalid value for 'context_size'"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_what_to_do(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        imported(f"name: m\n{text}")


@pytest.mark.parametrize("field", [*SAME, "backend", "parameters", "template", "cache_type_k", "download_files", "mmproj",
                                   "lora_adapters", "lora_scales", "options", "stopwords", "mirostat"])  # fmt: skip
@pytest.mark.parametrize(
    "value",
    [
        "x",
        7,
        True,
        1.5,
        ["x"],
        [[]],
        [None],
        {"a": 1},
        {"model": {}},
        {"filename": 3},
        [{"uri": 3}],
        ["parallel:" + "9" * 5000],
    ],
)
def test_whatever_a_field_holds_it_is_taken_or_refused(field: str, value: object) -> None:
    content = {"name": "m", "backend": "echo", field: value}
    before = repr(content)
    with suppress(InvalidRequest):
        assert translate(content, BACKENDS).document.config
    assert repr(content) == before


def test_what_is_translated_stays_as_it_was() -> None:
    content = read_yaml(FULL)[0]
    before = repr(content)
    translate(content, BACKENDS)
    assert repr(content) == before


def test_what_a_model_keeps_is_said_by_no_field_of_theirs() -> None:
    said = {*SAME.values(), "backend", "source", "sha256", "size", "mirrors", "parts", "origin", "mmproj", "draft_model", "loras",
            "cache_type", "slots", "options", "parameters"}  # fmt: skip
    assert said.isdisjoint(UNSAID)
    assert {*Document.model_fields} == said | {*UNSAID}


def test_a_template_that_is_no_object_is_refused() -> None:
    with pytest.raises(InvalidValue, match="'template' must be an object"):
        imported("{name: m, backend: echo, template: chatml}")


def test_a_name_is_needed() -> None:
    with pytest.raises(InvalidRequest, match="'name'"):
        imported("backend: llama-cpp")


@given(st.dictionaries(st.sampled_from(sorted({*LEFT_OUT, *REFUSED, "nonsense"} - {n for n in (*LEFT_OUT, *REFUSED) if "." in n})), st.just("x"), max_size=6))  # fmt: skip
def test_no_field_disappears(fields: dict[str, str]) -> None:
    try:
        said = " ".join(translate({"name": "m", "backend": "echo", **fields}, BACKENDS).warnings)
        assert not {*fields} & {*REFUSED, "nonsense"}
    except InvalidValue as error:
        said = error.message
        fields = {name: "x" for name in fields if name not in LEFT_OUT}
    assert all(name in said for name in fields)


def test_every_field_has_one_fate() -> None:
    assert not {*LEFT_OUT} & {*REFUSED} | {*SAME} & {*LEFT_OUT, *REFUSED}


@pytest.mark.parametrize(
    ("uri", "source"),
    [
        ("https://huggingface.co/a/b/resolve/main/c/d.gguf?download=true", "huggingface://a/b/c/d.gguf"),
        ("https://huggingface.co/a/b/blob/x/d.gguf", "huggingface://a/b/d.gguf@x"),
        ("file:///srv/x.gguf", "file:/srv/x.gguf"),
        ("https://host/x", "https://host/x"),
    ],
)
def test_what_is_on_the_hub_is_named_as_there(uri: str, source: str) -> None:
    assert source_of(uri) == source


def test_overrides_lie_over_what_an_entry_is_made_of() -> None:
    assert merged({"a": {"x": 1, "y": 1}, "b": [1], "c": 1}, {"a": {"y": 2}, "b": [2]}) == {
        "a": {"x": 1, "y": 2}, "b": [2], "c": 1}  # fmt: skip
