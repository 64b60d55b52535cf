"""Child processes: started so that they die with their parent, stopped with everything they started, read by the tail.

It owns one process at a time. Which processes there are, and when they are started again, is left to
`localai_q.supervisor`.
"""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from localai_q import exec_child

POLL = 0.02  # seconds between two looks at a process that is about to end


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    log: Path | None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    user: str | None = None,
    death_signal: signal.Signals = signal.SIGKILL,
    session: bool = True,
) -> subprocess.Popen[bytes]:
    """Start `argv` in a session of its own, to be signalled when its parent ends, however that ends.

    On Linux the kernel sends `death_signal` when the *thread* that called `spawn` ends: call it from a thread that
    lives as long as the child should. Elsewhere a child that is ours calls `watch_parent`.

    Args:
        argv: the program, looked up on the PATH of `env`, and its arguments.
        env: the whole environment of the child.
        log: the file that stdout and stderr are appended to (made 0600); None: this process's own.
        cwd: the child's folder; None: this process's own.
        pass_fds: file descriptors that stay open in the child.
        user: the system user to become; needs root.
        death_signal: see above.
        session: False: only a group of its own, so that who kills this process's session kills all that it starts, too.

    Raises:
        OSError: the log or the folder cannot be opened. A program that cannot be run exits with 127.
    """
    wrapper = [sys.executable, "-I", "-S", exec_child.__file__]
    ends = [str(os.getpid()), str(int(death_signal)), *_ids(user)]
    output = _open_log(log) if log else None
    try:
        return subprocess.Popen(
            [*wrapper, *ends, *argv],
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=pass_fds,
            start_new_session=session,
            process_group=None if session else 0,
        )
    finally:
        if output is not None:
            os.close(output)


def _ids(user: str | None) -> tuple[str, str]:
    if user is None:
        return "-1", "-1"
    entry = pwd.getpwnam(user)
    return str(entry.pw_uid), str(entry.pw_gid)


def _open_log(log: Path) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def watch_parent(parent_pid: int, on_death: Callable[[], None]) -> threading.Thread:
    """Call `on_death` once, from a thread of its own, within about a second of the end of `parent_pid`.

    For systems without a parent-death signal; harmless beside one.
    """

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(1.0)
        on_death()

    thread = threading.Thread(target=watch, name="watch-parent", daemon=True)
    thread.start()
    return thread


def stop(process: subprocess.Popen[bytes], grace: float, *, ask: signal.Signals = signal.SIGTERM) -> int:
    """End a process of `spawn`: `ask` it, wait up to `grace` seconds, then SIGKILL all that is left of its group.

    Returns:
        The exit code as `subprocess` has it: negative for a signal.
    """
    if not has_ended(process):
        process.send_signal(ask)
        wait_for_end(process, grace)
    return kill_group(process)


def wait_for_end(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Wait up to `timeout` seconds; whether the process has ended."""
    deadline = time.monotonic() + timeout
    while not has_ended(process):
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL)
    return True


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has ended. Where the system allows it, it stays unreaped, which keeps its group's id taken."""
    if process.returncode is not None:
        return True
    if not hasattr(os, "waitid"):
        return process.poll() is not None
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    except ChildProcessError:
        return process.poll() is not None


def kill_group(process: subprocess.Popen[bytes]) -> int:
    """SIGKILL what is left of the process's group and of its session, and reap it. Returns its exit code."""
    if process.returncode is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # nobody is left, or (macOS) only the unreaped leader
            process.kill()
        kill_session(process.pid)
    return process.wait()


def kill_session(session: int) -> None:
    """SIGKILL every process of a session. Some tools put what they start into groups of its own, as ninja does.

    Where the session is that of this process, it does not return.
    """
    killed: set[int] = set()
    while found := {pid for pid in psutil.pids() if pid not in killed and _session_of(pid) == session}:
        for pid in found - {os.getpid()}:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed |= found
    if os.getpid() in killed:
        os.kill(os.getpid(), signal.SIGKILL)


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def tail(path: Path, lines: int = 20, max_bytes: int = 8192) -> str:
    """The last `lines` lines within the last `max_bytes` bytes of a file, unprintable characters replaced.

    Empty when the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - max_bytes))
            text = file.read(max_bytes).decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(_printable(line) for line in text.splitlines()[-lines:])


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in line)
