"""A client that went away comes back for its answer; what it may ask for and what is refused."""

import json
from collections.abc import Iterator

import httpx
import pytest
from e2e_cluster import CHAT_MODEL, Cluster, until
from waiting import LIMIT

SLOW = "[[echo tokens=40 delay_ms=40]]"
WHOLE = " ".join(map(str, range(40)))


def ask(text: str = SLOW, **more: object) -> dict[str, object]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], "stream": True, **more}


def events(response: httpx.Response) -> Iterator[tuple[str, str]]:
    """(id, data) of each server-sent event as it comes."""
    event_id = ""
    for line in response.iter_lines():
        if line.startswith("id: "):
            event_id = line[4:]
        elif line.startswith("data: "):
            yield event_id, line[6:]
            event_id = ""


def text_of(found: list[tuple[str, str]]) -> str:
    chunks = [json.loads(data) for _, data in found if data.startswith("{")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


def begun(cluster: Cluster, count: int = 5, **headers: str) -> list[tuple[str, str]]:
    """The first events of a stream whose client then disconnects."""
    with cluster.http.stream("POST", "/v1/chat/completions", json=ask(), headers=headers) as response:
        assert response.status_code == 200
        stream = events(response)
        return [next(stream) for _ in range(count)]


def rest(cluster: Cluster, last: str, method: str = "GET", path: str = "") -> list[tuple[str, str]]:
    path = path or f"/api/jobs/{last.partition(':')[0]}/stream"
    with cluster.http.stream(method, path, headers={"Last-Event-ID": last} if last else {}) as response:
        assert response.status_code == 200, response.read()
        return list(events(response))


def refused(response: httpx.Response, status: int, words: str) -> None:
    assert (response.status_code, words in response.text) == (status, True), response.text
    assert set(response.json()) == {"error"}


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("POST", "/v1/chat/completions")])
def test_a_client_that_comes_back_gets_exactly_the_rest(calm: Cluster, method: str, path: str) -> None:
    seen = begun(calm, **{"X-LocalAI-Resumable": "1"})
    last = seen[-1][0]
    job = last.partition(":")[0]
    more = rest(calm, last, method, path)
    assert text_of(seen + more) == WHOLE
    assert more[-1] == ("", "[DONE]")
    ids = [event_id for event_id, data in seen + more if data != "[DONE]"]
    indexes = [int(event_id.rpartition("-")[2]) for event_id in ids]
    assert indexes == list(range(1, len(indexes) + 1)), "one event for each entry, none twice and none left out"
    with calm.http.stream("GET", f"/api/jobs/{job}/stream") as response:
        assert list(events(response)) == seen + more, "who asks for all of it gets the same bytes again"
    assert rest(calm, ids[-1]) == [more[-1]]
    assert calm.ended_job(job)["attempt"] == 1


def test_usage_and_roles_come_once_however_often_a_client_comes_back(calm: Cluster) -> None:
    body = ask("[[echo tokens=4]]", stream_options={"include_usage": True}, n=2)
    with calm.http.stream("POST", "/v1/chat/completions", json=body) as response:
        whole = list(events(response))
    assert len({event_id for event_id, _ in whole[:-1]}) == len(whole) - 1
    for cut in range(1, len(whole)):
        assert rest(calm, whole[cut - 1][0]) == whole[cut:]


def test_the_real_model_goes_on_while_its_client_is_away(calm: Cluster) -> None:
    body = ask("Tell me of the sea.", model=CHAT_MODEL, max_tokens=24, temperature=0)
    reference = calm.http.post("/v1/chat/completions", json={**body, "stream": False}).json()
    headers = {"X-LocalAI-Resumable": "1"}
    with calm.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        stream = events(response)
        seen = [next(stream) for _ in range(2)]
    assert text_of(seen + rest(calm, seen[-1][0])) == reference["choices"][0]["message"]["content"]


@pytest.mark.parametrize("path", ["/v1/completions", "/completions"])
def test_a_completion_is_come_back_to_with_its_prompt_once(calm: Cluster, path: str) -> None:
    body = {"model": "echo", "prompt": "one two three", "echo": True, "stream": True, "max_tokens": 9}
    with calm.http.stream("POST", path, json=body) as response:
        whole = list(events(response))
    again = rest(calm, whole[0][0], "POST", path)
    assert again == whole[1:]
    first = json.loads(whole[0][1])["choices"][0]["text"]
    assert first.startswith("one two three")
    assert not json.loads(again[0][1])["choices"][0]["text"].startswith("one two three")


def test_the_answer_can_be_had_in_one_piece(calm: Cluster) -> None:
    seen = begun(calm, **{"X-LocalAI-Resumable": "1"})
    job = seen[0][0].partition(":")[0]
    answer = calm.http.get(f"/api/jobs/{job}/result").json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == WHOLE
    assert answer["usage"]["completion_tokens"] == 40


@pytest.mark.parametrize("how", [{"headers": {"X-LocalAI-Background": "1"}}, {"background": True}])
def test_a_request_in_the_background_is_promised_and_its_answer_fetched_later(
    calm: Cluster, how: dict[str, object]
) -> None:
    headers = how.get("headers")
    body = ask(stream=False, **{name: value for name, value in how.items() if name != "headers"})
    promise = calm.http.post("/v1/chat/completions", json=body, headers=headers)
    assert promise.status_code == 202
    told = promise.json()
    assert told == {"id": told["id"], "object": "job", "state": "open", "result": f"/api/jobs/{told['id']}/result"}
    assert (promise.headers["Location"], promise.headers["X-LocalAI-Job"]) == (told["result"], told["id"])
    answer = calm.http.get(told["result"]).json()
    assert answer["choices"][0]["message"]["content"] == WHOLE
    assert calm.http.get(told["result"]).json() == answer
    refused(calm.http.get(f"/api/jobs/{told['id']}/stream"), 400, "does not stream")


