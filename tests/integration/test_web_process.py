"""The web process as gunicorn runs it, here with two workers: over HTTP, and by the command line."""

import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from cluster_data import add_model, claim, model_named, ready_node
from gguf_files import gguf, split_into
from prometheus_client.parser import text_string_to_metric_families
from waiting import LIMIT, wait_for

from localai_q import names, ports
from localai_q.bus.connection import client
from localai_q.celery import app
from localai_q.cluster.capacity import Booking
from localai_q.cluster.events import Delta, End, Progress
from localai_q.cluster.nodes import Node
from localai_q.cluster.states import ReplicaState
from localai_q.config import load_settings
from localai_q.embedded.valkey import Valkey
from localai_q.processes import kill_group, spawn, stop, tail
from localai_q.services import backends, fleet, jobs, keys, nodes
from localai_q.services.wiring import Services, connect
from localai_q.store import replicas as replica_rows

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
TOKEN = "join-us"


class Web:
    """Two workers of gunicorn on stores of their own, and the services on the same stores."""

    def __init__(self, home: Path, database_url: str, redis_url: str) -> None:
        self.address = f"127.0.0.1:{ports.choose()}"
        self.url = f"http://{self.address}"
        self.environment = {**os.environ, "LOCALAI_Q_HOME": str(home), "LOCALAI_ADDRESS": self.address,
                            "LOCALAI_DATABASE_URL": database_url, "LOCALAI_REDIS_URL": redis_url,
                            "LOCALAI_REGISTRATION_TOKEN": TOKEN, "LOCALAI_Q_WEB_WORKERS": "2", "LOCALAI_Q_NO_MODEL": "1",
                            "LOCALAI_EXPOSE_NODE_HEADER": "true"}  # fmt: skip
        self.home, self.log = home, home / "web.log"
        self.start()
        key = (home / "admin.key").read_text().strip()
        self.http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=LIMIT, trust_env=False
        )
        self.services: Services = connect(
            load_settings(home=home, database_url=database_url, redis_url=redis_url, registration_token=TOKEN)
        )

    def start(self) -> None:
        argv = [str(BIN / "gunicorn"), "--config", "python:api.gunicorn_conf", "api.wsgi:app"]
        self.process = spawn(argv, env=self.environment, log=self.log, cwd=ROOT)
        assert wait_for(lambda: (self.home / "admin.key").exists() and self.answers()), tail(self.log)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz", trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def cli(self, *arguments: str | bytes, **changes: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [str(BIN / "localai-q"), *arguments],
            env={**self.environment, **changes}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    def models(self) -> set[str]:
        return {model["name"] for model in self.http.get("/api/models").raise_for_status().json()["models"]}


@pytest.fixture(scope="module")
def web(make_database: Callable[..., str], valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    client(valkey.url).flushall()
    found = Web(tmp_path_factory.mktemp("web"), make_database("web"), valkey.url)
    yield found
    found.http.close()
    stop(found.process, 5.0)


def values(web: Web, name: str) -> list[float]:
    text = (
        httpx.get(f"{web.url}/metrics", headers=web.http.headers, timeout=LIMIT, trust_env=False)
        .raise_for_status()
        .text
    )
    families = text_string_to_metric_families(text)
    return [sample.value for family in families for sample in family.samples if sample.name == name]


def test_counters_of_two_web_processes_are_shown_as_one(web: Web) -> None:
    before = sum(values(web, "localai_requests_total"))
    for _ in range(40):  # each over a connection of its own, so that both workers get some
        assert httpx.get(f"{web.url}/healthz", timeout=LIMIT, trust_env=False).is_success
    counts = {sum(values(web, "localai_requests_total")) - before for _ in range(6)}
    assert counts == {41, 42, 43, 44, 45, 46}
    assert len(list((web.log.parent / "run" / "metrics").glob("counter_*.db"))) == 2


def test_a_name_is_one_part_of_a_path_whatever_it_holds(web: Web) -> None:
    for name in ("keepme", "a/b", "a//b", "a/"):
        add_model(web.services, name)
    for wrong in ("keepme?x=1", "keepme#x", "x/../keepme", "%6beepme"):
        code, _, err = web.cli("models", "remove", wrong)
        assert (code, f"There is no model '{wrong}'" in err) == (1, True), err
    assert web.models() >= {"keepme", "a/b", "a//b", "a/"}
    for name in ("a/", "a/b", "a//b"):
        assert web.cli("models", "remove", name) == (0, f"Removed {name}.\n", "")
        assert name not in web.models()
    assert "keepme" in web.models()


@pytest.mark.parametrize(
    ("arguments", "changes", "fix"),
    [
        (["nodes", "list"], {"LOCALAI_Q_API": "http://[::1"}, "set LOCALAI_Q_API"),
        (["nodes", "list"], {"LOCALAI_API_KEY": "schlüssel"}, "the key or an argument"),
        (["models", "remove", b"\xff"], {}, "the key or an argument"),
    ],
)
def test_what_cannot_be_sent_ends_in_one_line(
    web: Web, arguments: list[str | bytes], changes: dict[str, str], fix: str
) -> None:
    code, _, err = web.cli(*arguments, **changes)
    assert code == 1
    assert fix in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("limit=²", "'limit' needs a number from 1 to 1000"),
        ("limit=٣", "'limit'"),
        ("limit=0", "'limit'"),
        (f"limit={'9' * 5000}"[:4000], "'limit'"),
        ("state=open,bogus", "'state' needs one or more of open, done, failed, cancelled"),
        ("kind=bogus", "'kind' needs one or more of chat, completion"),
    ],
)
def test_a_list_of_jobs_refuses_what_it_does_not_know_by_name(web: Web, query: str, words: str) -> None:
    answer = web.http.get(f"/api/jobs?{query}")
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert web.http.get("/api/jobs?state=open,done&kind=chat,fetch_model&limit=1000").status_code == 200


