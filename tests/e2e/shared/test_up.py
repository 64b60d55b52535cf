"""`localai-q up` and the command line, as a person types them."""

import json
import os
import re
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from e2e_cluster import CHAT_MODEL, Cluster, clean_environment, until
from waiting import LIMIT


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_holds_secrets_can_be_read_by_its_owner_only(cluster: Cluster) -> None:
    identity = cluster.home / "worker" / "nodes" / "alpha" / "identity.json"
    secret = [cluster.home / name for name in ("ready.json", "admin.key", "state.json")]
    assert not list(identity.parent.glob("run/*.json")), "what children are told is removed once they have read it"
    for path in [*secret, identity]:
        assert mode(path) == 0o600, path
    for socket in identity.parent.glob("run/*.sock"):
        assert mode(socket) == 0o600, socket


def test_ready_json_has_the_facts(cluster: Cluster) -> None:
    assert set(cluster.ready) == {"base_url", "api_key", "flower_url", "node_ids", "model"}
    assert cluster.ready["base_url"] == cluster.base_url
    assert cluster.ready["model"] == CHAT_MODEL
    assert cluster.ready["api_key"] == (cluster.home / "admin.key").read_text().strip()
    assert len(cluster.ready["node_ids"]) == 1


def test_a_first_start_says_what_it_installs_and_fetches(cluster: Cluster) -> None:
    assert "installing a backend xllamacpp on alpha" in cluster.output()
    assert f"fetching {CHAT_MODEL} on alpha" in cluster.output()


def test_the_printed_curl_line_works_when_pasted(cluster: Cluster) -> None:
    line = next(line.strip() for line in cluster.output().splitlines() if line.strip().startswith("curl "))
    done = subprocess.run(["bash", "-c", line], env=clean_environment(), capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["model"] == CHAT_MODEL
    assert answer["choices"][0]["message"]["content"]


def test_a_second_up_on_the_same_home_says_that_one_runs(cluster: Cluster) -> None:
    line = cluster.cli("up", code=1)
    assert len(line.splitlines()) == 1
    assert f"pid {cluster.process.pid}" in line


def test_a_second_start_takes_seconds_and_finds_keys_and_models(start_cluster: Callable[..., Cluster]) -> None:
    own = start_cluster()
    own.cli("models", "add", "parrot", "--backend", "echo")
    key = own.cli("keys", "create", "kept").strip()
    address, api_key = own.base_url, own.api_key
    said = own.client(key).chat.completions.create(
        model="parrot", messages=[{"role": "user", "content": "remember me"}]
    )
    assert own.stop() < 10
    assert not (own.home / "ready.json").exists()
    took = own.start()
    assert took < 15, f"the second start took {took:.1f} s"
    assert (own.base_url, own.api_key) == (address, api_key)
    assert {model.id for model in own.client(key).models.list()} == {CHAT_MODEL, "parrot"}
    assert own.job(said.id.removeprefix("chatcmpl-"))["state"] == "done"
    answer = own.client(key).chat.completions.create(
        model="parrot", messages=[{"role": "user", "content": "remember me"}]
    )
    assert answer.choices[0].message.content == "remember me"
    assert own.stop() < 10


@pytest.fixture(scope="module")
def pair(homes: Path) -> Iterator[Cluster]:
    """A cluster of two nodes without the default model, for tests that break or change it."""
    own = Cluster(homes / "pair", "--nodes", "2", "--no-model")
    own.start()
    yield own
    own.stop()


def test_two_nodes_on_one_machine_share_the_work(pair: Cluster) -> None:
    assert len(pair.ready["node_ids"]) == 2
    assert pair.ready["model"] is None
    pair.cli("models", "add", "echo", "--backend", "echo", "--slots", "1", "--spread")
    until(lambda: [r["state"] for r in pair.replicas("echo")] == ["ready"] * 2, 60, "a replica on each node")
    assert {replica["node"] for replica in pair.replicas("echo")} == {"alpha", "alpha-2"}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: pair.say("[[echo tokens=10 delay_ms=100]]"), range(4)))
    nodes = [pair.ended_job(answer.id.removeprefix("chatcmpl-"))["node"] for answer in answers]
    assert sorted(nodes) == ["alpha", "alpha", "alpha-2", "alpha-2"]


def test_an_own_file_is_added_used_listed_and_removed(cluster: Cluster, weights: Path) -> None:
    added = cluster.cli("models", "add", "mine", "--file", str(weights), "--context-size", "512", "--slots", "1")
    assert added.strip() == "Added mine. Try: localai-q chat --model mine"
    listed = {model["name"]: model for model in json.loads(cluster.cli("models", "list", "--json"))}
    assert listed["mine"]["source"] == f"store:{weights.name}"
    assert listed["mine"]["size"] == weights.stat().st_size
    answer = cluster.say("Name a river.", model="mine", max_tokens=3)
    assert answer.usage.completion_tokens == 3
    assert "mine" in cluster.cli("models", "list")
    assert "already" in cluster.cli("models", "add", "mine", "--file", str(weights), code=1)
    assert cluster.cli("models", "remove", "mine").strip() == "Removed mine."
    assert "mine" not in {model["name"] for model in json.loads(cluster.cli("models", "list", "--json"))}
    assert "There is no model 'mine'" in cluster.cli("models", "remove", "mine", code=1)
    until(lambda: not cluster.pids("mine.1@alpha"), LIMIT, "the end of the removed model's replica")


