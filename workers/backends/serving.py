"""What every Python backend needs to be one: the process, its socket, its life and death, and the model's lifecycle.

A backend's folder brings `server.py`; the installer puts this file, the generated stubs and the others of this folder
beside it. They import nothing but gRPC and those stubs. What the engine is, and how a request reaches it, is the folder's own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hmac
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

import backend_pb2
import backend_pb2_grpc
import grpc

MAX_MESSAGE = 50 << 20  # bytes, as LocalAI has it
FREE_PATIENCE = 60.0  # seconds that running requests have to notice that their model goes
STOP_PATIENCE = 1.0  # seconds that the process takes to end
CANCEL_PATIENCE = float(os.environ.get("LOCALAI_Q_CANCEL_PATIENCE") or 120)  # seconds that a stopped request has to end
STUCK = 75  # the exit status where a stopped request does not end; `workers.replica.backend` has the same
PR_SET_PDEATHSIG = 1

# The threads of an engine wait for each other some hundred times for each token. libgomp has them wait busily for 300,000
# turns, and each token takes many times as long where something else needs a core. After 3,000 turns they sleep: where
# cores are free, tokens come as fast. libgomp reads this when the engine is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")


class Refusal(Exception):
    """A request that ends with a gRPC status instead of an answer."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class LoadFailure(Exception):
    """A model that cannot be loaded, with the reason in one line."""


class Engine(Protocol):
    """A loaded model."""

    slots: int  # requests that it works on at once

    def metadata(self) -> backend_pb2.ModelMetadataResponse:
        """What it can do."""

    def close(self) -> None:
        """Give back everything that it holds. No request is at work when this is called."""