def test_a_model_name_has_no_line_end(web: Web) -> None:
    assert web.http.post("/api/models", json={"name": "parrot\n", "backend": "echo"}).status_code == 400


@pytest.mark.parametrize(
    ("header", "host"),
    [("[::1]", "[::1]"), ("[fd00::7]:8080", "[fd00::7]"), ("one", "one"), ("10.1.1.1:80", "10.1.1.1")],
)
def test_a_node_is_told_of_redis_by_the_host_that_it_called(web: Web, header: str, host: str) -> None:
    name = names.new_id()
    body = {"name": name, "token": TOKEN, "secret_hash": "0" * 64}
    assert (
        httpx.post(f"{web.url}/api/node/register", json=body, timeout=LIMIT, trust_env=False).json()["state"]
        == "pending"
    )
    web.http.post(f"/api/nodes/{name}/approve").raise_for_status()
    answer = httpx.post(
        f"{web.url}/api/node/register", json=body, headers={"Host": header}, timeout=LIMIT, trust_env=False
    )
    assert f"@{host}:" in answer.json()["redis_url"]
    broken = httpx.post(
        f"{web.url}/api/node/register", json=body, headers={"Host": "[::1"}, timeout=LIMIT, trust_env=False
    )
    assert broken.status_code == 400


def test_a_stream_that_is_claimed_late_names_its_node_all_the_same(web: Web) -> None:
    node = ready_node(web.services, "late")
    line = names.model_queue(add_model(web.services, "slow"))
    seen: dict[str, str] = {}

    def ask() -> None:
        body = {"model": "slow", "messages": [{"role": "user", "content": "x"}], "stream": True}
        with web.http.stream("POST", "/v1/chat/completions", json=body) as response:
            seen.update({name.lower(): value for name, value in response.headers.items()})
            seen["text"] = response.read().decode()

    asking = threading.Thread(target=ask)
    asking.start()
    assert wait_for(lambda: web.services.leases.waiting(line))
    time.sleep(3.0)  # more than headers wait for a first event otherwise
    assert not seen
    lease = claim(web.services, web.services.leases.waiting(line)[0], line, node.id)
    assert wait_for(lambda: bool(seen)), "the headers wait for more than the claim"
    web.services.leases.append([(lease, lease.last_index + 1, [Delta(text="hi")])])
    web.services.leases.finish(lease, lease.last_index + 2, End(state="done"), node_id=node.id)
    asking.join(LIMIT)
    assert seen["x-localai-node"] == "late"
    assert values(web, "localai_time_to_first_token_seconds_count") == [1.0]
    assert wait_for(lambda: values(web, "localai_generation_seconds_count")) == [1.0]
    assert f"id: {lease.job_id}:1-{lease.last_index + 1}\n" in seen["text"]


def test_a_piped_table_has_whole_ids_on_one_line_each(web: Web) -> None:
    name = "a-person-with-a-long-name-" * 3
    made, _ = keys.create(web.services, name=name, role="user")
    code, out, err = web.cli("keys", "list", COLUMNS="80")
    assert code == 0, err
    assert any(made.id in line and name in line for line in out.splitlines())
    assert all(key["id"] for key in json.loads(web.cli("keys", "list", "--json")[1]))


