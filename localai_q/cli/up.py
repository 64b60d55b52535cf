"""`localai-q up`: checks, starts one machine's cluster, and stays in the foreground until a signal stops it.

It owns the process's signals and its end. Which processes run is left to `localai_q.cli.machine`, which is imported
only when the command runs.
"""

from __future__ import annotations

import os
import queue
import select
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Self

import typer

from localai_q.config import load_settings
from localai_q.errors import StartupError

if TYPE_CHECKING:
    from localai_q.cli.machine import Facts, Machine

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAST_RESORT = 9.0  # seconds after which a stop that has not ended becomes a kill


def up(
    nodes: Annotated[int, typer.Option(min=0, max=64, help="How many nodes to run on this machine.")] = 1,
    no_model: Annotated[bool, typer.Option("--no-model", help="Do not install the default model.")] = False,
    procfile: Annotated[
        Path | None, typer.Option(help="The processes to run. Default: the Procfile of this checkout.")
    ] = None,
    home: Annotated[
        Path | None, typer.Option(help="Where everything is kept. Default: LOCALAI_Q_HOME, else your data folder.")
    ] = None,
) -> None:
    """Run a whole cluster on this machine: Postgres, Valkey, the API, the control process, nodes, Flower.

    It prints where everything is when it is ready, and stays in the foreground: Ctrl-C stops it all, a second Ctrl-C at
    once. The next start finds its data again.

    Examples:

        localai-q up

        localai-q up --nodes 3

        LOCALAI_ADDRESS=0.0.0.0:8080 localai-q up         (open to your network)

        LOCALAI_Q_HOME=/data/localai_q localai-q up       (another folder for everything)
    """
    from localai_q.cli import home as home_folder
    from localai_q.cli.machine import Machine, Options, default_procfile
    from localai_q.services import scheduling

    settings = load_settings(home=home) if home else load_settings()
    folder = settings.home.expanduser().resolve()
    home_folder.check_writable(folder)
    settings = load_settings(home=folder)
    scheduling.declared(settings)  # a wrong one ends this, and not the control process again and again
    options = Options(nodes, not no_model, (procfile or default_procfile()).resolve())
    with home_folder.locked(folder), Signals() as signals:
        home_folder.check_address(settings)
        Foreground(Machine(settings, options, threading.Event()), signals).run()


class Signals:
    """Takes the stop signals as readable bytes, so that no code runs inside a signal handler.

    Left alone is SIGHUP where it is ignored, as under nohup.
    """

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._reader.setblocking(False)
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        taken = [s for s in STOP_SIGNALS if not (s == signal.SIGHUP and ignored)]
        self._before = {s: signal.signal(s, lambda *_: None) for s in taken}
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()

    def wait(self, timeout: float | None) -> bool:
        """Wait up to `timeout` seconds (None: as long as it takes); whether a stop signal came."""
        readable, _, _ = select.select([self._reader], [], [], timeout)
        return bool(readable) and any(number in self._before for number in self._reader.recv(64))

    def wake(self) -> None:
        """End a `wait` that runs in another thread, as if its time were over."""
        with suppress(OSError):  # nobody waits any more
            self._writer.send(b"\0")


class Foreground:
    """Brings a machine up in a thread of its own, so that a signal is heard whatever that thread waits for."""

    def __init__(self, machine: Machine, signals: Signals) -> None:
        self.machine = machine
        self.signals = signals
        self.outcome: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def run(self) -> None:
        """Return after a signal, when no process is left.

        Raises:
            Exception: what kept the machine from coming up; no process is left then either.
        """
        self.machine.remove_ready()
        threading.Thread(target=self._bring_up, name="bring-up", daemon=True).start()
        problem = None
        try:
            while not self.signals.wait(None):
                if not self.outcome.empty() and (problem := self.outcome.get()) is not None:
                    break
        finally:
            self._stop()
        if problem is not None:
            raise problem

    def _bring_up(self) -> None:
        try:
            facts = self.machine.bring_up()
            self._announce(facts)
            self.outcome.put(None)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            self.outcome.put(StartupError(f"{where}{error.strerror or error}: check its owner, or set LOCALAI_Q_HOME"))
        except Exception as error:  # noqa: BLE001  (handed to the main thread, which raises it)
            self.outcome.put(error)
        self.signals.wake()

    def _announce(self, facts: Facts) -> None:
        if self.machine.stopping.is_set():
            return
        self.machine.write_ready(facts)
        print(self.machine.describe(facts), flush=True)

    def _stop(self) -> None:
        self.machine.stopping.set()
        self.machine.remove_ready()
        supervisor = self.machine.supervisor
        supervisor.begin_stop()
        kill_at = time.monotonic() + LAST_RESORT
        while not supervisor.wait_stopped(0.02):
            if self.signals.wait(0.1) or time.monotonic() > kill_at:
                supervisor.kill()
                break
        self.machine.remove_ready()
        if supervisor.wait_stopped(0):
            return
        os._exit(1)  # a thread hangs in the start of a server: its child dies with us