class Call:
    """One request at work. `stopped` is set when its caller went away or its model is being freed."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._wake: Callable[[], None] | None = None
        self.heeds_stop = False  # set by work that looks for `stopped`; other, as an embedding, takes its time
        self.stopped = threading.Event()
        self.stopped_at = 0.0  # by the monotonic clock
        self.outstayed = 0  # looks at which it was there though it was stopped, and none had been for longer
        self.freed = False

    def on_stop(self, wake: Callable[[], None]) -> None:
        """Call `wake` once it is stopped; now, if it was already."""
        self._wake = wake
        if self.stopped.is_set():
            wake()

    def stop(self, *, freed: bool = False) -> None:
        """Ask for its end."""
        self.freed = self.freed or freed
        self.stopped_at = self.stopped_at or time.monotonic()
        self.stopped.set()
        if self._wake:
            self._wake()

    def end(self) -> None:
        """It uses the engine no more."""
        self._calls.remove(self)


class Calls:
    """The requests that use the engine."""

    def __init__(self) -> None:
        self._calls: set[Call] = set()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, context: grpc.ServicerContext) -> Call:
        """A call that is stopped when its caller goes away."""
        call = Call(self)
        with self._changed:
            self._calls.add(call)
        if not context.add_callback(call.stop):
            call.stop()
        return call

    def remove(self, call: Call) -> None:
        with self._changed:
            self._calls.discard(call)
            self._changed.notify_all()

    def look(self) -> bool:
        """Whether one of them was stopped, heeds that, and does not end. To be called each second.

        Only the one that was stopped first is looked at: others may be waiting in the engine for its end. Looks are
        counted rather than time: a process that was paused has had none in which to end a request.
        """
        with self._changed:
            waited_for = [call for call in self._calls if call.heeds_stop and call.stopped.is_set()]
            if not waited_for:
                return False
            first = min(waited_for, key=lambda call: call.stopped_at)
            first.outstayed += 1
            return first.outstayed > CANCEL_PATIENCE

    def stop_all(self, patience: float) -> bool:
        """Stop them and wait for their end; whether all have ended within `patience` seconds."""
        with self._changed:
            for call in list(self._calls):
                call.stop(freed=True)
            return self._changed.wait_for(lambda: not self._calls, patience)


class Backend(backend_pb2_grpc.BackendServicer):
    """The calls that are alike for every engine. A subclass gives `load` and serves the inference calls."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._identity = ""
        self._calls = Calls()
        self._changing = threading.Lock()  # held through a load or a free
        self._state = threading.Lock()  # held while `_engine` changes or a call begins

    def load(self, options: backend_pb2.ModelOptions) -> Engine:
        """The model, loaded.

        Raises:
            LoadFailure: it cannot be.
        """
        raise NotImplementedError

    @contextmanager
    def call(self, context: grpc.ServicerContext, identity: str) -> Iterator[tuple[Any, Call]]:
        """The engine and a call on it, for as long as the block runs; a `Refusal` becomes the status."""
        with refusing(context):
            engine, call = self.begin(context, identity)
            try:
                yield engine, call
            finally:
                call.end()

    def begin(self, context: grpc.ServicerContext, identity: str) -> tuple[Any, Call]:
        """The engine and a call on it that the caller must end.

        Raises:
            Refusal: FAILED_PRECONDITION no model is loaded; NOT_FOUND another one is.
        """
        with self._state:
            if self._engine is None:
                raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "no model is loaded")
            if identity and identity != self._identity:
                raise Refusal(
                    grpc.StatusCode.NOT_FOUND,
                    f"model identity mismatch: {identity!r} was asked for, {self._identity!r} is loaded",
                )
            return self._engine, self._calls.add(context)

    def Health(self, request: backend_pb2.HealthMessage, context: grpc.ServicerContext) -> backend_pb2.Reply:
        return backend_pb2.Reply(message=b"OK")

    def LoadModel(self, request: backend_pb2.ModelOptions, context: grpc.ServicerContext) -> backend_pb2.Result:
        with self._changing:
            if not self._unload():
                return backend_pb2.Result(success=False, message="the model loaded before is still at work")
            try:
                engine = self.load(request)
            except LoadFailure as failure:
                return backend_pb2.Result(success=False, message=str(failure))
            with self._state:
                self._engine = engine
                self._identity = request.Model
            return backend_pb2.Result(success=True, message=f"{request.Model or 'the model'} is loaded")

    def Free(self, request: backend_pb2.HealthMessage, context: grpc.ServicerContext) -> backend_pb2.Result:
        with self._changing:
            if self._unload():
                return backend_pb2.Result(success=True, message="nothing is loaded")
            return backend_pb2.Result(success=False, message="a request does not end; stop this process instead")

    def Status(self, request: backend_pb2.HealthMessage, context: grpc.ServicerContext) -> backend_pb2.StatusResponse:
        engine, busy = self._engine, len(self._calls)
        state = backend_pb2.StatusResponse.UNINITIALIZED
        if engine is not None:
            state = backend_pb2.StatusResponse.BUSY if busy else backend_pb2.StatusResponse.READY
        elif self._changing.locked():
            state = backend_pb2.StatusResponse.BUSY
        rss = resident_bytes()
        return backend_pb2.StatusResponse(
            state=state,
            memory=backend_pb2.MemoryUsageData(total=rss, breakdown={"rss": rss}),
            slots=engine.slots if engine else 0,
            slots_busy=busy,
        )

    def ModelMetadata(
        self, request: backend_pb2.ModelOptions, context: grpc.ServicerContext
    ) -> backend_pb2.ModelMetadataResponse:
        with self.call(context, request.Model) as (engine, _):
            return engine.metadata()

    def stop(self) -> None:
        """Ask every request to end; the process is going."""
        self._calls.stop_all(0)

    def is_stuck(self) -> bool:
        """Whether a request that nobody wants any more does not end, and may keep the engine from all others.

        To be called each second.
        """
        return self._calls.look()

    def _unload(self) -> bool:
        """Let go of the engine, if there is one; False when a request does not let go of it."""
        with self._state:
            engine, self._engine = self._engine, None
        if engine is None:
            return True
        if not self._calls.stop_all(FREE_PATIENCE):
            with self._state:
                self._engine = engine
            return False
        engine.close()
        del engine
        return_memory()
        return True


@contextmanager
def refusing(context: grpc.ServicerContext) -> Iterator[None]:
    """Turn a `Refusal` of the block into the status of the call."""
    try:
        yield
    except Refusal as refusal:
        context.abort(refusal.code, refusal.message)


