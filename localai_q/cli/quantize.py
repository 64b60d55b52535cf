"""`localai-q quantize`: smaller files of models, made by the cluster."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from localai_q.cli.client import Api, Record, connect
from localai_q.cli.jobs import POLL
from localai_q.cli.models import of_files
from localai_q.cli.show import AsJson, rows, when
from localai_q.cli.watch import display
from localai_q.errors import InvalidValue, LocalAIError

START = "start"
FIGURES = {  # what each is called, and how many digits of it are shown
    "perplexity": ("perplexity", 2),
    "bits_per_weight": ("bits per weight", 2),
    "kl_divergence": ("KL divergence in nats", 4),
    "cosine_similarity": ("cosine similarity", 5),
}


class _Group(TyperGroup):
    """A group whose command is `start` where none is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = [START, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    help="Quantize models: 'quantize MODEL --type q4_k_m'. List, show, stop, retry, import.",
)

Id = Annotated[str, typer.Argument(help="The quantization's id, as 'list' shows it.")]


@app.command(START)
def start(
    model: Annotated[str, typer.Argument(help="The name of a model, or a source as 'models add' takes it.")],
    type_: Annotated[
        str, typer.Option("--type", help="What to make of it: q8_0, q6_k, q5_k_m, q4_k_m, q2_k, …")
    ] = "q4_k_m",
    name: Annotated[str, typer.Option(help="The name of the model that it becomes; else made of both.")] = "",
    import_: Annotated[bool, typer.Option("--import", help="Add the result to the models when it is done.")] = False,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Even if it is quantized already, which loses more.")
    ] = False,
    pure: Annotated[bool, typer.Option("--pure", help="Give every tensor the same type.")] = False,
    leave_output: Annotated[bool, typer.Option("--leave-output", help="Leave the output tensor as it is.")] = False,
    output_type: Annotated[str, typer.Option(help="The type of the output tensor.")] = "",
    embedding_type: Annotated[str, typer.Option(help="The type of the token embeddings.")] = "",
    imatrix: Annotated[str, typer.Option(help="The source of an importance matrix.")] = "",
    imatrix_sha256: Annotated[str, typer.Option(help="Its SHA-256.")] = "",
    text: Annotated[str, typer.Option(help="The source of a text to compare the result with.")] = "",
    text_sha256: Annotated[str, typer.Option(help="Its SHA-256.")] = "",
    sha256: Annotated[
        list[str] | None,
        typer.Option(help="The SHA-256 of a source; repeatable: of each of its files, in their order."),
    ] = None,
    backend: Annotated[str, typer.Option(help="Which backend does it; else the first that can.")] = "",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the id and return at once.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a quantized file of a model, and compare both.

    The word 'start' can be left out. Ends with 0 when it is done, and with 1 when it failed or was stopped. Ctrl-C leaves
    it going on; 'quantize stop' ends it.

    Examples:

        localai-q quantize --type q8_0 --allow-requantize --import smollm2-135m-instruct

        localai-q quantize --type q4_k_m --name small huggingface://owner/repo/model-f16.gguf

        localai-q quantize --type q4_k_m --import huggingface://owner/repo/big-f16-00001-of-00003.gguf
    """
    if import_ and no_wait:
        raise InvalidValue("--import waits until it is done: leave out --no-wait")
    options = {
        "allow_requantize": allow_requantize, "pure": pure, "quantize_output_tensor": not leave_output,
        "output_tensor_type": output_type, "token_embedding_type": embedding_type,
        "imatrix": _file(imatrix, imatrix_sha256),
    }  # fmt: skip
    body = {"model": model, "quantization_type": type_, "name": name, "backend": backend,
            **(of_files([{"sha256": digest} for digest in sha256]) if sha256 else {}),
            "text": _file(text, text_sha256), "extra_options": _given(options)}  # fmt: skip
    api = connect()
    made = api.call("POST", "/api/quantization/jobs", json=_given(body))
    if no_wait:
        print(made["id"])
        return
    ended = _done(_wait(api, made, quiet=as_json), as_json=as_json)
    if import_:
        imported = api.call("POST", "/api/quantization/jobs/{}/import", ended["id"], json={})["model_name"]
        if not as_json:
            print(f"{imported}: added to the models")
            return
        ended = api.call("GET", "/api/quantization/jobs/{}", ended["id"])
    if as_json:
        print(json.dumps(ended, indent=2))


@app.command("list")
def list_quantizations(as_json: AsJson = False) -> None:
    """Show quantizations, the newest first."""
    found: Any = connect().call("GET", "/api/quantization/jobs")
    shown = found if as_json else [_shown(one) for one in found]
    rows(shown, ["id", "name", "status", "percent", "node", "size", "bits", "perplexity", "divergence", "similarity", "created",
                 "message"], as_json=as_json, empty="Nothing was quantized yet.")  # fmt: skip


@app.command("types")
def list_backends(as_json: AsJson = False) -> None:
    """Show which backends can quantize, and what they can make."""
    found: Any = connect().call("GET", "/api/quantization/backends")
    shown = (
        found
        if as_json
        else [{**one, "types": " ".join(one["types"]), "nodes": ", ".join(one["nodes"])} for one in found]
    )
    rows(shown, ["name", "version", "nodes", "types"], as_json=as_json, empty="No backend can quantize.")


@app.command("show")
def show(quantization: Id) -> None:
    """Show everything about a quantization, as JSON."""
    print(json.dumps(connect().call("GET", "/api/quantization/jobs/{}", quantization), indent=2))


@app.command("watch")
def watch(quantization: Id, as_json: AsJson = False) -> None:
    """Show how far a quantization is until it ends: with 0 if it is done, with 1 if it failed or was stopped."""
    api = connect()
    ended = _wait(api, api.call("GET", "/api/quantization/jobs/{}", quantization), quiet=as_json)
    _done(ended, as_json=as_json)
    if as_json:
        print(json.dumps(ended, indent=2))


@app.command("stop")
def stop(quantization: Id) -> None:
    """Stop a quantization."""
    print(f"{quantization}: {connect().call('POST', '/api/quantization/jobs/{}/stop', quantization)['status']}")


@app.command("retry")
def retry(quantization: Id) -> None:
    """Begin a quantization anew that has failed or was stopped, as it was asked for. 'watch' shows how far it is."""
    print(f"{quantization}: {connect().call('POST', '/api/quantization/jobs/{}/retry', quantization)['status']}")


@app.command("delete")
def delete(quantization: Id) -> None:
    """Forget a quantization that has ended, and its file unless a model has that."""
    connect().call("DELETE", "/api/quantization/jobs/{}", quantization)
    print(f"{quantization}: deleted")


@app.command("import")
def import_model(
    quantization: Id, name: Annotated[str, typer.Option(help="The model's name; else the quantization's.")] = ""
) -> None:
    """Add the result to the models."""
    body = _given({"name": name})
    print(connect().call("POST", "/api/quantization/jobs/{}/import", quantization, json=body)["model_name"])


@app.command("download")
def download(
    quantization: Id, path: Annotated[Path, typer.Argument(help="The file to write; there must be none.")]
) -> None:
    """Write the result into a file."""
    api = connect()
    part = path.with_name(f".{path.name}.part")
    if path.exists():
        raise InvalidValue(f"{path} is there already")
    try:
        with api.errors(), api.http.stream("GET", f"/api/quantization/jobs/{quantization}/download") as response:
            api.check(response)
            with part.open("wb") as file:
                for block in response.iter_bytes():
                    file.write(block)
        part.replace(path)
    except OSError as error:
        raise LocalAIError(f"cannot write {error.filename or path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    print(path)


def _wait(api: Api, one: Record, *, quiet: bool) -> Record:
    """The quantization, once it has ended; until then its progress is shown, unless this is to be quiet."""
    with display() as shown:
        while one["state"] == "open":
            if not quiet:
                progress = one["progress"] or {"stage": one["message"] or "waiting"}
                shown.show([{"id": one["id"], "kind": "quantize", "subject": one["name"], "node": one["node"],
                             "progress": progress}])  # fmt: skip
            time.sleep(POLL)
            one = api.follow("/api/quantization/jobs/{}", one["id"])
    return one


def _done(one: Record, *, as_json: bool) -> Record:
    """The quantization with what it has cost said, or the error that it has ended with."""
    if one["state"] != "done":
        if as_json:
            print(json.dumps(one, indent=2))
        raise LocalAIError(f"{one['id']}: {one['status']}" + (f": {one['message']}" if one["message"] else ""))
    if not as_json:
        made = one["result"]
        size = f"{made['size'] / 1e6:.1f} MB of {made['source_size'] / 1e6:.1f} MB"
        measured = [f"{title} {_figure(made, name)}" for name, (title, _) in FIGURES.items() if name in made]
        print(f"{one['id']}: {one['name']}: " + "; ".join([size, *measured]))
    return one


def _figure(made: Record, name: str) -> str:
    """A figure of a result, and that of its source; empty where it was not measured."""
    found = [made[key] for key in (name, f"source_{name}") if key in made]
    return " after ".join(f"{value:.{FIGURES[name][1]}f}" for value in found)


def _shown(one: Record) -> Record:
    made = one["result"] or {}
    return {
        **one,
        "percent": f"{one['progress_percent']:.0f} %",
        "size": f"{made['size'] / 1e6:.1f} MB of {made['source_size'] / 1e6:.1f}" if made else None,
        "bits": made.get("bits_per_weight"),
        "perplexity": _figure(made, "perplexity"),
        "divergence": made.get("kl_divergence"),
        "similarity": _figure(made, "cosine_similarity"),
        "created": when(one["created"]),
    }


def _file(source: str, sha256: str) -> Record | None:
    return _given({"source": source, "sha256": sha256}) if source else None


def _given(body: Record) -> Record:
    """What was said, without what was left out."""
    return {name: value for name, value in body.items() if value not in ("", None)}
