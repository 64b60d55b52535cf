"""A whole cluster, as tests of whole clusters see it: `localai-q up` on a home of its own, and what surrounds it.

Nothing here stands in for a real part: gunicorn, Celery, Postgres, Valkey, gRPC backends and SmolLM2 all run.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import psycopg2
import pytest
import redis
from openai import OpenAI
from waiting import LIMIT

from localai_q import ports

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[1]
CHAT_MODEL = "smollm2-135m-instruct"
START = 120.0  # seconds that a first start may take
ANSWER = 120.0  # seconds that a client waits for a byte: two cores may have more to do than a real model
STOP = 60.0  # seconds that a stop may take, with all processes that are paged in again for it

T = TypeVar("T")


def until(probe: Callable[[], T], timeout: float, what: str) -> T:
    """The first true result of `probe`; fails with `what` and the last result when none comes in time."""
    deadline = time.monotonic() + timeout
    while True:
        result = probe()
        if result:
            return result
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {timeout:g} s; last seen: {result!r}")
        time.sleep(0.1)


@contextmanager
def folder_of_homes(prefix: str) -> Iterator[Path]:
    """A folder for the homes of clusters: short, because sockets lie below it."""
    folder = Path(tempfile.mkdtemp(prefix=prefix)).resolve()
    folder.chmod(0o711)  # Postgres runs as a user of its own when the tests run as root
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def clean_environment(**changes: str) -> dict[str, str]:
    """This environment without any setting of ours, and with `changes`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LOCALAI_")}
    return {**kept, "PATH": f"{BIN}{os.pathsep}{kept['PATH']}", "PYTHONUNBUFFERED": "1", **changes}