def parse_options(options: Sequence[str], known: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """The "key:value" options of a load, each read by the function that `known` has for it.

    Raises:
        LoadFailure: an option is unknown (the message lists those that are known) or its value cannot be read.
    """
    found = {}
    for option in options:
        key, _, value = option.partition(":")
        if key not in known:
            raise LoadFailure(f"unknown option {key!r}; this backend knows: {', '.join(sorted(known))}")
        try:
            found[key] = known[key](value)
        except ValueError as error:
            raise LoadFailure(f"option {key!r} cannot be {value!r}: {error}") from error
    return found


def whole_number(least: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` up."""

    def read(text: str) -> int:
        number = int(text)
        if number < least:
            raise ValueError(f"must be at least {least}")
        return number

    return read


def one_of(known: Mapping[str, Any]) -> Callable[[str], Any]:
    """A reader of one of these names; an empty one is known and not listed."""

    def read(name: str) -> Any:
        if name.lower() not in known:
            raise ValueError(f"must be one of: {', '.join(key for key in known if key)}")
        return known[name.lower()]

    return read


def known_value(field: str, known: Mapping[str, Any], name: str) -> Any:
    """What a field of a load names; LoadFailure if that is none of `known`."""
    try:
        return one_of(known)(name)
    except ValueError as error:
        raise LoadFailure(f"{field} cannot be {name!r}: {error}") from error


def existing_file(field: str, path: str) -> Path:
    """The file that a field of a load names; LoadFailure if it does not exist."""
    if not Path(path).is_file():
        raise LoadFailure(f"{field} names the file {path}, which does not exist")
    return Path(path)


def adapters_of(options: backend_pb2.ModelOptions) -> list[tuple[str, float]]:
    """The LoRA adapters of a load: their files and scales; LoadFailure if one is missing."""
    scales = list(options.LoraScales) or [1.0] * len(options.LoraAdapters)
    if len(scales) != len(options.LoraAdapters):
        raise LoadFailure(f"there are {len(options.LoraAdapters)} LoraAdapters and {len(scales)} LoraScales")
    paths = [str(existing_file("LoraAdapters", path)) for path in options.LoraAdapters]
    return list(zip(paths, scales, strict=True))


def physical_cores() -> int:
    """Cores that this process may use; two threads of one core count once."""
    cores = set()
    for number in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(number))
    return len(cores)


def resident_bytes() -> int:
    """Bytes of RAM that this process holds now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def return_memory() -> None:
    """Hand freed memory back to the system: an allocator may keep it otherwise."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class TokenCheck(grpc.ServerInterceptor):
    """Refuses every call that does not carry the token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        for key, value in details.invocation_metadata:
            given = value if isinstance(value, bytes) else value.encode()
            if key == "authorization" and hmac.compare_digest(given, self._expected):
                return continuation(details)
        handler = continuation(details)
        if handler is not None and handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_deny)
        return grpc.unary_unary_rpc_method_handler(_deny)


def _deny(request: bytes, context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "the call carries no valid token")


def main(backend: Backend) -> None:
    """Serve until SIGTERM, SIGINT or the parent's death. Never returns."""
    arguments = _arguments()
    parent = arguments.parent or os.getppid()
    # Waited for instead of handled: an engine may install handlers of its own, and threads inherit this mask.
    ends = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    _ask_for_parent_death_signal()
    server = _start(backend, arguments.addr, arguments.threads)
    while os.getppid() == parent:
        received = signal.sigtimedwait(ends, 1.0)
        # SIGUSR1 says that the thread that started this process ended; its process may live on. A process that was paused
        # may be told of a signal 0, which nobody sent.
        if received is not None and received.si_signo in (signal.SIGTERM, signal.SIGINT):
            break
        if backend.is_stuck():
            print(f"a request that was cancelled has not ended within {CANCEL_PATIENCE:g} seconds", file=sys.stderr)
            _exit(STUCK)
    backend.stop()
    server.stop(STOP_PATIENCE / 2).wait(STOP_PATIENCE)
    _exit(0)


def _exit(status: int) -> NoReturn:
    """End, though threads of the pool or of the engine may hang; the system takes back what they hold."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A backend: one model behind LocalAI's gRPC interface.")
    parser.add_argument("--addr", default="127.0.0.1:50051", help="unix:/PATH or HOST:PORT")
    parser.add_argument("--threads", type=int, default=64, help="calls that are answered at once")
    parser.add_argument("--parent", type=int, default=0, help="end when this is no longer the parent process")
    return parser.parse_args()


def _ask_for_parent_death_signal() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1, 0, 0, 0)


def _start(backend: Backend, address: str, threads: int) -> grpc.Server:
    token = os.environ.get("LOCALAI_GRPC_AUTH_TOKEN")
    server = grpc.server(
        ThreadPoolExecutor(max_workers=threads),
        interceptors=[TokenCheck(token)] if token else [],
        options=[
            ("grpc.max_send_message_length", MAX_MESSAGE),
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.so_reuseport", 0),
        ],
    )
    backend_pb2_grpc.add_BackendServicer_to_server(backend, server)
    # The socket is created with this mask: there is no moment at which another user could open it.
    mask = os.umask(0o177)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise SystemExit(f"cannot listen on {address}: {error}") from error
    finally:
        os.umask(mask)
    server.start()
    return server