def test_nodes_are_labelled_shown_drained_and_deleted_by_the_command_line(web: Web) -> None:
    ready_node(web.services, "attic")

    def said(*arguments: str, code: int = 0) -> str:
        found, out, err = web.cli("nodes", *arguments)
        assert found == code, err
        return out if code == 0 else err

    assert said("label", "attic", "zone=home", "tier=slow").splitlines() == [
        "node.name=attic  (found by itself)", "node.replica-slots=1  (found by itself)", "tier=slow", "zone=home"
    ]  # fmt: skip
    assert "tier" not in said("label", "attic", "tier-")
    assert "zone=home" in said("list")
    assert "write zone=VALUE, or zone-" in said("label", "attic", "zone", code=1)
    assert "Invalid value" in said("label", "attic", "zone=a,b", code=1)
    assert "attic is draining" in said("drain", "attic")
    shown = said("show", "attic")
    assert "0 copies, 0 at work" in shown
    assert "zone=home" in shown
    assert json.loads(web.cli("nodes", "show", "attic", "--json")[1])[0]["state"] == "draining"
    assert "drain it (localai-q nodes drain attic)" in said("delete", "attic", code=1)
    assert "attic is ready" in said("resume", "attic")
    assert "Deleted attic" in said("delete", "attic", "--force")
    assert "There is no node 'attic'" in said("show", "attic", code=1)
    for command in ("drain", "resume", "delete", "label", "show"):
        assert "name or id" in said(command, "--help")


def test_a_model_is_changed_by_the_command_line_and_what_is_not_said_stays(web: Web) -> None:
    name = "org/changed"

    def shown() -> dict:
        return next(model for model in web.http.get("/api/models").json()["models"] if model["name"] == name)

    code, _, err = web.cli("models", "add", name, "--backend", "echo", "--slots", "2", "--selector", "a=b", "--pinned")
    assert code == 0, err
    before = shown()
    assert web.cli("models", "edit", name, "--max-replicas", "3", "--no-pinned") == (
        0, f"Changed {name}, which is at revision 1.\n", ""
    )  # fmt: skip
    assert web.cli("models", "edit", name, "--option", "delay_ms:5", "--selector", "", "--threads", "1")[0] == 0
    changes = {
        "max_replicas": 3,
        "pinned": False,
        "options": ["delay_ms:5"],
        "selector": {},
        "threads": 1,
        "revision": 2,
    }
    assert shown() == {**before, **changes}
    for arguments, words in (
        ([], "nothing to change"),
        (["--slots", "0"], "'slots'"),
        (["--selector", "x"], "key=value"),
    ):
        code, _, err = web.cli("models", "edit", name, *arguments)
        assert (code, len(err.splitlines())) == (1, 1)
        assert words in err
    assert "There is no model 'nobody'" in web.cli("models", "edit", "nobody", "--slots", "3")[2]


