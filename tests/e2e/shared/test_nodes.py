"""A second machine joins with two settings, works, and leaves; what dies is noticed, and dies as a whole."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
import redis
from e2e_cluster import CHAT_MODEL, Cluster, Joiner, printed_settings, processes_of, until
from waiting import LIMIT


def state_of(cluster: Cluster, name: str) -> str:
    node = cluster.node(name)
    return node["state"] if node else "unknown"


def replica_states(cluster: Cluster, node: str) -> dict[str, str]:
    found = cluster.node(node)
    return {replica["model"]: replica["state"] for replica in found["replicas"]} if found else {}


def test_a_second_node_joins_works_and_leaves_while_the_first_serves(
    calm: Cluster, join: Callable[..., Joiner]
) -> None:
    settings = printed_settings(calm)
    beta = join("beta", **settings)
    until(lambda: state_of(calm, "beta") == "pending", LIMIT, "beta's registration")
    until(lambda: "localai-q nodes approve beta" in beta.log(), LIMIT, "the command that approves it, in its log")
    assert replica_states(calm, "beta") == {}

    calm.cli("nodes", "approve", "beta")
    until(lambda: state_of(calm, "beta") == "ready", LIMIT, "beta's approval")
    until(lambda: replica_states(calm, "beta").get("echo") == "ready", 60, "the echo replica of beta")
    until(lambda: replica_states(calm, "beta").get(CHAT_MODEL) == "ready", 90, "the default model's replica of beta")
    assert "echo-one" not in replica_states(calm, "beta"), "a model that is not spread stays where it is"

    # Work: eight at once over two replicas of four slots.
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: calm.say("[[echo tokens=20 delay_ms=40]]"), range(8)))
    nodes = [calm.ended_job(answer.id.removeprefix("chatcmpl-"))["node"] for answer in answers]
    assert nodes.count("beta") == 4
    assert nodes.count("alpha") == 4

    # A node has no way to the database, nor has anything that it starts.
    own = processes_of(beta.home)
    assert len(own) >= 6  # node, jobs, and two replicas with a backend each
    for process in own:
        environment = process.environ()
        assert not [name for name, value in environment.items() if "DATABASE" in name or "postgres" in value], process

    # It leaves while it streams: each stream ends whole, or says why it does not.
    def stream(_: int) -> tuple[str, str]:
        said = ""
        try:
            for chunk in calm.say("[[echo tokens=60 delay_ms=50]]", stream=True):
                said += chunk.choices[0].delta.content or ""
        except openai.APIError as error:
            return said, str(error)
        return said, ""

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, number) for number in range(8)]
        until(lambda: sum(job["live"] == "leased" for job in calm.open_generations()) == 8, LIMIT, "eight at work")
        assert {job["node"] for job in calm.open_generations()} == {"alpha", "beta"}
        beta.term()
        ends = [each.result(LIMIT) for each in streams]
    for said, why in ends:
        assert said == " ".join(map(str, range(60))) or why, (said, why)
    assert sum(not why for _, why in ends) >= 4, ends

    until(lambda: state_of(calm, "beta") == "offline", LIMIT, "beta's goodbye")
    assert replica_states(calm, "beta") == {}
    for number in range(4):
        answer = calm.say(f"goes on {number}")
        assert calm.ended_job(answer.id.removeprefix("chatcmpl-"))["node"] == "alpha"

    # Approval is kept: it comes back without being asked for again, finds its files, and needs no download.
    again = join("beta", **settings)
    until(lambda: replica_states(calm, "beta").get(CHAT_MODEL) == "ready", 60, "beta's return")
    again.term()
    until(lambda: state_of(calm, "beta") == "offline", LIMIT, "beta's second goodbye")


def test_a_node_is_drained_while_it_streams_stays_so_and_is_deleted(calm: Cluster, join: Callable[..., Joiner]) -> None:
    settings = printed_settings(calm)
    delta = join("drained", **settings)
    until(lambda: state_of(calm, "drained") == "pending", LIMIT, "its registration")
    calm.cli("nodes", "approve", "drained")
    until(lambda: replica_states(calm, "drained").get("echo") == "ready", 90, "its echo replica")

    def stream(_: int) -> str:
        return "".join(
            chunk.choices[0].delta.content or "" for chunk in calm.say("[[echo tokens=80 delay_ms=100]]", stream=True)
        )

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, number) for number in range(8)]
        until(lambda: sum(job["live"] == "leased" for job in calm.open_generations()) == 8, LIMIT, "eight at work")
        calm.cli("nodes", "drain", "drained")
        until(lambda: replica_states(calm, "drained").get("echo") == "stopping", LIMIT, "the stop of its replica")
        remains = calm.node("drained")["remains"]
        assert remains["in_flight"] == 4, remains
        assert "4 at work" in calm.cli("nodes", "list")
        assert "stopping" in calm.cli("nodes", "show", "drained")
        ends = [each.result(LIMIT) for each in streams]
    assert ends == [" ".join(map(str, range(80)))] * 8, "it ends what it has, however long that takes"
    until(lambda: state_of(calm, "drained") == "drained", LIMIT, "the end of what it held")
    assert replica_states(calm, "drained") == {}
    for number in range(4):
        answer = calm.say(f"goes on {number}")
        assert calm.ended_job(answer.id.removeprefix("chatcmpl-"))["node"] == "alpha"

    # It stays drained when it is started again, and works again when it is told to.
    delta.term()
    until(lambda: state_of(calm, "drained") == "offline", LIMIT, "its goodbye")
    again = join("drained", **settings)
    until(lambda: state_of(calm, "drained") == "drained", LIMIT, "its return")
    calm.cli("nodes", "resume", "drained")
    until(lambda: replica_states(calm, "drained").get("echo") == "ready", 60, "its replica's return")

    # What is deleted ends.
    assert "drain" in calm.cli("nodes", "delete", "drained", code=1)
    calm.cli("nodes", "delete", "drained", "--force")
    again.process.wait(LIMIT)
    assert again.log().count("was removed from the cluster") == 1
    assert not processes_of(again.home)
    assert calm.node("drained") is None


def test_streams_end_whole_when_redis_is_killed_and_forgets_every_user(calm: Cluster) -> None:
    def stream(_: int) -> str:
        chunks = calm.say("[[echo tokens=60 delay_ms=150]]", stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    [valkey] = calm.pids("valkey-server")
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream, number) for number in range(4)]
        until(lambda: sum(job["live"] == "leased" for job in calm.open_generations()) == 4, LIMIT, "four at work")
        os.kill(valkey, signal.SIGKILL)
        ends = [each.result(60) for each in streams]
    assert ends == [" ".join(map(str, range(60)))] * 4
    assert calm.pids("valkey-server") not in ([], [valkey])
    calm.until_serving("echo")
    calm.until_serving("echo-one")
    assert calm.say("as before").choices[0].message.content == "as before"


def test_what_a_killed_node_has_started_dies_within_two_seconds(calm: Cluster, join: Callable[..., Joiner]) -> None:
    gamma = join("gamma", **printed_settings(calm))
    until(lambda: state_of(calm, "gamma") == "pending", LIMIT, "gamma's registration")
    calm.cli("nodes", "approve", "gamma")
    until(lambda: replica_states(calm, "gamma").get("echo") == "ready", 90, "gamma's echo replica")
    children = [process for process in processes_of(gamma.home) if process.pid != gamma.process.pid]
    assert any("server.py" in " ".join(process.cmdline()) for process in children), "a backend is among them"
    gamma.process.kill()
    gamma.process.wait()
    _, alive = psutil.wait_procs(children, timeout=LIMIT)
    left = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not left, left
    # The others serve on, whatever was sent to it.
    for number in range(3):
        assert calm.say(f"still here {number}").choices[0].message.content == f"still here {number}"


def test_a_wrong_token_ends_the_node_with_one_clear_line(cluster: Cluster, join: Callable[..., Joiner]) -> None:
    settings = {**printed_settings(cluster), "LOCALAI_REGISTRATION_TOKEN": "lq-wrong"}
    node = join("wrong-token", **settings)
    assert node.process.wait(LIMIT) == 1
    lines = [line for line in node.log().splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert "registration token is wrong" in lines[0]
    assert cluster.node("wrong-token") is None


def test_a_name_that_is_taken_ends_the_node_with_one_clear_line(cluster: Cluster, join: Callable[..., Joiner]) -> None:
    node = join("alpha", **printed_settings(cluster))
    assert node.process.wait(LIMIT) == 1
    lines = [line for line in node.log().splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert "LOCALAI_NODE_NAME" in lines[0]
    assert state_of(cluster, "alpha") == "ready"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "LOCALAI_REGISTER_TO"),
        ({"LOCALAI_REGISTER_TO": "http://127.0.0.1:9"}, "LOCALAI_REGISTRATION_TOKEN"),
        ({"LOCALAI_REGISTER_TO": "nonsense", "LOCALAI_REGISTRATION_TOKEN": "x"}, "is no URL"),
    ],
)
def test_what_is_missing_is_named_in_one_line(
    settings: dict[str, str], words: str, join: Callable[..., Joiner]
) -> None:
    node = join("lost", **settings)
    assert node.process.wait(LIMIT) == 1
    lines = [line for line in node.log().splitlines() if line.strip()]
    node.output.unlink()
    assert len(lines) == 1, lines
    assert words in lines[0]


def test_a_killed_replica_is_reported_and_comes_back(calm: Cluster) -> None:
    logged = len(calm.node_log())
    [pid, *_] = calm.pids("-n echo.1@alpha")
    [backend] = [child for child in psutil.Process(pid).children() if "server.py" in " ".join(child.cmdline())]
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([backend], timeout=LIMIT)
    assert not backend.is_running() or backend.status() == psutil.STATUS_ZOMBIE
    until(lambda: "echo.1@alpha failed" in calm.node_log()[logged:], LIMIT, "the node's report")
    assert re.search(r"echo\.1@alpha failed: the replica ended with exit code -9", calm.node_log()[logged:])
    calm.until_serving("echo")
    assert pid not in calm.pids("-n echo.1@alpha")


def test_work_of_a_killed_replica_is_taken_up_again_or_fails_with_a_reason(calm: Cluster) -> None:
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(calm.say, "[[echo tokens=20 delay_ms=50]]", "echo-one")
        until(lambda: [job["live"] for job in calm.open_generations()] == ["leased"], LIMIT, "the job at work")
        os.kill(calm.pids("-n echo-one.1@alpha")[0], signal.SIGKILL)
        failure = whole.exception(50)
    if failure is None:
        assert whole.result().choices[0].message.content == " ".join(map(str, range(20)))
    else:
        assert isinstance(failure, openai.InternalServerError)
        assert "exit code -9" in failure.message
    calm.until_serving("echo-one")


def test_no_process_of_a_node_knows_the_database(calm: Cluster) -> None:
    nodes = [p for p in processes_of(calm.home) if p.environ().get("LOCALAI_Q_HOME") == str(calm.home / "worker")]
    commands = "\n".join(" ".join(process.cmdline()) for process in nodes)
    assert len(nodes) >= 8
    assert "server.py" in commands
    assert "-n echo.1@alpha" in commands
    database = calm.state()["database_url"]
    sockets = re.search("host=([^&]+)", database)[1]
    for process in nodes:
        environment = process.environ()
        assert "LOCALAI_DATABASE_URL" not in environment
        assert not [name for name, value in environment.items() if sockets in value or "postgresql" in value]
    for spec in (calm.home / "worker").rglob("*.json"):
        assert "postgresql" not in spec.read_text(), spec


def test_a_node_may_not_speak_for_another(cluster: Cluster) -> None:
    token = cluster.state()["registration_token"]
    digest = "ab" * 32
    body = {"name": "delta", "token": token, "secret_hash": digest, "version": "0", "hardware": {}}
    answer = httpx.post(cluster.base_url + "/api/node/register", json=body)
    assert answer.status_code == 201
    assert answer.json()["state"] == "pending"
    assert "redis_url" not in answer.json(), "what is not approved learns nothing"
    secret = json.loads((cluster.home / "worker/nodes/alpha/identity.json").read_text())["secret"]
    headers = {"Authorization": f"Bearer {secret}"}
    other = f"{cluster.base_url}/api/node/{answer.json()['id']}/heartbeat"
    assert httpx.post(other, json={}, headers=headers).status_code == 403
    own = f"{cluster.base_url}/api/node/{cluster.ready['node_ids'][0]}/heartbeat"
    began = time.time()
    assert httpx.post(own, json={"replicas": []}, headers=headers).status_code == 200
    assert cluster.node("alpha")["last_heartbeat"] >= began - 1


def test_a_nodes_secret_changes_while_it_works_and_the_one_before_opens_nothing(calm: Cluster) -> None:
    file = calm.home / "worker/nodes/alpha/identity.json"
    node_id, old = calm.ready["node_ids"][0], json.loads(file.read_text())["secret"]
    running = {replica["id"] for replica in calm.node("alpha")["replicas"] if replica["state"] == "ready"}
    with ThreadPoolExecutor(4) as pool:
        told = [pool.submit(calm.say, "[[echo tokens=150 delay_ms=50]]") for _ in range(4)]
        until(lambda: len(calm.open_generations()) == 4, LIMIT, "four at work")
        assert "makes itself a new secret" in calm.cli("nodes", "rotate", "alpha")
        until(lambda: json.loads(file.read_text()).keys() == {"secret", "since"} and old not in file.read_text(), LIMIT,
              "a new secret")  # fmt: skip
        headers = {"Authorization": f"Bearer {old}"}
        assert httpx.post(f"{calm.base_url}/api/node/{node_id}/heartbeat", json={}, headers=headers).status_code == 403
        with calm.redis() as client:
            address = {name: client.connection_pool.connection_kwargs[name] for name in ("host", "port")}
            with pytest.raises(redis.AuthenticationError):
                redis.Redis(**address, username=f"node-{node_id}", password=old).ping()
            settled = client.acl_getuser(f"node-{node_id}")["passwords"]
        assert len(settled) == 1
        texts = [answer.result(60).choices[0].message.content for answer in told]
    assert len({len(text.split()) for text in texts}) == 1, "no answer lacks a word"
    calm.say("again")
    calm.say("again", model="echo-one")
    ready = {replica["id"] for replica in calm.node("alpha")["replicas"] if replica["state"] == "ready"}
    assert running <= ready, "nothing was loaded again"


def test_a_node_is_on_redis_as_itself_and_lacks_nothing_there(calm: Cluster) -> None:
    user = f"node-{calm.ready['node_ids'][0]}"
    calm.say("to have worked")
    with calm.redis() as client:
        users = {connection["user"] for connection in client.client_list()}
        denied = [entry for entry in client.acl_log() if entry["reason"] in ("command", "key", "channel")]
    assert user in users
    assert not denied, denied
    password = re.search(":([^:@]+)@", calm.state()["redis_url"])[1]
    for process in processes_of(calm.home / "worker"):
        assert password not in " ".join(process.environ().values()), process
    for path in (calm.home / "worker").rglob("*.json"):
        assert password not in path.read_text(), path
