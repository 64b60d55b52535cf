"""The supervisor of one machine's processes: starts them, starts again with back-off what exits, stops all in order.

One thread spawns every child, so that all of them die with this process (see `localai_q.processes.spawn`). What the
processes are, and when the machine counts as up, is left to its user, `localai_q.cli.up`.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from localai_q.errors import LocalAIError, StartupError
from localai_q.processes import has_ended, kill_group, spawn, tail

FIRST_DELAY, LONGEST_DELAY = 0.5, 10.0  # seconds before the first restart, and at most
HEALTHY = 15.0  # seconds of life after which earlier exits are forgotten
LOG_LIMIT = 10 << 20  # bytes beyond which a log is put aside when its process starts
POLL = 0.05  # seconds between two looks at the children

STORES = 10  # the first rank of the servers that all others use
STOP_LIMIT = 8.5  # seconds that a whole stop takes at most
APP_GRACE = 5.5  # seconds of it for all that are not stores
STAGGER = 2.0  # seconds that a rank may hold up the next one
STORE_GRACE = 1.5  # seconds for each rank of stores; the last one gets all that is left


@dataclass(frozen=True)
class Spec:
    """One process to keep running.

    Attributes:
        start: starts it, each time anew; called in the supervisor's thread.
        log: where its output goes; its last lines are shown when it exits.
        rank: lower ranks are told to stop first; from `STORES` on, only when all lower ones are gone.
        ask: the signal that asks it to stop.
    """

    name: str
    start: Callable[[], subprocess.Popen[bytes]]
    log: Path
    rank: int = 0
    ask: signal.Signals = signal.SIGTERM


def command_spec(
    name: str, argv: Sequence[str], *, env: Mapping[str, str], logs: Path, cwd: Path | None = None, rank: int = 0
) -> Spec:
    """A spec that runs `argv` and logs to `logs/NAME.log`."""
    log = logs / f"{name}.log"
    return Spec(name, lambda: spawn(argv, env=env, log=log, cwd=cwd), log, rank)


@dataclass
class _Child:
    spec: Spec
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = 0.0  # monotonic time of the next start, while there is no process
    exits: int = 0  # in a row, none of them after a healthy life
    starts: int = 0
    first_start: Future[None] = field(default_factory=Future)


def restart_delay(exits: int) -> float:
    """Seconds to wait after the `exits`-th exit in a row (1 is the first): doubling, within limits."""
    return min(FIRST_DELAY * 2.0 ** min(exits - 1, 16), LONGEST_DELAY)


def exits_in_a_row(before: int, lived: float) -> int:
    """How many exits in a row there are now that a process has exited after `lived` seconds."""
    return 1 if lived >= HEALTHY else before + 1


def describe_exit(code: int) -> str:
    """An exit code of `subprocess` in words."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def rotate(log: Path) -> None:
    """Put a log aside as `.1` once it is too large."""
    try:
        if log.stat().st_size > LOG_LIMIT:
            log.replace(log.with_name(log.name + ".1"))
    except OSError:
        return


def say(line: str) -> None:
    """One line to the person at the terminal, who may have closed it."""
    try:
        print(f"localai-q: {line}", file=sys.stderr, flush=True)  # noqa: T201
    except OSError:
        return