def test_the_log_of_a_job_is_followed_and_jobs_are_paused_and_pruned_by_the_command_line(web: Web) -> None:
    services = web.services
    app.conf.broker_url = services.settings.redis_url
    node = ready_node(services, "logger", "of-logger")
    line = names.node_jobs_queue(node.id)

    def fetch(name: str) -> str:
        request = {"kind": "fetch_model", "source": "https://x.example/m", "name": name}
        return jobs.submit_node_job(services, kind="fetch_model", node_id=node.id, model_id=None, request=request)

    job_id = fetch("m")
    with subprocess.Popen([str(BIN / "localai-q"), "jobs", "log", job_id, "--follow"], env=web.environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # fmt: skip
        lease = claim(services, job_id, line, node.id)
        steps = [Progress(stage="downloading", done=done, total=2, unit="bytes") for done in (1, 2)]
        services.leases.append([(lease, lease.last_index + 1, steps)])
        end = End(state="failed", error={"error": "Unavailable", "message": "no network"})
        assert process.stdout.readline() == "downloading\n"
        services.leases.finish(lease, lease.last_index + 3, end, node_id=node.id)
        jobs.apply_ends(services)
        out, err = process.communicate(timeout=30)
    assert (out, err) == ("downloading: 2 of 2 bytes\nfailed: no network\n", "localai-q: no network\n")
    assert process.returncode == 1
    assert web.cli("jobs", "log", job_id)[:2] == (0, f"downloading\n{out}")
    assert web.cli("jobs", "log", job_id, "--follow")[0] == 1

    paused = fetch("other")
    assert web.cli("jobs", "pause", paused)[0] == 0
    jobs.apply_ends(services)
    assert " paused " in web.cli("jobs", "list", "--node", "logger", "--state", "cancelled")[1]
    assert "has ended" in web.cli("jobs", "pause", paused)[2]
    assert web.cli("jobs", "prune", "--older", "1h")[1] == "Removed 0 jobs.\n"
    prune = ("jobs", "prune", "--older", "0s", "--state", "failed,cancelled", "--kind", "fetch_model")
    assert web.cli(*prune)[1] == "Removed 1 jobs.\n"  # one that is paused can be gone on with
    assert web.cli("jobs", "cancel", paused)[0] == 0
    assert web.cli(*prune)[1] == "Removed 1 jobs.\n"
    assert "--older needs" in web.cli("jobs", "prune", "--older", "soon")[2]


def test_followers_that_leave_at_any_time_leave_nothing_open(web: Web) -> None:
    services = web.services
    app.conf.broker_url = services.settings.redis_url
    node = ready_node(services, "followed", "of-followed")
    request = {"kind": "fetch_model", "source": "https://x.example/m", "name": "m"}
    job_id = jobs.submit_node_job(services, kind="fetch_model", node_id=node.id, model_id=None, request=request)
    of_model = names.model_queue(add_model(services, "nowhere", selector={"node.name": "nowhere"}))
    chat = json.dumps({"model": "nowhere", "stream": True, "messages": [{"role": "user", "content": "x"}]})
    key, place = web.http.headers["authorization"], urlsplit(web.url)
    asked = (
        f"GET /api/jobs/{job_id}/events HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n\r\n",
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nContent-Length: {len(chat)}\r\n\r\n{chat}",
    )

    def descriptors() -> int:
        workers = psutil.Process(web.process.pid).children()
        return sum(worker.num_fds() for worker in workers)

    def wave(count: int) -> None:
        """So many clients of each kind leave at once, when headers come, and with a reset."""
        lines = []
        for number in range(count):
            for text in asked:
                line = socket.create_connection((place.hostname, place.port))
                line.sendall(text.encode())
                lines.append((number % 3, line))
        assert wait_for(lambda: len(services.leases.waiting(of_model)) == count, 30)
        begun = [claim(services, chatted, of_model, node.id) for chatted in services.leases.waiting(of_model)]
        services.leases.append([(lease, lease.last_index + 1, [Delta(text="x")]) for lease in begun])
        for how, line in lines:
            if how:
                line.settimeout(30)
                assert line.recv(4096).startswith(b"HTTP/1.1 200")
            if how == 2:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            line.close()

    def added() -> int:
        """How many descriptors 24 clients leave behind; some are connections to the stores, which later ones use."""
        before = descriptors()
        wave(12)
        assert wait_for(lambda: not services.leases.live([job_id])[job_id].watchers, 60)
        wait_for(lambda: descriptors() <= before, 10, 0.1)
        return descriptors() - before

    grown = [added()]
    while grown[-1] > 6 and len(grown) < 6:
        grown.append(added())
    assert grown[-1] <= 6, grown
    assert services.leases.waiting(names.node_jobs_queue(node.id)) == [job_id]
    web.cli("models", "remove", "nowhere")


def test_what_no_node_could_have_is_changed_by_the_command_line_with_force_only(web: Web) -> None:
    services = web.services
    node = ready_node(services, "forced", "of-forced")
    add_model(services, "forced", selector={"node.name": "forced"})
    model = model_named(services, "forced")
    with services.db.transaction() as db:
        booking = Booking()
        replica_rows.enter(db, "forcedreplica", ReplicaState.READY, booking=booking, model_id=model.id, node_id=node.id,
                           number=1, revision=1, slots=1)  # fmt: skip
    change = ("models", "edit", "forced", "--selector", "node.name=nowhere")
    assert "force" in web.cli(*change)[2]
    assert web.cli(*change, "--force")[0] == 0
    assert model_named(services, "forced").config.selector == {"node.name": "nowhere"}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"colour": "red"}, 400, "Unknown parameter: 'colour'"),
        ({"slots": "many"}, 400, "'slots'"),
        ([], 400, "object"),
        ({"backend": "nonesuch"}, 404, "nonesuch"),
    ],
)
def test_a_change_that_cannot_be_is_refused_by_name(web: Web, body: object, status: int, words: str) -> None:
    if "steady" not in web.models():
        add_model(web.services, "steady")
    answer = web.http.patch("/api/models/steady", json=body)
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (status, True), answer.text
    assert web.http.patch("/api/models/nobody", json={}).status_code == 404


def test_what_comes_after_a_change_bears_its_revision_in_every_web_process(web: Web) -> None:
    add_model(web.services, "moving")
    body = {"model": "moving", "messages": [{"role": "user", "content": "x"}], "background": True}

    def ask(_: int) -> str:
        answer = httpx.post(
            f"{web.url}/v1/chat/completions", json=body, headers=web.http.headers, timeout=LIMIT, trust_env=False
        )
        return web.services.redis.hget(names.job_key(answer.raise_for_status().json()["id"]), "revision")

    for revision in range(2, 7):
        assert {ask(number) for number in range(4)} == {str(revision - 1)}  # and each process looks at the registry
        changed = web.http.patch("/api/models/moving", json={"slots": revision}).raise_for_status().json()
        assert (changed["revision"], changed["slots"]) == (revision, revision)
        assert {ask(number) for number in range(4)} == {str(revision)}


def test_scheduling_rules_have_localais_paths(web: Web) -> None:
    add_model(web.services, "rule/d")
    rule = {"model_name": "rule/d", "node_selector": {"a": "b"}, "max_replicas": 2}
    assert web.http.post("/api/nodes/scheduling", json=rule).json().items() >= rule.items()
    assert web.http.get("/api/nodes/scheduling/rule/d").json().items() >= rule.items()
    assert "rule/d" in [each["model_name"] for each in web.http.get("/api/nodes/scheduling").json()["scheduling"]]
    assert web.http.delete("/api/nodes/scheduling/rule/d").json() == {"model_name": "rule/d", "reset": True}
    assert web.http.get("/api/nodes/scheduling/rule/d").json()["max_replicas"] == 1
    assert web.http.post("/api/nodes/scheduling", json={**rule, "colour": 1}).status_code == 400
    assert web.http.get("/api/nodes/scheduling/nobody").status_code == 404


