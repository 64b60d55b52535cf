"""Every error of docs/api.md as OpenAI's client sees it, and what a backend that fails does to its callers and others."""

import json
import os
import re
import signal
import socket
from typing import Any

import httpx
import openai
import pytest
from e2e_cluster import CHAT_MODEL, ROOT, Cluster, until
from waiting import LIMIT

from localai_q.cluster.events import Delta, decode

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
BODY = {"model": "echo", "messages": HELLO}


def sent(cluster: Cluster, body: Any, path: str = CHAT, **more: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return cluster.http.post(path, content=content, **more)


def error_of(response: httpx.Response) -> tuple[int, str, str | None, str | None]:
    """Status, type, code and param; the shape is checked, and that there is something to read."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert response.headers["X-Request-Id"]
    return response.status_code, error["type"], error["code"], error["param"]


@pytest.fixture(autouse=True)
def no_open_job(cluster: Cluster) -> Any:
    yield
    until(lambda: not cluster.open_generations(), LIMIT, "the end of every job of a refused request")


REFUSED: dict[str, tuple[Any, str, str | None]] = {
    "no JSON": (b"{", "invalid_json", None),
    "not UTF-8": (b'{"model": "\xff"}', "invalid_json", None),
    "nothing": (b"", "invalid_json", None),
    "NaN": (b'{"model": "echo", "temperature": NaN}', "invalid_json", None),
    "nested too deeply": (b"[" * 5000, "invalid_json", None),
    "a list": ([], "invalid_type", None),
    "a wrong type": ({**BODY, "temperature": "0.7"}, "invalid_type", "temperature"),
    "a wrong type inside": ({**BODY, "messages": [{"role": "user", "content": 5}]}, "invalid_type",
                            "messages[0].content"),
    "out of range": ({**BODY, "temperature": 3}, "invalid_value", "temperature"),
    "no messages": ({"model": "echo"}, "missing_required_parameter", "messages"),
    "no model": ({"messages": HELLO}, "missing_required_parameter", "model"),
    "unknown": ({**BODY, "temprature": 1}, "unknown_parameter", "temprature"),
    "unsupported": ({**BODY, "audio": {"voice": "x", "format": "mp3"}}, "unsupported_parameter", "audio"),
    "unsupported old": ({**BODY, "functions": []}, "unsupported_parameter", "functions"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("prefix", ["/v1", ""])
def test_a_malformed_body_is_refused_by_the_name_of_its_field(cluster: Cluster, name: str, prefix: str) -> None:
    body, code, param = REFUSED[name]
    response = sent(cluster, body, prefix + "/chat/completions")
    assert error_of(response) == (400, "invalid_request_error", code, param)


def test_the_client_raises_bad_request_with_code_and_param(cluster: Cluster) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        cluster.say("x", extra_body={"temprature": 1})
    assert caught.value.status_code == 400
    assert caught.value.code == "unknown_parameter"
    assert caught.value.param == "temprature"
    assert caught.value.type == "invalid_request_error"


def test_an_unknown_model_is_not_found_and_the_message_names_those_that_are_there(cluster: Cluster) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        cluster.say("x", model="nothing-like-it")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "nothing-like-it" in caught.value.message
    assert CHAT_MODEL in caught.value.message
    with pytest.raises(openai.NotFoundError):
        cluster.openai.models.retrieve("nothing-like-it")


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context_is_a_bad_request_even_as_a_stream(cluster: Cluster, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        cluster.say("hello " * 5000, model=CHAT_MODEL, stream=stream, max_tokens=4)
    assert caught.value.code == "context_length_exceeded"
    assert "4096" in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_with_an_embedding_model_is_refused(cluster: Cluster, vectors: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        cluster.say("x", model=vectors, stream=stream)
    assert (caught.value.code, caught.value.param) == ("unsupported_by_model", "model")
    with pytest.raises(openai.BadRequestError) as caught:
        cluster.openai.embeddings.create(model=CHAT_MODEL, input="x")
    assert caught.value.code == "unsupported_by_model"


@pytest.mark.parametrize("path", [CHAT, "/chat/completions", "/v1/models", "/metrics", "/api/nodes", "/api/jobs"])
@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Basic YTpi", "missing_api_key"),
        ("Bearer lai-wrong", "invalid_api_key"),
        ("Bearer " + "x" * 4000, "invalid_api_key"),
    ],
)
def test_without_a_valid_key_nothing_private_answers(
    cluster: Cluster, path: str, header: str | None, code: str
) -> None:
    headers = {"Authorization": header} if header is not None else {}
    method = "POST" if path.endswith("completions") else "GET"
    response = httpx.request(method, cluster.base_url + path, headers=headers, json=BODY if method == "POST" else None)
    assert error_of(response) == (401, "invalid_request_error", code, None)


def test_the_client_raises_authentication_error_for_a_bad_key_and_never_shows_it_whole(cluster: Cluster) -> None:
    key = "lai-0123456789abcdef"
    with pytest.raises(openai.AuthenticationError) as caught:
        cluster.client(key).models.list()
    assert caught.value.code == "invalid_api_key"
    assert key not in caught.value.message


def test_a_user_key_may_chat_and_may_not_administrate(cluster: Cluster) -> None:
    key = cluster.cli("keys", "create", "somebody").strip()
    client = cluster.client(key)
    said = client.chat.completions.create(model="echo", messages=HELLO).choices[0].message.content
    assert said == "hello"
    with pytest.raises(openai.PermissionDeniedError) as caught:
        client.get("/../api/nodes", cast_to=object)
    assert (caught.value.code, caught.value.type) == ("forbidden", "permission_error")
    for method, path in [("GET", "/metrics"), ("GET", "/api/jobs"), ("DELETE", "/api/models/echo"),
                         ("POST", "/api/keys"), ("PUT", "/api/files/" + "0" * 64)]:  # fmt: skip
        answer = httpx.request(method, cluster.base_url + path, headers={"Authorization": f"Bearer {key}"})
        assert error_of(answer) == (403, "permission_error", "forbidden", None), path


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_of_more_than_20_mb_is_refused(cluster: Cluster, announced: bool) -> None:
    size = (20 << 20) + 1
    content = b" " * size if announced else (b" " * (1 << 20) for _ in range(21))
    response = cluster.http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert error_of(response) == (413, "invalid_request_error", "body_too_large", None)
    assert "LOCALAI_Q_MAX_BODY" in response.json()["error"]["message"]


def test_a_body_of_just_under_20_mb_is_read(cluster: Cluster) -> None:
    response = sent(cluster, json.dumps({**BODY, "temprature": "x" * ((20 << 20) - 200)}).encode())
    assert error_of(response)[2] == "unknown_parameter"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", CHAT, "POST"), ("DELETE", "/v1/embeddings", "POST"), ("POST", "/v1/models", "GET"),
     ("PUT", "/healthz", "GET")],
)  # fmt: skip
def test_another_method_is_not_allowed_and_the_right_one_is_named(
    cluster: Cluster, method: str, path: str, allowed: str
) -> None:
    response = cluster.http.request(method, path)
    assert error_of(response) == (405, "invalid_request_error", "method_not_allowed", None)
    assert response.headers["Allow"] == allowed


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/api/nothing", "/v2/chat/completions", "/%00", "/../etc"])
def test_an_unknown_address_is_not_found(cluster: Cluster, path: str) -> None:
    response = cluster.http.get(path)
    assert error_of(response) == (404, "invalid_request_error", "not_found", None)


def test_an_unknown_job_is_not_found(cluster: Cluster) -> None:
    for method in ("GET", "DELETE"):
        assert error_of(cluster.http.request(method, "/api/jobs/nothing"))[:3] == (
            404, "invalid_request_error", "not_found",
        )  # fmt: skip


def test_every_code_of_the_documentation_has_an_error(cluster: Cluster) -> None:
    table = (ROOT / "docs" / "api.md").read_text().partition("## Errors")[2]
    codes = {
        code for row in re.findall(r"^\| \d+ \| `\w+` \| (.+?) \|", table, re.M) for code in re.findall(r"\w+", row)
    }
    from localai_q.errors import StartupError, all_errors

    known = {error.code for error in all_errors().values() if error.code and error is not StartupError}
    assert codes == known


GARBAGE = [
    b"\x00\xff\xfe\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 500 + b"\r\n",
]


def test_garbage_on_the_wire_gets_an_error_or_the_end_and_the_next_request_an_answer(cluster: Cluster) -> None:
    host, port = cluster.address.split(":")
    for garbage in GARBAGE:
        with socket.create_connection((host, int(port)), timeout=LIMIT) as connection:
            connection.sendall(garbage)
            try:
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(4096)
            except ConnectionError:
                answer = b""
        assert answer == b"" or re.match(rb"HTTP/1.1 (4\d\d|50[15]) ", answer), (garbage[:60], answer[:200])
        assert httpx.get(cluster.base_url + "/healthz").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Length": "10"},
        {"Content-Type": "text/plain"},
        {"Authorization": "Bearer \xff"},
        {"X-Request-Id": "a b"},
    ],
)
def test_odd_headers_do_no_harm(cluster: Cluster, headers: dict[str, str]) -> None:
    if "Content-Length" in headers:
        request = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: 10\r\n\r\n{}"
        )
        host, port = cluster.address.split(":")
        with socket.create_connection((host, int(port)), timeout=LIMIT) as connection:
            connection.sendall(request % cluster.api_key.encode())  # and goes: the other 8 bytes never come
    else:
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        response = cluster.http.post(CHAT, json=BODY, headers=encoded)
        assert response.status_code == (401 if "Authorization" in headers else 200)
        assert re.fullmatch("[A-Za-z0-9._-]+", response.headers["X-Request-Id"])
    assert cluster.say("still there").choices[0].message.content == "still there"


# --- backends that fail ---------------------------------------------------------------------------------------------


def failure(cluster: Cluster, text: str, model: str = "echo", *, stream: bool) -> tuple[str, openai.APIError]:
    """What a request said before it failed, and how it failed."""
    said: list[str] = []

    def listen() -> None:
        answer = cluster.say(text, model=model, stream=stream)
        said.extend(chunk.choices[0].delta.content or "" for chunk in (answer if stream else ()))

    with pytest.raises(openai.APIError) as caught:
        listen()
    return "".join(said), caught.value


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 3])
def test_a_request_that_two_backends_died_of_fails_with_their_words(calm: Cluster, stream: bool, after: int) -> None:
    logged = len(calm.node_log())
    said, error = failure(calm, f"[[echo tokens=9 delay_ms=100 exit_after={after} again=1]]", stream=stream)
    assert said.startswith("0 1 2") if stream and after else said == ""
    assert "exit code 3" in str(error)
    assert "echo was told to exit" in str(error)
    if isinstance(error, openai.APIStatusError):
        assert error.status_code in (500, 503)
    # Other models never noticed.
    assert calm.say("next door", model="echo-one").choices[0].message.content == "next door"
    calm.until_serving("echo")
    until(lambda: calm.replicas("echo")[0]["state"] == "ready", LIMIT, "its report, which an answer may outrun")
    fresh = calm.node_log()[logged:]
    assert re.search(r"echo\.1@alpha.*exit code 3.*echo was told to exit", fresh, re.S)


def test_a_stream_whose_backend_died_goes_on_with_the_next_one(calm: Cluster) -> None:
    chunks = list(calm.say("[[echo tokens=9 delay_ms=100 exit_after=3]]", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "0 1 2 3 4 5 6 7 8"
    job = calm.ended_job(chunks[0].id.removeprefix("chatcmpl-"))
    assert (job["state"], job["attempt"], job["usage"]["completion_tokens"]) == ("done", 2, 9)
    calm.until_serving("echo")


def test_a_completion_whose_backend_died_goes_on_behind_its_prompt(calm: Cluster) -> None:
    prompt = "[[echo tokens=9 delay_ms=100 exit_after=3]]"
    chunks = list(calm.openai.completions.create(model="echo", prompt=prompt, stream=True, max_tokens=9))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "0 1 2 3 4 5 6 7 8"
    assert calm.ended_job(chunks[0].id.removeprefix("cmpl-"))["attempt"] == 2
    calm.until_serving("echo")


def test_a_stream_of_the_real_model_goes_on_as_the_engine_continues_what_was_said(calm: Cluster) -> None:
    question = [{"role": "user", "content": "Tell me a long story of the sea and of those who live by it."}]
    body = {"model": CHAT_MODEL, "temperature": 0, "extra_body": {"cache_prompt": False}}
    usage = {"stream_options": {"include_usage": True}, "stream": True}
    stream = calm.openai.chat.completions.create(messages=question, max_tokens=160, **usage, **body)
    job = next(stream).id.removeprefix("chatcmpl-")
    for _ in range(10):
        next(stream)
    os.kill(calm.pids(f"-n {CHAT_MODEL}.1@alpha")[0], signal.SIGKILL)
    end = list(stream)[-1].usage
    entries = [(place[:1], decode(fields[b"e"])) for place, fields in calm.redis().xrange(f"gen:{job}")]
    deltas = [(attempt, event) for attempt, event in entries if isinstance(event, Delta)]
    said = {wanted: "".join(event.text for attempt, event in deltas if attempt == wanted) for wanted in (b"1", b"2")}
    tokens = {wanted: sum(event.tokens for attempt, event in deltas if attempt == wanted) for wanted in (b"1", b"2")}
    assert said[b"1"], "some of it was said before the replica died"
    assert said[b"2"], "and some after"
    prefix = [*question, {"role": "assistant", "content": said[b"1"]}]
    rest = calm.openai.chat.completions.create(messages=prefix, max_tokens=160 - tokens[b"1"], **usage, **body)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest if chunk.choices) == said[b"2"]
    assert end.completion_tokens == sum(tokens.values())
    whole = calm.openai.chat.completions.create(messages=question, max_tokens=1, **body).usage
    assert end.prompt_tokens == whole.prompt_tokens, "what was said is not counted as the prompt's"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 2])
def test_a_generation_that_fails_says_the_backends_words_and_the_replica_stays(
    calm: Cluster, stream: bool, after: int
) -> None:
    before = calm.replicas("echo")
    said, error = failure(calm, f"[[echo tokens=5 delay_ms=100 fail_after={after}]]", stream=stream)
    assert said == ("0 1" if stream and after else "")
    assert "echo was told to fail" in str(error)
    if not (stream and after):
        assert isinstance(error, openai.InternalServerError)
        assert error.code == "backend_failed"
    assert calm.replicas("echo") == before
    assert calm.say("goes on").choices[0].message.content == "goes on"


def test_a_failed_stream_ends_with_the_error_and_without_done(calm: Cluster) -> None:
    body = {**BODY, "messages": [{"role": "user", "content": "[[echo tokens=5 delay_ms=100 fail_after=2]]"}]}
    with calm.http.stream("POST", CHAT, json={**body, "stream": True}) as response:
        data = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert response.status_code == 200
    assert json.loads(data[-1].removeprefix("data: "))["error"]["code"] == "backend_failed"
    assert "data: [DONE]" not in data
    job = calm.ended_job(response.headers["X-LocalAI-Job"])
    assert (job["state"], job["error"]["error"]) == ("failed", "GenerationFailed")


@pytest.mark.parametrize("stream", [False, True])
def test_bytes_that_are_no_text_are_replaced_and_the_rest_arrives(calm: Cluster, stream: bool) -> None:
    answer = calm.say("[[echo tokens=4 garbage_after=1]]", stream=stream)
    text = (
        "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        if stream
        else answer.choices[0].message.content
    )
    assert text.replace("\N{REPLACEMENT CHARACTER}", "?") == "0???garbage? 2 3"
    assert calm.say("the pipes are clean").choices[0].message.content == "the pipes are clean"


def test_a_wedged_backend_is_found_by_its_silence_and_replaced(calm: Cluster) -> None:
    logged, old = len(calm.node_log()), calm.pids("echo-one.1@alpha")
    answer = calm.say("[[echo tokens=5 delay_ms=50 wedge_after=2]]", model="echo-one", stream=True)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    assert said == "0 1 2 3 4"  # the next one went on
    assert calm.say("next door").choices[0].message.content == "next door"
    calm.until_serving("echo-one")
    assert not set(old) & set(calm.pids("echo-one.1@alpha"))
    assert "did not answer 3 health checks" in calm.node_log()[logged:]
