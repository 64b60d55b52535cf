"""The backend process of a replica: started, loaded, asked, watched. Owns its life; what it is asked is the runner's."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from localai_q.errors import StartupError
from localai_q.processes import kill_group
from workers import versions
from workers.backend_process import BackendProcess
from workers.child import ReplicaSpec
from workers.replica.options import model_options

log = logging.getLogger(__name__)

PROBE_EVERY = 5.0  # seconds between two health checks
PROBE_TIMEOUT = 5.0
PROBES_MISSED = 3  # after so many in a row the backend counts as wedged
STUCK = 75  # the exit status where a request that was cancelled does not end; the backends' `serving` has the same
SPARE_THREADS = 16  # of a backend, for what is asked of it besides its slots' requests


class Backend:
    """A running backend with a loaded model."""

    def __init__(self, spec: ReplicaSpec, *, on_death: Callable[[str], None]) -> None:
        self._spec = spec
        self._on_death = on_death
        self._stopping = False
        self.death = ""  # why it died, once `dead` is set
        self.was_stuck = False  # by a request that was cancelled: it died of none that was under way then
        self._has_cancelled = False  # a request, so that it can be stuck
        self.dead = threading.Event()
        folder, self._held = versions.hold(spec.backend_folder)
        if spec.log.exists():  # of the process before this one, whose last words are not this one's
            spec.log.replace(spec.log.with_suffix(".1.log"))
        threads = spec.model.slots + SPARE_THREADS
        self._server = BackendProcess(folder, socket=spec.socket, log=spec.log, threads=threads)
        self._stub, self._metadata = self._server.stub, self._server.metadata

    def wait_for_health(self) -> None:
        """Wait until it answers.

        Raises:
            StartupError: it does not come up; the message has its own words.
        """
        self._server.wait_for_health()

    def load(self) -> None:
        """Have it load the model.

        Raises:
            StartupError: it cannot; the message has its own words.
        """
        try:
            self._lay_out()
            result = self._stub.LoadModel(model_options(self._spec), metadata=self._metadata)
        except grpc.RpcError as error:
            raise StartupError(self._server.said(f"the backend could not load the model: {error.details()}")) from error
        finally:
            self._tidy()
        if not result.success:
            raise StartupError(f"the backend could not load the model: {result.message}")
        threading.Thread(target=self._watch_process, name="backend-exit", daemon=True).start()
        threading.Thread(target=self._probe, name="backend-health", daemon=True).start()

    def stream(self, options: Any) -> Any:
        """Begin a generation: an iterator of replies that can be cancelled."""
        return self._stub.PredictStream(options, metadata=self._metadata)

    def embed(self, options: Any) -> Any:
        """Begin an embedding: a future of the result."""
        return self._stub.Embedding.future(options, metadata=self._metadata)

    def cancel(self, call: Any) -> None:
        """End a generation or an embedding."""
        self._has_cancelled = True
        call.cancel()

    def kill(self) -> None:
        """End the process at once, whatever it does; who waits for its answer is told."""
        self._stopping = True
        kill_group(self._server.process)

    def stop(self, grace: float = 2.0) -> None:
        """End the process; it has nothing left to do."""
        self._stopping = True
        self._server.stop(grace)

    def _lay_out(self) -> None:
        """Make what the backend reads while it loads, besides the files of the node."""
        if self._spec.model.chat_template:
            self._spec.template_file.write_text(self._spec.model.chat_template, encoding="utf-8")
        for link, blob in self._spec.links.items():
            link.unlink(missing_ok=True)
            link.symlink_to(blob)

    def _tidy(self) -> None:
        for path in (self._spec.template_file, *self._spec.links):
            path.unlink(missing_ok=True)

    def _watch_process(self) -> None:
        code = self._server.process.wait()
        self.was_stuck = code == STUCK and self._has_cancelled  # else it died of what it does, whatever it says
        if not self._stopping:
            self._die(f"the backend ended with exit code {code}")

    def _probe(self) -> None:
        missed = 0
        while not self._stopping and not self.dead.is_set():
            time.sleep(PROBE_EVERY)
            try:
                self._server.check_health(PROBE_TIMEOUT)
                missed = 0
            except grpc.RpcError as error:
                missed += 1
                log.warning(
                    "the backend did not answer a health check (%s of %s): %s", missed, PROBES_MISSED, error.code()
                )
            if missed >= PROBES_MISSED and not self._stopping:
                self._die(f"the backend did not answer {missed} health checks")
                kill_group(self._server.process)

    def _die(self, what: str) -> None:
        if not self.dead.is_set():
            self.death = self._server.said(what)
            self.dead.set()
            self._on_death(self.death)