@pytest.fixture
def attic(web: Web) -> Iterator[Node]:
    """A node of the test's own, and no other: what is asked of all nodes is asked of it."""
    for other in fleet.listed(web.services):
        nodes.remove(web.services, other["id"], force=True)
    app.conf.broker_url = web.services.settings.redis_url
    yield ready_node(web.services, "attic")
    nodes.remove(web.services, "attic", force=True)


def working(web: Web, node: Node, *arguments: str, end: End) -> tuple[int, str, str]:
    """What a command says while the node does its next job, which ends so."""
    said: list[tuple[int, str, str]] = []
    thread = threading.Thread(target=lambda: said.append(web.cli(*arguments)))
    thread.start()
    line = names.node_jobs_queue(node.id)

    def waiting() -> list[str]:
        backends.fulfil(web.services)
        return web.services.leases.waiting(line)

    (job_id,) = wait_for(waiting)
    lease = claim(web.services, job_id, line, node.id)
    web.services.leases.append([(lease, lease.last_index + 1, [Progress(stage="installing", done=1, total=2)])])
    web.services.leases.finish(lease, lease.last_index + 2, end, node_id=node.id)
    while thread.is_alive():
        jobs.apply_ends(web.services)
        backends.fulfil(web.services)
        thread.join(0.1)
    return said[0]


def test_what_is_to_be_upgraded_is_shown_by_the_command_line(web: Web, attic: Node) -> None:
    assert web.cli("backends", "upgrades")[:2] == (0, "Nothing to upgrade.\n")
    told = {"name": "echo", "version": "0.1", "digest": "a" * 64, "build": "cpu", "installed_at": 1.5}
    nodes.heartbeat(web.services, attic, hardware={"backends": [told]})
    assert " 0.1 " in web.cli("backends", "upgrades", "--check")[1]
    found = json.loads(web.cli("backends", "upgrades", "--json")[1])
    assert found["echo"]["node_drift"][0]["node_name"] == "attic"


def test_models_are_imported_from_a_folder_of_a_node_by_the_command_line(web: Web, attic: Node) -> None:
    line, sha256 = names.node_jobs_queue(attic.id), "c" * 64
    listed = [{"path": "/srv/tiny.gguf", "size": 9, "facts": None, "refused": None},
              {"path": "/srv/big-00001-of-00002.gguf", "size": 9, "facts": None, "refused": "two files"}]  # fmt: skip

    def run(*arguments: str, ends: list[dict]) -> tuple[int, str, str]:
        said: list[tuple[int, str, str]] = []
        thread = threading.Thread(target=lambda: said.append(web.cli("models", "import-folder", "attic", *arguments)))
        thread.start()
        for end in ends:
            (job_id,) = wait_for(lambda: web.services.leases.waiting(line), 30)
            lease = claim(web.services, job_id, line, attic.id)
            asked.append(lease.request)
            web.services.leases.finish(lease, lease.last_index + 1, End(state="done", result=end), node_id=attic.id)
            jobs.apply_ends(web.services)
        nodes.heartbeat(web.services, attic, hardware={"files": [sha256]})
        thread.join(60)
        return said[0]

    asked: list[dict] = []
    code, out, err = run(ends=[{"files": listed}])
    assert (code, "/srv/tiny.gguf" in out, "two files" in out) == (0, True, True), err
    assert "tiny" not in web.models()
    brought = [{"path": "/srv/tiny.gguf", "sha256": sha256, "size": 9, "facts": None, "refused": None, "further": []}]
    big = {"path": "/srv/big-00001-of-00002.gguf", "further": [{"sha256": sha256, "size": 4}]}
    brought.append({**brought[0], **big})
    for arguments in (("/srv", "--all"), ("/srv", "--only", "tiny.gguf")):
        code, out, err = run(*arguments, ends=[{"files": listed}, {"files": brought}])
        assert asked[-2]["folder"] == "/srv"
        assert asked[-1]["files"] == ["/srv/tiny.gguf"]
        if arguments[1] == "--all":
            assert (code, "tiny" in web.models()) == (0, True), err
    assert (code, "no model was added" in err) == (1, True)
    model = next(each for each in web.http.get("/api/models").json()["models"] if each["name"] == "tiny")
    assert (model["source"], model["sha256"], model["size"]) == ("file:/srv/tiny.gguf", sha256, 9)
    model = next(each for each in web.http.get("/api/models").json()["models"] if each["name"] == "big")
    assert model["parts"] == [{"source": "file:/srv/big-00002-of-00002.gguf", "sha256": sha256, "size": 4}]
    code, _, err = run("--only", "big-00001-of-00002.gguf", ends=[{"files": listed}])
    assert (code, "two files" in err) == (1, True)
    for name in ("tiny", "big"):
        web.cli("models", "remove", name)
    for path, body in (("scan", {"folder": "srv"}), ("scan", {"x": 1}), ("import", {"files": []}),
                       ("import", {"files": ["/a\n"]}), ("import", {"files": ["a"]})):  # fmt: skip
        assert web.http.post(f"/api/nodes/attic/files/{path}", json=body).status_code == 400
    nodes.deregister(web.services, attic)
    assert web.http.post("/api/nodes/attic/files/scan", json={}).status_code == 409