def processes_of(home: Path) -> dict[psutil.Process, list[str]]:
    """Every process that works in this home, by its settings, its command line or its folder; and that line."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                continue
            settings, line = process.environ().get("LOCALAI_Q_HOME", ""), process.cmdline()
            if any(f"{text}/".startswith(f"{home}/") for text in (settings, process.cwd(), *line)):
                found[process] = line
        except psutil.Error:
            continue
    return found


def kill_all(home: Path) -> None:
    """End whatever works in this home."""
    for process in processes_of(home):
        with suppress(psutil.NoSuchProcess):
            process.kill()


class Cluster:
    """One `localai-q up`."""

    def __init__(self, home: Path, *arguments: str, **settings: str) -> None:
        self.home = home
        self.address = f"127.0.0.1:{ports.choose()}"
        self.base_url = f"http://{self.address}"
        self._arguments = arguments
        self._settings = {"LOCALAI_NODE_NAME": "alpha", **settings, "LOCALAI_Q_HOME": str(home)}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, timeout: float = START) -> float:
        """Start it and wait until it is ready; returns how many seconds that took."""
        began = time.monotonic()
        self.home.mkdir(parents=True, exist_ok=True)
        environment = clean_environment(**self._settings, LOCALAI_ADDRESS=self.address)
        with (self.home / "up.out").open("ab") as output:
            self.process = subprocess.Popen(
                [str(BIN / "localai-q"), "up", *self._arguments],
                env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        while not (self.home / "ready.json").exists() or "Ctrl-C" not in self.output():
            if self.process.poll() is not None or time.monotonic() - began > timeout:
                tails = self.logs()
                self.kill()
                pytest.fail(f"the cluster is not ready after {time.monotonic() - began:.0f} s\n{tails}")
            time.sleep(0.05)
        self.ready: dict[str, Any] = json.loads((self.home / "ready.json").read_text())
        self.api_key: str = self.ready["api_key"]
        headers = {"Authorization": f"Bearer {self.api_key}"}
        self.http = httpx.Client(base_url=self.base_url, headers=headers, timeout=ANSWER, trust_env=False)
        self.openai = self.client()
        return time.monotonic() - began

    def client(self, key: str = "", prefix: str = "/v1") -> OpenAI:
        """OpenAI's own client, which shows every error at once instead of trying again."""
        return OpenAI(base_url=self.base_url + prefix, api_key=key or self.api_key, max_retries=0, timeout=ANSWER)

    def stop(self) -> float:
        """Ctrl-C; returns how many seconds the end took. Fails when something is left."""
        assert self.process is not None
        began = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(STOP)
        except subprocess.TimeoutExpired:
            left = list(processes_of(self.home).values())
            self.kill()
            pytest.fail(f"the cluster did not end within {STOP:g} s of Ctrl-C; still there: {left}\n{self.logs()}")
        took = time.monotonic() - began
        left = list(processes_of(self.home).values())
        self.kill()
        assert not left, f"processes left behind: {left}"
        assert code == 0, self.output()
        return took

    def kill(self) -> None:
        """End whatever is left of it."""
        kill_all(self.home)
        if self.process:
            self.process.kill()
            self.process.wait()

    def pids(self, *words: str) -> list[int]:
        """The processes whose command line holds all these words, the oldest first."""
        found = [p for p, line in processes_of(self.home).items() if all(word in " ".join(line) for word in words)]
        return [process.pid for process in sorted(found, key=psutil.Process.create_time)]

    def output(self) -> str:
        """What `up` has printed."""
        return (self.home / "up.out").read_text(errors="replace")

    def logs(self) -> str:
        """The end of everything that was logged."""
        paths = [self.home / "up.out", *sorted(self.home.rglob("*.log"))]
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-2000:]}" for path in paths if path.exists())

    def node_log(self) -> str:
        """What the node has logged."""
        return (self.home / "logs" / "node.log").read_text(errors="replace")

    def cli(
        self, *arguments: str, code: int = 0, stdin: str | None = None, timeout: float = 60.0, **settings: str
    ) -> str:
        """Run `localai-q` on this home; its output, or its one line of error for another `code`."""
        environment = clean_environment(LOCALAI_Q_HOME=str(self.home), **settings)
        done = subprocess.run(
            [str(BIN / "localai-q"), *arguments],
            env=environment, input=stdin, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == code, done.stderr or done.stdout
        return done.stdout if code == 0 else done.stderr

    def state(self) -> dict[str, Any]:
        """What `up` generated: the stores' URLs, the registration token, Flower's password."""
        return json.loads((self.home / "state.json").read_text())

    def sql(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Rows of the cluster's own database."""
        connection = psycopg2.connect(self.state()["database_url"].replace("+psycopg2", ""))
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(query, values)
                return cursor.fetchall()
        finally:
            connection.close()

    def redis(self) -> redis.Redis:
        """The cluster's own Valkey."""
        return redis.Redis.from_url(self.state()["redis_url"])

    def jobs(self, **filters: Any) -> list[dict[str, Any]]:
        return self.http.get("/api/jobs", params=filters).raise_for_status().json()["jobs"]

    def job(self, job_id: str) -> dict[str, Any]:
        return self.http.get(f"/api/jobs/{job_id}").raise_for_status().json()

    def ended_job(self, job_id: str, timeout: float = LIMIT) -> dict[str, Any]:
        """The job once its end is written down."""
        until(lambda: self.job(job_id)["state"] != "open", timeout, f"end of job {job_id}")
        return self.job(job_id)

    def open_generations(self) -> list[dict[str, Any]]:
        """Jobs of clients that have not ended."""
        return self.jobs(state="open", kind="chat,completion,embedding", limit=1000)

    def node(self, name: str) -> dict[str, Any] | None:
        nodes = self.http.get("/api/nodes").raise_for_status().json()["nodes"]
        return next((node for node in nodes if node["name"] == name), None)

    def replicas(self, model: str) -> list[dict[str, Any]]:
        models = self.http.get("/api/models").raise_for_status().json()["models"]
        return next(each["replicas"] for each in models if each["name"] == model)

    def say(self, text: str, model: str = "echo", **more: Any) -> Any:
        """One chat of one message, by OpenAI's client."""
        return self.openai.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **more)

    def until_serving(self, model: str, timeout: float = 60.0) -> None:
        """Wait until the model has a ready replica that answers."""

        def answers() -> bool:
            body = {"model": model, "messages": [{"role": "user", "content": "up"}], "max_tokens": 1}
            return self.http.post("/v1/chat/completions", json=body).status_code == 200

        until(answers, timeout, f"an answer of {model}")


class Joiner:
    """`celery -A localai_q worker` with the two settings that `up` prints, as on another machine."""

    def __init__(self, home: Path, name: str, **settings: str) -> None:
        self.home = home
        self.name = name
        self.output = home / "output"
        home.mkdir(parents=True, exist_ok=True)
        environment = clean_environment(LOCALAI_Q_HOME=str(home), LOCALAI_NODE_NAME=name, **settings)
        with self.output.open("ab") as file:
            self.process = subprocess.Popen(
                [str(BIN / "celery"), "-A", "localai_q", "worker"],
                env=environment, cwd=home, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip

    def log(self) -> str:
        return self.output.read_text(errors="replace")

    def kill(self) -> None:
        kill_all(self.home)
        self.process.kill()
        self.process.wait()

    def term(self) -> None:
        """Ask it to leave; fails unless it and all its processes end."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(LIMIT)
        left = list(processes_of(self.home).values())
        assert not left, left


def printed_settings(cluster: Cluster) -> dict[str, str]:
    """The two settings of the line with which another machine joins."""
    line = next(line.strip() for line in cluster.output().splitlines() if "celery -A localai_q worker" in line)
    settings = re.fullmatch(
        r"(LOCALAI_REGISTER_TO=\S+) (LOCALAI_REGISTRATION_TOKEN=\S+) \S*celery -A localai_q worker", line
    )
    assert settings, line
    return dict(setting.split("=", 1) for setting in settings.groups())