class Supervisor:
    """Keeps the processes of its specs running until `stop`.

    Args:
        say: how an exit is told to the person.
    """

    def __init__(self, say: Callable[[str], None] = say) -> None:
        self._say = say
        self._children: dict[str, _Child] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._killing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    def add(self, spec: Spec, timeout: float | None = None) -> None:
        """Run a process from now on; returns once it was started for the first time.

        Raises:
            LocalAIError, OSError: it could not be started; it is not tried again.
            TimeoutError: not within `timeout` seconds.
        """
        child = _Child(spec)
        with self._lock:
            if self._stopping.is_set():
                raise StartupError(f"{spec.name} is not started: everything is being stopped")
            if spec.name in self._children:
                raise ValueError(f"there is a process {spec.name} already")
            self._children[spec.name] = child
        child.first_start.result(timeout)

    def pid(self, name: str) -> int | None:
        """The process id of `name` while it runs."""
        process = self._children[name].process
        return process.pid if process else None

    def starts(self, name: str) -> int:
        """How often `name` was started."""
        return self._children[name].starts

    def begin_stop(self) -> None:
        """Start to stop everything in order; `wait_stopped` tells when no process is left."""
        with self._lock:
            self._stopping.set()

    def wait_stopped(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the end of a stop; whether it has come."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Stop everything in order, within about ten seconds; returns when no process is left."""
        self.begin_stop()
        if not self.wait_stopped(STOP_LIMIT + 0.5):
            self.kill()

    def kill(self) -> None:
        """Kill everything at once."""
        self._killing.set()
        self.begin_stop()
        self.wait_stopped(1.0)
        for child in self._snapshot():
            if child.process is not None:
                kill_group(child.process)

    def _snapshot(self) -> list[_Child]:
        with self._lock:
            return list(self._children.values())

    def _run(self) -> None:
        while not self._stopping.is_set():
            for child in self._snapshot():
                self._tend(child)
            self._stopping.wait(POLL)
        self._stop_all()

    def _tend(self, child: _Child) -> None:
        if child.process is not None and has_ended(child.process):
            self._reap(child, child.process)
        elif child.process is None and time.monotonic() >= child.start_at and not self._stopping.is_set():
            self._start(child)

    def _start(self, child: _Child) -> None:
        rotate(child.spec.log)
        child.started_at = time.monotonic()
        try:
            child.process = child.spec.start()
        except (LocalAIError, OSError) as error:
            self._could_not_start(child, error)
            return
        child.starts += 1
        if not child.first_start.done():
            child.first_start.set_result(None)

    def _could_not_start(self, child: _Child, error: Exception) -> None:
        if not child.first_start.done():
            with self._lock:
                del self._children[child.spec.name]
            child.first_start.set_exception(error)
            return
        delay = self._put_off(child)
        self._say(f"{child.spec.name} could not be started: {error}; trying again in {delay:g} s")

    def _reap(self, child: _Child, process: subprocess.Popen[bytes]) -> None:
        how = describe_exit(kill_group(process))
        child.process = None
        delay = self._put_off(child)
        last = " | ".join(line.strip() for line in tail(child.spec.log, 3, 2048).splitlines() if line.strip())
        said = f", which ends: {last}" if last else ""
        self._say(f"{child.spec.name} {how}; starting it again in {delay:g} s; log {child.spec.log}{said}")

    def _put_off(self, child: _Child) -> float:
        now = time.monotonic()
        child.exits = exits_in_a_row(child.exits, now - child.started_at)
        delay = restart_delay(child.exits)
        child.start_at = now + delay
        return delay

    def _stop_all(self) -> None:
        limit = time.monotonic() + STOP_LIMIT
        children = self._snapshot()
        for child in children:
            if not child.first_start.done():
                child.first_start.set_exception(StartupError(f"{child.spec.name} was not started: stopping"))
        self._stop_together([c for c in children if c.spec.rank < STORES], time.monotonic() + APP_GRACE)
        stores = sorted({c.spec.rank for c in children if c.spec.rank >= STORES})
        for rank in stores:
            until = limit if rank == stores[-1] else time.monotonic() + STORE_GRACE
            self._stop_together([c for c in children if c.spec.rank == rank], min(until, limit))

    def _stop_together(self, children: list[_Child], deadline: float) -> None:
        """Ask the children to stop, rank by rank, and kill those that are left at the deadline."""
        asked: list[subprocess.Popen[bytes]] = []
        for rank in sorted({c.spec.rank for c in children}):
            for child in children:
                if child.spec.rank == rank and child.process is not None:
                    _ask(child.process, child.spec.ask)
                    asked.append(child.process)
            self._wait_for(asked, min(deadline, time.monotonic() + STAGGER))
        self._wait_for(asked, deadline)
        for process in asked:
            kill_group(process)

    def _wait_for(self, processes: Iterable[subprocess.Popen[bytes]], deadline: float) -> None:
        for process in processes:
            while not has_ended(process) and time.monotonic() < deadline and not self._killing.is_set():
                time.sleep(POLL / 2)


def _ask(process: subprocess.Popen[bytes], ask: signal.Signals) -> None:
    if not has_ended(process):
        process.send_signal(ask)