def test_what_is_no_model_file_is_refused_in_one_line(cluster: Cluster, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.gguf"
    wrong.write_text("hello")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 100)
    for arguments, words in [
        (["--file", str(wrong)], "is no GGUF file"),
        (["--file", str(damaged)], "no usable GGUF file"),
        (["--file", str(tmp_path / "missing.gguf")], "cannot read"),
        (["--backend", "xllamacpp"], "needs a file"),
        (["--backend", "nothing"], "no backend"),
        (["--backend", "echo", "--selector", "zone"], "--selector needs key=value"),
        (["--backend", "echo", "--min-replicas", "2"], "min_replicas (2) is above max_replicas (1)"),
    ]:
        line = cluster.cli("models", "add", "wrong", *arguments, code=1)
        assert words in line
        assert len(line.splitlines()) == 1


def test_a_key_is_made_listed_and_revoked(cluster: Cluster) -> None:
    key = cluster.cli("keys", "create", "ci").strip()
    assert key.startswith("lai-")
    cluster.client(key).models.list()
    [record] = [each for each in json.loads(cluster.cli("keys", "list", "--json")) if each["name"] == "ci"]
    assert record["role"] == "user"
    assert key not in json.dumps(record)
    assert "ci" in cluster.cli("keys", "list")
    assert cluster.cli("keys", "revoke", record["id"]).strip() == f"Revoked {record['id']}."
    headers = {"Authorization": f"Bearer {key}"}
    until(
        lambda: httpx.get(cluster.base_url + "/v1/models", headers=headers).status_code == 401, LIMIT, "the key's end"
    )


def test_nodes_and_jobs_are_listed_shown_and_cancelled(calm: Cluster) -> None:
    nodes = json.loads(calm.cli("nodes", "list", "--json"))
    assert [node["name"] for node in nodes if node["state"] == "ready"] == ["alpha"]
    assert "alpha" in calm.cli("nodes", "list")
    stream = calm.say("[[echo tokens=400 delay_ms=50]]", stream=True)
    job_id = next(stream).id.removeprefix("chatcmpl-")
    [listed] = json.loads(calm.cli("jobs", "list", "--json", "--state", "open", "--kind", "chat"))
    assert (listed["id"], listed["live"]) == (job_id, "leased")
    row = next(
        line for line in calm.cli("jobs", "list", "--state", "open", COLUMNS="200").splitlines() if job_id in line
    )
    assert "running" in row
    assert json.loads(calm.cli("jobs", "show", job_id))["model"] == "echo"
    assert re.fullmatch(f"{job_id}: cancell(ing|ed)\n", calm.cli("jobs", "cancel", job_id))
    assert calm.ended_job(job_id)["state"] == "cancelled"
    stream.close()
    assert "There is no job 'nothing'" in calm.cli("jobs", "show", "nothing", code=1)


def test_chat_answers_in_the_terminal(cluster: Cluster) -> None:
    assert cluster.cli("chat", "say this again", "--model", "echo") == "say this again\n"
    talk = cluster.cli("chat", "--model", "echo", stdin="first\n\nsecond\n")
    assert "first" in talk
    assert "second" in talk
    assert "model 'nothing' does not exist" in cluster.cli("chat", "x", "--model", "nothing", code=1)


@pytest.mark.parametrize("command", [["nodes", "list"], ["chat", "x"], ["models", "list"], ["keys", "list"]])
def test_a_wrong_address_ends_in_one_line(cluster: Cluster, command: list[str]) -> None:
    line = cluster.cli(*command, code=1, LOCALAI_Q_API="http://127.0.0.1:9")
    assert len(line.splitlines()) == 1
    assert "no cluster answers at http://127.0.0.1:9" in line
    assert "LOCALAI_Q_API" in line


def test_a_wrong_key_ends_in_one_line(cluster: Cluster) -> None:
    line = cluster.cli("nodes", "list", code=1, LOCALAI_API_KEY="lai-wrong")
    assert len(line.splitlines()) == 1
    assert "LOCALAI_API_KEY" in line


def test_a_killed_process_is_started_again_and_said_so(pair: Cluster) -> None:
    for words in ("gunicorn", "-Q control", "flower"):
        pid = pair.pids(words)[0]
        os.kill(pid, signal.SIGKILL)
        until(lambda words=words, pid=pid: (found := pair.pids(words)) and pid not in found, LIMIT, f"a new {words}")
    assert pair.output().count("was killed by SIGKILL; starting it again") == 3

    def ready() -> bool:
        try:
            return httpx.get(pair.base_url + "/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    until(ready, LIMIT, "readiness")
    pair.until_serving("echo")


def test_reset_admin_replaces_the_generated_key(pair: Cluster) -> None:
    old = pair.api_key
    line = pair.cli("keys", "reset-admin")
    assert str(pair.home / "admin.key") in line
    assert (pair.home / "admin.key").read_text().strip() != old
    assert mode(pair.home / "admin.key") == 0o600
    assert len(json.loads(pair.cli("nodes", "list", "--json"))) == 2
    headers = {"Authorization": f"Bearer {old}"}
    until(
        lambda: httpx.get(pair.base_url + "/api/nodes", headers=headers).status_code == 401, LIMIT, "the old key's end"
    )