def test_a_model_in_several_files_is_added_by_its_first_by_the_command_line(web: Web, tmp_path: Path) -> None:
    paths = split_into(tmp_path, gguf(), 3)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]

    def shown() -> dict:
        return next(each for each in web.http.get("/api/models").json()["models"] if each["name"] == "several")

    code, _, err = web.cli("models", "add", "several", "--file", str(paths[1]))
    assert (code, f"name the first of them, {paths[0]}" in err) == (1, True), err
    paths[2].rename(tmp_path / "away")
    code, _, err = web.cli("models", "add", "several", "--file", str(paths[0]))
    assert (code, "not beside it: m-00003-of-00003.gguf" in err) == (1, True), err
    assert web.http.head(f"/api/files/{digests[0]}").status_code == 404, "nothing is sent in vain"
    (tmp_path / "away").rename(paths[2])
    code, _, err = web.cli("models", "add", "several", "--file", str(paths[0]))
    assert (code, shown()["source"]) == (0, f"store:{digests[0]}"), err
    assert [(part["source"], part["size"]) for part in shown()["parts"]] == [
        (f"store:{digest}", path.stat().st_size) for digest, path in zip(digests[1:], paths[1:], strict=True)
    ]
    away = [
        "--source",
        "https://host/big-00001-of-00003.gguf",
        *(word for digest in digests for word in ("--sha256", digest)),
    ]
    code, _, err = web.cli("models", "edit", "several", *away[:-2])
    assert (code, "'parts': it needs the 2 files behind the first" in err) == (1, True), err
    code, _, err = web.cli("models", "edit", "several", *away)
    assert (code, shown()["sha256"]) == (0, digests[0]), err
    assert shown()["parts"][1] == {"source": "https://host/big-00003-of-00003.gguf", "sha256": digests[2], "size": 0}
    web.cli("models", "remove", "several")


INSTALLED = End(state="done", result={"name": "echo"})
NO_NETWORK = End(state="failed", error={"error": "Unavailable", "message": "no network"})


def test_a_backend_is_installed_on_a_node_by_the_command_line(web: Web, attic: Node) -> None:
    install = ("backends", "install", "echo", "--node", "attic")
    code, out, err = working(web, attic, *install, end=INSTALLED)
    assert (code, "done" in out) == (0, True), err
    code, _, err = working(web, attic, *install, end=NO_NETWORK)
    assert (code, err.splitlines()[-1]) == (1, "localai-q: no network")
    code, out, err = working(web, attic, *install, "--json", end=NO_NETWORK)
    failed = json.loads(out)
    assert (code, failed["state"], err) == (1, "failed", "localai-q: no network\n")
    code, out, _ = web.cli("jobs", "retry", failed["id"])
    assert code == 0
    again = out.strip()
    assert web.cli("jobs", "cancel", again)[0] == 0
    jobs.apply_ends(web.services)
    assert web.cli("jobs", "watch", again)[0] == 1
    shown = json.loads(web.cli("jobs", "list", "--kind", "install_backend", "--json")[1])
    assert {job["subject"] for job in shown} == {"echo"}