def test_embeddings_can_be_made_in_the_background(calm: Cluster, vectors: str) -> None:
    promise = calm.http.post("/v1/embeddings", json={"model": vectors, "input": ["a", "b"], "background": True})
    answer = calm.http.get(promise.json()["result"]).json()
    assert [item["index"] for item in answer["data"]] == [0, 1]


def test_a_stream_in_the_background_goes_on_to_its_end_without_a_reader(calm: Cluster) -> None:
    seen = begun(calm, **{"X-LocalAI-Background": "1"})
    job = seen[0][0].partition(":")[0]
    assert calm.ended_job(job)["state"] == "done"
    assert text_of(seen + rest(calm, seen[-1][0])) == WHOLE


def test_a_second_reader_keeps_the_job_alive_when_the_first_one_leaves(calm: Cluster) -> None:
    with calm.http.stream("POST", "/v1/chat/completions", json=ask()) as response:
        stream = events(response)
        seen = [next(stream) for _ in range(3)]
        job = seen[0][0].partition(":")[0]
        with calm.http.stream("GET", f"/api/jobs/{job}/stream") as second:
            other = events(second)
            followed = [next(other) for _ in range(3)]
            response.close()
            followed += list(other)
    assert text_of(followed) == WHOLE


def test_a_job_that_failed_says_so_to_whoever_comes_back(calm: Cluster) -> None:
    body = ask("[[echo tokens=4 fail_after=2]]")
    with calm.http.stream("POST", "/v1/chat/completions", json=body) as response:
        whole = list(events(response))
    assert "error" in json.loads(whole[-1][1])
    assert rest(calm, whole[0][0]) == whole[1:]
    job = whole[0][0].partition(":")[0]
    assert calm.http.get(f"/api/jobs/{job}/result").status_code == 500
    refused(calm.http.get(f"/api/jobs/{job}/stream", headers={"Last-Event-ID": whole[-1][0]}), 500, "told to fail")


def test_nobody_but_the_key_that_asked_gets_the_answer(calm: Cluster) -> None:
    seen = begun(calm, **{"X-LocalAI-Background": "1"})
    job = seen[0][0].partition(":")[0]
    other = {"Authorization": f"Bearer {calm.cli('keys', 'create', 'stranger').strip()}"}
    for path in ("stream", "result"):
        refused(httpx.get(f"{calm.base_url}/api/jobs/{job}/{path}", headers=other), 404, "with this key")
        assert httpx.get(f"{calm.base_url}/api/jobs/{job}/{path}").status_code == 401
    posted = httpx.post(calm.base_url + "/v1/chat/completions", headers={**other, "Last-Event-ID": seen[0][0]})
    refused(posted, 404, "with this key")
    for method in ("GET", "DELETE"):
        assert httpx.request(method, f"{calm.base_url}/api/jobs/{job}", headers=other).status_code == 404


def test_a_user_sees_and_cancels_a_job_of_his_own(calm: Cluster) -> None:
    key = calm.cli("keys", "create", "owner").strip()
    stream = calm.client(key).chat.completions.create(
        model="echo", messages=[{"role": "user", "content": "[[echo tokens=400 delay_ms=50]]"}], stream=True
    )
    job = next(stream).id.removeprefix("chatcmpl-")
    headers = {"Authorization": f"Bearer {key}"}
    path = f"{calm.base_url}/api/jobs/{job}"
    assert httpx.get(path, headers=headers).json()["live"] == "leased"
    assert httpx.delete(path, headers=headers).json()["state"] in ("cancelling", "cancelled")
    assert calm.ended_job(job)["state"] == "cancelled"
    stream.close()


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ("nonsense", "JOB:ATTEMPT-INDEX"),
        ("{job}:1-", "JOB:ATTEMPT-INDEX"),
        ("{job}:1-99999", "no such event"),
        ("{job}:7-1", "no such event"),
        ("abc:1-1", "another job"),
    ],
)
def test_a_place_that_is_none_is_refused(calm: Cluster, last: str, words: str) -> None:
    with calm.http.stream("POST", "/v1/chat/completions", json=ask("[[echo tokens=2]]")) as response:
        job = next(events(response))[0].partition(":")[0]
    headers = {"Last-Event-ID": last.format(job=job)}
    refused(calm.http.get(f"/api/jobs/{job}/stream", headers=headers), 400, words)


@pytest.mark.parametrize("header", ["X-LocalAI-Resumable", "X-LocalAI-Background"])
def test_a_header_that_is_neither_yes_nor_no_is_refused(calm: Cluster, header: str) -> None:
    refused(calm.http.post("/v1/chat/completions", json=ask(), headers={header: "maybe"}), 400, header)


def test_an_answer_that_is_kept_no_longer_is_gone(calm: Cluster) -> None:
    job = calm.say("soon forgotten").id.removeprefix("chatcmpl-")
    calm.ended_job(job)
    calm.redis().delete(f"job:{job}", f"gen:{job}")
    refused(calm.http.get(f"/api/jobs/{job}/result"), 410, "kept no longer")
    refused(calm.http.get("/api/jobs/unknown/result"), 404, "no job")


def test_who_only_waits_for_a_job_that_is_cancelled_is_told(calm: Cluster) -> None:
    promise = calm.http.post("/v1/chat/completions", json=ask(stream=False, background=True)).json()
    until(lambda: calm.job(promise["id"])["live"] == "leased", LIMIT, "the job at work")
    calm.http.delete(f"/api/jobs/{promise['id']}")
    refused(calm.http.get(promise["result"]), 499, "cancelled")
