"""The supervisor restarts what exits, ever later; stops in order and within its limit, whatever its children do."""

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from waiting import LIMIT, wait_for

from localai_q import supervisor as module
from localai_q.cli.home import locked
from localai_q.errors import StartupError
from localai_q.supervisor import (
    STORES,
    Spec,
    Supervisor,
    command_spec,
    describe_exit,
    exits_in_a_row,
    restart_delay,
    rotate,
)

SAY_END = (
    "import signal, sys, time\n"
    "def end(*_):\n"
    "    open(sys.argv[1], 'a').write(sys.argv[2] + ' '); sys.exit()\n"
    "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(100)"
)
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(100)"
)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is asked to end has all the time that a crowded machine takes for it."""
    for name in ("STAGGER", "APP_GRACE", "STORE_GRACE", "STOP_LIMIT"):
        monkeypatch.setattr(module, name, LIMIT)


def python(name: str, logs: Path, code: str, *arguments: str, rank: int = 0) -> Spec:
    argv = [sys.executable, "-c", code, *arguments]
    return command_spec(name, argv, env=dict(os.environ), logs=logs, rank=rank)


@pytest.mark.parametrize(("exits", "delay"), [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (6, 10), (7, 10), (1000, 10)])
def test_back_off(exits: int, delay: float) -> None:
    assert restart_delay(exits) == delay


@pytest.mark.parametrize(("before", "lived", "now"), [(0, 0.1, 1), (3, 14.9, 4), (3, 15, 1), (0, 3600, 1)])
def test_a_healthy_life_resets_the_back_off(before: int, lived: float, now: int) -> None:
    assert exits_in_a_row(before, lived) == now


def test_exits_in_words() -> None:
    assert describe_exit(3) == "exited with code 3"
    assert describe_exit(-9) == "was killed by SIGKILL"


def test_rotation(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    rotate(log)
    log.write_bytes(b"x" * 100)
    rotate(log)
    assert log.exists()
    with log.open("r+b") as file:
        file.truncate(11 << 20)
    rotate(log)
    assert not log.exists()
    assert (tmp_path / "a.log.1").exists()


def test_restarts_what_exits_and_says_why(tmp_path: Path) -> None:
    said: list[str] = []
    supervisor = Supervisor(said.append)
    supervisor.add(python("flaky", tmp_path, "print('out of luck'); raise SystemExit(3)"))
    supervisor.add(python("steady", tmp_path, STUBBORN))
    steady = supervisor.pid("steady")
    assert wait_for(lambda: supervisor.starts("flaky") >= 3)
    assert supervisor.pid("steady") == steady
    supervisor.kill()
    assert "flaky exited with code 3; starting it again in 0.5 s" in said[0]
    assert "starting it again in 1 s" in said[1]
    assert str(tmp_path / "flaky.log") in said[0]
    assert said[0].endswith("out of luck")


def test_a_killed_process_comes_back(tmp_path: Path) -> None:
    supervisor = Supervisor(lambda _: None)
    supervisor.add(python("server", tmp_path, STUBBORN))
    first = supervisor.pid("server")
    assert first is not None
    os.kill(first, signal.SIGKILL)
    assert wait_for(lambda: supervisor.pid("server") not in (None, first))
    supervisor.kill()


@pytest.mark.usefixtures("patient")
def test_stops_in_order_stores_last(tmp_path: Path) -> None:
    supervisor = Supervisor(lambda _: None)
    order = tmp_path / "order"
    for name, rank in (("postgres", STORES + 1), ("valkey", STORES), ("web", 1), ("control", 2), ("node", 0)):
        supervisor.add(python(name, tmp_path, SAY_END, str(order), name, rank=rank))
    for name in ("postgres", "valkey", "web", "control", "node"):
        assert wait_for(lambda name=name: "up" in (tmp_path / f"{name}.log").read_text())
    supervisor.stop()
    assert order.read_text().split() == ["node", "web", "control", "valkey", "postgres"]


def test_what_ignores_a_stop_is_killed_when_its_grace_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.APP_GRACE + 2 * module.STORE_GRACE <= module.STOP_LIMIT < 10.0
    for name, seconds in (("STAGGER", 0.1), ("APP_GRACE", 0.3), ("STORE_GRACE", 0.1), ("STOP_LIMIT", 0.5)):
        monkeypatch.setattr(module, name, seconds)
    supervisor = Supervisor(lambda _: None)
    ranks = {"node": 0, "web": 1, "control": 2, "valkey": STORES, "postgres": STORES + 1}
    for name, rank in ranks.items():
        supervisor.add(python(name, tmp_path, STUBBORN, rank=rank))
        assert wait_for(lambda name=name: "up" in (tmp_path / f"{name}.log").read_text())
    pids = [supervisor.pid(name) for name in ranks]
    supervisor.stop()
    assert not any(psutil.pid_exists(pid) for pid in pids if pid)


@pytest.mark.usefixtures("patient")
def test_a_kill_cuts_a_stop_short(tmp_path: Path) -> None:
    supervisor = Supervisor(lambda _: None)
    supervisor.add(python("web", tmp_path, STUBBORN))
    assert wait_for(lambda: "up" in (tmp_path / "web.log").read_text())
    supervisor.begin_stop()
    assert not supervisor.wait_stopped(0.3)
    pid = supervisor.pid("web")
    supervisor.kill()
    assert not psutil.pid_exists(pid)
    assert supervisor.wait_stopped(LIMIT)


def test_what_cannot_start_is_told_to_its_owner(tmp_path: Path) -> None:
    supervisor = Supervisor(lambda _: None)

    def fail():
        raise StartupError("no")

    with pytest.raises(StartupError, match="no"):
        supervisor.add(Spec("server", fail, tmp_path / "log"))
    supervisor.stop()
    with pytest.raises(StartupError, match="being stopped"):
        supervisor.add(python("late", tmp_path, STUBBORN))


def test_one_up_per_home(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(StartupError, match=rf"pid {os.getpid()}; see .*ready\.json"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass
