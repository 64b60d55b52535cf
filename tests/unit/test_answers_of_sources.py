"""Whatever a hub or a registry answers becomes something to fetch, or one error."""

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localai_q.cluster.sources import Image, parse
from localai_q.errors import InvalidValue, LocalAIError
from localai_q.network import Network
from workers.node.sources import huggingface, images, origin
from workers.node.sources.origin import Origin

HUB = "https://hub.example"
Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture(autouse=True, scope="module")
def _no_pause():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(origin, "PAUSE", 0.0)
        patch.setattr(origin, "LONGEST_PAUSE", 0.0)
        yield


class Said:
    """A network that answers one thing after the other, and the last one again and again."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)

    def read(self, url: str, headers: Any, *_: Any, **__: Any) -> tuple[httpx.Response, bytes]:
        try:
            httpx.Request("GET", url, headers=headers)
        except httpx.InvalidURL as error:  # as the network has it
            raise InvalidValue(f"{error}") from error
        status, told, body = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in told.items()]
        return httpx.Response(status, headers=raw, request=httpx.Request("GET", url)), body


def asked(resolve: Callable[..., Origin], text: str, *answers: Answer, **more: str) -> Origin | None:
    with suppress(LocalAIError):
        found = resolve(parse(text), cast(Network, Said(*answers)), **more)
        assert len(found.urls) == 1
        assert found.size >= 0
        return found
    return None


words = st.text(st.characters(max_codepoint=255), max_size=30)
digests = st.sampled_from(["1" * 64, "sha256:" + "1" * 64, "sha512:" + "1" * 128, "x", ""])
numbers = st.one_of(st.integers(-1, 1 << 80).map(str), st.just("9" * 5000), words)


@given(st.sampled_from([200, 302, 401, 404, 503]), digests, numbers)
def test_a_hub(status: int, digest: str, size: str) -> None:
    told = {"x-linked-etag": f'"{digest}"', "x-linked-size": size}
    found = asked(huggingface.resolve, "hf://o/r/m.gguf", (status, told, b""), endpoint=HUB, token="")
    assert found is None or found.urls == (f"{HUB}/o/r/resolve/main/m.gguf",)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 1 << 80), st.floats(), words, digests,
              st.sampled_from([*images.MODELS, *images.INDEXES, *images.MANIFESTS])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(
        st.sampled_from(["layers", "manifests", "mediaType", "digest", "size", "annotations", "urls", "token", images.TITLE]),
        inner, max_size=5)),
    max_leaves=12,
)  # fmt: skip
challenges = st.one_of(words, st.sampled_from([
    'Bearer realm="https://auth.example/t",service="s"', 'Bearer realm="https://[x"', 'Bearer realm="https://"', "Basic",
    'Bearer realm="https://a b/\x00"', 'Bearer realm="//auth"', 'Bearer realm="https://h:99999/"',
]))  # fmt: skip


@given(challenges, values, values, values)
def test_a_registry(challenge: str, token: object, first: object, second: object) -> None:
    bodies = [json.dumps(value).encode() for value in (token, first, second)]
    answers = [(200, {}, body) for body in bodies]
    asked(images.resolve, "ollama://m", (401, {"www-authenticate": challenge}, b""), *answers, ollama=HUB)
    found = asked(images.resolve, "ollama://m", *answers[1:], ollama=HUB)
    assert found is None or found.urls[0].startswith(f"{HUB}/v2/library/m/blobs/sha256:")


@pytest.mark.parametrize("token", ["a\nb", "é", "\x00"])
def test_a_token_that_cannot_be_sent_is_refused(token: str) -> None:
    body = json.dumps({"token": token}).encode()
    challenge = {"www-authenticate": 'Bearer realm="https://auth.example/t"'}
    net = cast(Network, Said((401, challenge, b""), (200, {}, body)))
    with pytest.raises(LocalAIError, match=r"auth\.example gives no token"):
        images.resolve(Image(images.OLLAMA, "library/m", "latest"), net, ollama=HUB)


def test_where_a_layer_says_to_be_elsewhere_is_not_followed() -> None:
    layer = {"mediaType": images.MODELS[0], "digest": f"sha256:{'1' * 64}", "size": 1, "urls": ["http://10.0.0.1/m"]}
    found = asked(images.resolve, "ollama://m", (200, {}, json.dumps({"layers": [layer]}).encode()), ollama=HUB)
    assert found is not None
    assert found.urls == (f"{HUB}/v2/library/m/blobs/sha256:{'1' * 64}",)


@given(st.sampled_from(["", "a", "[::1]", "[:::]", "[x]", "[1]", "h:99999", "h:0", "[fe80::1]:5000"]))
def test_any_name_of_a_registry(host: str) -> None:
    with suppress(LocalAIError):
        asked(images.resolve, f"oci://{host}/models/tiny:v1", (404, {}, b""), ollama=HUB)