def test_who_follows_a_job_outlasts_an_api_that_is_started_anew(web: Web, attic: Node) -> None:
    job_id = web.cli("backends", "install", "echo", "--node", "attic", "--no-wait")[1].strip()
    lease = claim(web.services, job_id, names.node_jobs_queue(attic.id), attic.id)
    web.services.leases.append([(lease, lease.last_index + 1, [Progress(stage="installing", done=1, total=2)])])
    followers = [
        subprocess.Popen([str(BIN / "localai-q"), "jobs", *how, job_id], env=web.environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for how in (("watch",), ("log", "--follow"))
    ]  # fmt: skip
    assert all("installing" in follower.stdout.readline() for follower in followers)
    kill_group(web.process)
    web.start()
    web.services.leases.finish(lease, lease.last_index + 2, INSTALLED, node_id=attic.id)
    jobs.apply_ends(web.services)
    said = [follower.communicate(timeout=LIMIT)[0] for follower in followers]
    assert [follower.returncode for follower in followers] == [0, 0], said


def test_a_backend_is_changed_on_all_nodes_by_the_command_line(web: Web, attic: Node) -> None:
    code, out, err = working(web, attic, "backends", "install", "echo", "--all", end=INSTALLED)
    assert (code, "attic" in out) == (0, True), err
    code, out, err = working(web, attic, "backends", "install", "echo", "--all", "--json", end=NO_NETWORK)
    assert (code, json.loads(out)[0]["nodes"][0]["attempts"]) == (1, 1)
    assert "not done on attic" in err
    told = {"name": "echo", "version": "1", "digest": "a" * 64, "build": "cpu"}
    nodes.heartbeat(web.services, attic, hardware={"backends": [told]})
    assert "aaaaaaaaaaaa" in web.cli("backends", "list")[1]
    assert json.loads(web.cli("backends", "list", "--json")[1])[0]["nodes"][0]["node_name"] == "attic"
    assert {"xllamacpp", "builtin"} <= set(web.cli("backends", "list", "--available")[1].split())
    given = ("--uri", "https://x.example/b.tgz", "--sha256", "1" * 64, "--alias", "ours")
    code, out, err = working(web, attic, "backends", "install", "mine", "--node", "attic", *given, end=INSTALLED)
    assert (code, "done" in out) == (0, True), err
    shown = {one["name"]: one for one in json.loads(web.cli("backends", "list", "--available", "--json")[1])}
    assert (shown["mine"]["alias"], shown["mine"]["description"]) == ("ours", "From https://x.example/b.tgz")
    code, out, _ = web.cli("backends", "delete", "echo", "--all", "--no-wait")
    assert (code, json.loads(web.http.get(f"/backends/jobs/{out.strip()}").text)["op"]) == (0, "delete")
    nodes.deregister(web.services, attic)
    code, _, err = web.cli("backends", "upgrade", "echo", "--all")
    assert (code, "not done on attic" in err) == (1, True), err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("install", "echo"), "--node NAME or --all"),
        (("install", "echo", "--node", "a", "--all"), "--node NAME or --all"),
        (("install", "echo", "--node", "a", "--selector", "x=y"), "--selector narrows --all"),
        (("install", "echo", "--all", "--selector", "x"), "--selector needs key=value"),
        (("install", "ghost", "--all"), "no backend 'ghost'"),
        (("install", "mine", "--all", "--alias", "x"), "--alias go with --uri"),
        (("install", "mine", "--all", "--uri", "https://x.example/b.tgz"), "needs its SHA-256"),
        (("install", "mine", "--node", "attic", "--uri", "oci://x.example/b:1"), "no node 'attic'"),
        (("delete", "echo", "--all"), "No node is to delete backend 'echo'"),
    ],
)
def test_a_change_of_backends_that_makes_no_sense_ends_in_one_line(
    web: Web, arguments: tuple[str, ...], says: str
) -> None:
    code, _, err = web.cli("backends", *arguments)
    assert code == 1
    assert says in err
    assert len(err.splitlines()) == 1


