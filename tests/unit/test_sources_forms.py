"""The forms of a source, and what is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localai_q.cluster.sources import (
    FORMS,
    OLLAMA,
    Bucket,
    HuggingFace,
    Image,
    OnNode,
    Source,
    Stored,
    Web,
    Wheel,
    parse,
)
from localai_q.errors import InvalidValue

A = "a" * 64


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("https://host/m.gguf?x=1", Web(("https://host/m.gguf?x=1",))),
        ("http://host:8000/m", Web(("http://host:8000/m",))),
        ("huggingface://o/r/m.gguf", HuggingFace("o/r", "m.gguf", "main")),
        ("hf://o/r/a/b.gguf@refs/pr/1", HuggingFace("o/r", "a/b.gguf", "refs/pr/1")),
        ("ollama://smollm2", Image(OLLAMA, "library/smollm2", "latest")),
        ("ollama://someone/model:135m", Image(OLLAMA, "someone/model", "135m")),
        ("oci://ghcr.io/a/b:v1", Image("ghcr.io", "a/b", "v1")),
        (f"oci://localhost:5000/a@sha256:{A}", Image("localhost:5000", "a", f"sha256:{A}")),
        ("s3://my.bucket/a/b c.gguf", Bucket("my.bucket", "a/b c.gguf")),
        ("pypi:p==1.0#p/m.gguf", Wheel("p", "1.0", "p/m.gguf")),
        (f"store:{A}", Stored(A)),
        ("file:/a/m.gguf", OnNode("/a/m.gguf")),
        ("file:///a/m.gguf", OnNode("/a/m.gguf")),
    ],
)
def test_each_form(text: str, source: Source) -> None:
    assert parse(text) == source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no source"),
        ("ftp://host/m", "is no source"),
        ("huggingface://o/r", "is no source"),
        ("oci://ghcr.io/a/b", "is no source"),
        (f"oci://ghcr.io/a@sha512:{A}", "is no source"),
        ("s3://UPPER/m", "is no source"),
        ("store:abc", "is no source"),
        ("file:relative", "is no source"),
        ("https://", "no URL of the form"),
        ("https://host:port/m", "is no URL"),
        ("https://[::1/m", "is no URL"),
        ("https://user:secret@host/m", "would be shown to everybody"),
        ("https://host/m\n", "cannot be shown"),
        ("huggingface://o/r/../../x", "no path below the source"),
        ("huggingface://o/r/a@../x", "no path below the source"),
        ("huggingface://o/r//x", "no path below the source"),
        ("pypi:p==1#../m", "no path below the source"),
        ("pypi:p==1#/m", "no path below the source"),
        ("pypi:p==1#a\\..\\m", "no path below the source"),
        ("oci://[:::]/a/b:v1", "is no URL"),
        ("oci://ghcr.io:99999/a/b:v1", "is no URL"),
        ("oci://ghcr.io/a/../b:v1", "no path below the source"),
        ("ollama://../x", "is no source"),
        ("file:/a/../b", r"must not have '\.\.'"),
    ],
)
def test_what_is_none(text: str, message: str) -> None:
    with pytest.raises(InvalidValue, match=message) as caught:
        parse(text)
    assert caught.value.param == "source"


def test_a_refusal_names_every_form() -> None:
    with pytest.raises(InvalidValue) as caught:
        parse("model.gguf")
    assert all(form in caught.value.message for form, _ in FORMS)


def test_mirrors() -> None:
    assert parse("https://a/m", ["http://b/m"]) == Web(("https://a/m", "http://b/m"))
    for source, mirrors, message in (
        ("https://a/m", ["file:/etc/passwd"], "is no URL of the form"),
        ("https://a/m", ["https://b/m"] * 9, "can have 8 mirrors, not 9"),
        ("ollama://x", ["https://b/m"], "go with a source of the form https"),
        ("", ["https://b/m"], "go with a source of the form https"),
    ):
        with pytest.raises(InvalidValue, match=message) as caught:
            parse(source, mirrors)
        assert caught.value.param == "mirrors"


@given(st.sampled_from(["http://", "https://", "hf://", "ollama://", "oci://", "s3://", "pypi:", "store:", "file:", ""]),
       st.text(max_size=60))  # fmt: skip
def test_any_text_is_a_source_or_one_error(form: str, text: str) -> None:
    try:
        found = parse(form + text)
    except InvalidValue:
        return
    paths = {HuggingFace: ("file", "revision"), Wheel: ("member",), Image: ("repository",), OnNode: ("path",)}
    for name in paths.get(type(found), ()):
        assert ".." not in getattr(found, name).split("/")
