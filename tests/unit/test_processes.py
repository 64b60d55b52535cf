"""Children die with their parent, are stopped with their group, and their logs can be read whatever is in them."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from waiting import LIMIT, wait_for

from localai_q.processes import has_ended, kill_group, spawn, stop, tail, wait_for_end, watch_parent

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(100)"]
STUBBORN_CODE = (
    "import signal, time, subprocess, sys\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen(['sleep', '100'])\n"
    "print(child.pid, flush=True); time.sleep(100)"
)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_runs_in_a_session_of_its_own_and_logs_privately(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "child.log"
    process = spawn(SLEEPER, env=dict(os.environ), log=log)
    assert wait_for(lambda: tail(log) == "up")
    assert os.getsid(process.pid) == process.pid
    assert log.stat().st_mode & 0o777 == 0o600
    assert stop(process, LIMIT) == -signal.SIGTERM


def test_passes_environment_folder_and_descriptors(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    code = f"import os; os.write({writer}, (os.getcwd() + os.environ['WORD']).encode())"
    process = spawn([sys.executable, "-c", code], env={"WORD": "!"}, log=None, cwd=tmp_path, pass_fds=[writer])
    os.close(writer)
    assert process.wait(LIMIT) == 0
    assert os.read(reader, 1000).decode() == f"{tmp_path}!"
    os.close(reader)


def test_a_program_that_cannot_run_says_so(tmp_path: Path) -> None:
    process = spawn(["no-such-program"], env=dict(os.environ), log=tmp_path / "log")
    assert process.wait(LIMIT) == 127
    assert "cannot run no-such-program" in tail(tmp_path / "log")


def test_default_signals_are_restored(tmp_path: Path) -> None:
    code = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        process = spawn([sys.executable, "-c", code], env=dict(os.environ), log=tmp_path / "log")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    assert process.wait(LIMIT) == 0
    assert tail(tmp_path / "log") == "set()"
    yes = spawn(["sh", "-c", "yes | head -1; kill -PIPE $$"], env=dict(os.environ), log=tmp_path / "pipe")
    assert yes.wait(LIMIT) == -signal.SIGPIPE


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_dies_when_its_parent_is_killed(tmp_path: Path) -> None:
    parent_code = (
        "import os, sys, time; from pathlib import Path; from localai_q.processes import spawn\n"
        "print(spawn(['sleep', '100'], env=dict(os.environ), log=Path(sys.argv[1])).pid, flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-c", parent_code, str(tmp_path / "log")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert wait_for(lambda: psutil.Process(child).name() == "sleep")
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_for(lambda: is_gone(child))


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_the_death_signal_goes_with_the_spawning_thread(tmp_path: Path) -> None:
    started: list[subprocess.Popen[bytes]] = []
    log = tmp_path / "log"
    thread = threading.Thread(
        target=lambda: (
            started.append(spawn(SLEEPER, env=dict(os.environ), log=log, death_signal=signal.SIGTERM)),
            wait_for(lambda: tail(log) == "up"),
        )
    )
    thread.start()
    thread.join()
    assert wait_for_end(started[0], LIMIT)
    assert kill_group(started[0]) == -signal.SIGTERM


def test_stop_kills_the_group_of_a_child_that_ignores_it(tmp_path: Path) -> None:
    process = spawn([sys.executable, "-c", STUBBORN_CODE], env=dict(os.environ), log=tmp_path / "log")
    assert wait_for(lambda: tail(tmp_path / "log").isdigit())
    grandchild = int(tail(tmp_path / "log"))
    assert stop(process, 0.3) == -signal.SIGKILL
    assert wait_for(lambda: is_gone(grandchild))


def test_stop_of_what_ended_tells_its_code() -> None:
    process = spawn([sys.executable, "-c", "raise SystemExit(7)"], env=dict(os.environ), log=None)
    assert wait_for(lambda: has_ended(process))
    assert stop(process, 1.0) == 7
    assert stop(process, 1.0) == 7


def test_watch_parent_calls_when_the_parent_is_another() -> None:
    died = threading.Event()
    watch_parent(os.getppid() + 1, died.set).join(LIMIT)
    assert died.is_set()


def test_tail_of_anything(tmp_path: Path) -> None:
    assert tail(tmp_path / "missing") == ""
    path = tmp_path / "log"
    path.write_text("\n".join(str(number) for number in range(100)))
    assert tail(path, 3) == "97\n98\n99"
    path.write_bytes(b"\xff\x00\x1b[31m red\n" + b"x" * 20_000)
    assert len(tail(path)) == 8192
    path.write_bytes(b"ok\n\xff\x00\x1b[31m end")
    assert tail(path, 1) == "\ufffd\ufffd\ufffd[31m end"


APART = (  # a process with a child in a group of its own, as ninja has them, which has one, too
    "import os, subprocess, sys, time\n"
    "child = subprocess.Popen(['sh', '-c', 'sleep 100 & echo $!; wait'], process_group=0, stdout=subprocess.PIPE)\n"
    "print(child.pid, child.stdout.readline().decode(), flush=True); time.sleep(100)"
)


def test_what_has_left_the_group_is_killed_with_the_session(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = spawn([sys.executable, "-c", APART], env=dict(os.environ), log=log)
    assert wait_for(lambda: tail(log))
    apart = [int(pid) for pid in tail(log).split()]
    assert {os.getpgid(pid) for pid in apart} == {apart[0]}
    assert kill_group(process) == -signal.SIGKILL
    assert len(apart) == 2
    assert wait_for(lambda: all(is_gone(pid) for pid in apart))


def test_a_session_can_end_itself(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"{APART.replace('; time.sleep(100)', '')}\nfrom localai_q.processes import kill_session; kill_session(os.getsid(0))"
    process = spawn([sys.executable, "-c", code], env=dict(os.environ), log=log)
    assert process.wait(10) == -signal.SIGKILL
    apart = [int(pid) for pid in tail(log).split()]
    assert len(apart) == 2
    assert wait_for(lambda: all(is_gone(pid) for pid in apart))