def test_models_are_written_down_and_read_again_by_the_command_line(web: Web, tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(
        "name: parrot\nbackend: echo\nslots: 2\n---\n- name: a/b:c\n  backend: echo\n  parameters: {top_k: 3}\n"
    )
    code, out, err = web.cli("models", "apply", str(file))
    assert (code, out) == (0, "parrot is at revision 1.\na/b:c is at revision 1.\n"), err
    written = web.cli("models", "show", "parrot", "--yaml")[1]
    assert written == "name: parrot\nbackend: echo\nslots: 2\n"
    assert web.http.get("/api/models/config-json/a/b:c").json()["parameters"] == {"top_k": 3}
    file.write_text(written.replace("2", "3"))
    assert web.cli("models", "apply", str(file))[1] == "parrot is at revision 2.\n"
    assert json.loads(web.cli("models", "show", "parrot", "--json")[1])["slots"] == 3
    for text, says in (("- 1", "it needs a name"), ("", "no models in it"), ("a: [", "no YAML"),
                       ("{name: parrot, slot: 1}", "parrot: Unknown parameter: 'slot'")):  # fmt: skip
        file.write_text(text)
        code, _, err = web.cli("models", "apply", str(file))
        assert (code, says in err) == (1, True), err
    assert "no model 'x'" in web.cli("models", "show", "x")[2]
    assert web.cli("models", "edit", "parrot", "--disabled")[0] == 0
    assert wait_for(lambda: "parrot" not in {model["id"] for model in web.http.get("/v1/models").json()["data"]})
    asked = {"model": "parrot", "messages": [{"role": "user", "content": "Hi"}]}
    answer = web.http.post("/v1/chat/completions", json=asked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "model_disabled")
    assert web.cli("chat", "--model", "parrot", "Hi")[2].endswith("--no-disabled'.\n")
    for name in ("parrot", "a/b:c"):
        assert web.cli("models", "remove", name)[0] == 0


def test_localais_paths_of_models(web: Web, tmp_path: Path) -> None:
    def post(path: str, **more: object) -> httpx.Response:
        return web.http.post(path, **more)

    made = post("/models/apply", json={"id": "builtin@qwen3-0.6b", "name": "q/1"}).json()
    job = web.http.get(made["status"]).json()
    assert (job["gallery_element_name"], job["processed"], job["deletion"]) == ("q/1", False, False)
    assert web.http.get("/models/jobs").json() == {made["uuid"]: job}
    shown = web.http.get(f"/api/models/job/{made['uuid']}").json()
    assert (shown["galleryElementName"], shown["completed"], job.items() <= shown.items()) == ("q/1", False, True)
    assert web.http.get("/models/jobs/nope1").status_code == 404
    assert web.http.put("/models/toggle-state/q/1/disable").json()["disabled"] is True
    assert web.http.put("/models/toggle-pinned/q/1/pin").json()["pinned"] is True
    assert web.http.put("/models/toggle-pinned/q/1/up").status_code == 400
    assert web.http.get("/api/models/vram-estimate/q/1").status_code == 409
    assert post("/models/reload").json()["success"] is True
    taken = post(
        "/models/import", content=b"name: th\nbackend: echo\nf16: true\n", headers={"Content-Type": "text/yaml"}
    )
    assert (taken.status_code, taken.json()["models"][0]["warnings"]) == (
        201,
        ["f16 is left out: the engine decides that"],
    )
    assert post("/models/edit/th", content=b"backend: echo\nthreads: 2\n").json()["config_revision"] == 2
    assert post("/models/import-uri", json={"uri": "ollama://x", "preferences": None}).json()["name"] == "x"
    wanted = {"name": "y", "embeddings": "true", "quantizations": "q8_0", "pipeline_type": "z", "scheduler_type": ""}
    found = post("/models/import-uri", json={"uri": "ollama://y", "preferences": wanted}).json()
    assert (found["name"], [warning.split()[0] for warning in found["warnings"]]) == (
        "y", ["preferences.pipeline_type", "preferences.quantizations"])  # fmt: skip
    refused = post("/models/import-uri", json={"uri": "ollama://z", "preferences": {"embeddings": "perhaps"}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "preferences.embeddings")
    installed = post("/api/models/install/smollm2-360m-instruct", json={"preload": False}).json()
    assert (installed["name"], installed["jobID"]) == ("smollm2-360m-instruct", installed["uuid"])
    assert web.http.get(f"/api/models/job/{installed['jobID']}").json()["completed"] is True
    for path, body in (("/models/apply", {"id": "nope"}), ("/models/import-uri", {}), ("/models/apply", {"x": 1})):
        assert post(path, json=body).status_code in (400, 404)
    key = web.http.post("/api/keys", json={"name": "u", "role": "user"}).json()["key"]
    as_user = {"Authorization": f"Bearer {key}"}
    assert web.http.get("/models/available", headers=as_user).status_code == 403
    assert web.http.get("/models", headers=as_user).status_code == 200
    assert web.http.get("/models/galleries").json() == []
    for path in (
        "/models/delete/q/1",
        "/models/delete/th",
        "/api/models/delete/x",
        "/models/delete/smollm2-360m-instruct",
    ):
        assert post(path).json()["processed"] is True
    assert web.http.get(made["status"]).status_code == 404


def test_models_are_imported_and_installed_by_the_command_line(web: Web, tmp_path: Path) -> None:
    assert "qwen3-0.6b" in web.cli("models", "available")[1]
    code, out, err = web.cli("models", "install", "qwen3-0.6b", "--no-wait")
    assert (code, "Added qwen3-0.6b" in out) == (0, True), err
    assert "installed" in json.dumps(json.loads(web.cli("models", "available", "--json")[1])[0])
    file = tmp_path / "their.yaml"
    file.write_text("name: their\nbackend: echo\nmmap: true\n")
    code, out, err = web.cli("models", "import", str(file))
    assert (code, "mmap is left out" in out) == (0, True), err
    file.write_text("name: their2\nbackend: vllm\n")
    code, _, err = web.cli("models", "import", str(file))
    assert (code, "'vllm' is none of" in err) == (1, True)
    assert web.cli("models", "import", "ollama://tiny", "--name", "t")[0] == 0
    assert web.cli("models", "import", "https://x.example/u.gguf", "--sha256", "a" * 64)[0] == 0
    code, out, err = web.cli(
        "models", "import", "ollama://e", "--embeddings", "--quantization", "q8_0", "--quantization", "f16"
    )
    assert (code, "preferences.quantizations is left out" in out) == (0, True), err
    assert json.loads(web.cli("models", "show", "e", "--json")[1])["embeddings"] is True
    assert "'none' is none of" in web.cli("models", "import", "ollama://f", "--backend", "none")[2]
    assert "go with a URI" in web.cli("models", "import", str(file), "--sha256", "a" * 64)[2]
    for name in ("qwen3-0.6b", "their", "t", "u", "e"):
        assert web.cli("models", "remove", name)[0] == 0
