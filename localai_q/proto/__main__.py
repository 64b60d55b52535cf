"""Generates the stubs of `backend.proto`: `python -m localai_q.proto`. Owns where they lie and how they import.

The package imports its stubs as `localai_q.proto.backend_pb2`; a backend is a folder of its own, into which the installer
copies those of `workers/backends`, and imports them as plain modules. The generated files are committed; a test compares
them with what this module would write.
"""

from __future__ import annotations

from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).with_name("backend.proto")
REPOSITORY = PROTO.parents[2]
STUBS = ("backend_pb2.py", "backend_pb2_grpc.py")

# Folder of the repository -> the package that its stubs are imported from.
TARGETS = {
    "localai_q/proto": "localai_q.proto",
    "workers/backends": "",
}


def generate(into: Path, package: str = "") -> None:
    """Write the two stub modules into a folder that exists.

    Args:
        into: where they are written.
        package: the package that they will be imported from; empty for plain `import backend_pb2`.

    Raises:
        ValueError: the compiler refused `backend.proto`; it has said why on stderr.
    """
    status = protoc.main(
        ["protoc", f"-I{PROTO.parent}", f"--python_out={into}", f"--grpc_python_out={into}", str(PROTO)]
    )
    if status != 0:
        raise ValueError(f"protoc ended with status {status} on {PROTO}")
    if package:
        _import_from(package, into / "backend_pb2_grpc.py")


def _import_from(package: str, stub: Path) -> None:
    plain = "import backend_pb2 as backend__pb2"
    stub.write_text(stub.read_text().replace(plain, f"from {package} {plain}"))


def main() -> None:
    """Write the stubs of every folder that has them."""
    for folder, package in TARGETS.items():
        generate(REPOSITORY / folder, package)


if __name__ == "__main__":
    main()
