"""The real backend as a process of its own, with a model loaded, for benchmarks that ask it directly."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from localai_q.proto import backend_pb2, backend_pb2_grpc

BACKEND = Path(__file__).resolve().parents[1] / "workers" / "backends" / "xllamacpp"


@contextmanager
def loaded(file: Path, options: dict[str, Any], **environment: str) -> Iterator[tuple[Any, int]]:
    """The stub and the process id of a backend that has loaded the file; `options`: fields of `ModelOptions`."""
    with tempfile.TemporaryDirectory(prefix="lq") as folder:
        address = f"unix:{folder}/b.sock"
        process = subprocess.Popen([sys.executable, "server.py", "--addr", address], cwd=BACKEND,
                                   env={**os.environ, **environment}, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        try:
            with grpc.insecure_channel(address) as channel:
                grpc.channel_ready_future(channel).result(30)
                stub = backend_pb2_grpc.BackendStub(channel)
                result = stub.LoadModel(backend_pb2.ModelOptions(ModelFile=str(file), **options))
                if not result.success:
                    raise RuntimeError(result.message)
                yield stub, process.pid
        finally:
            process.kill()
            process.wait()
