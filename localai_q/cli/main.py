"""The command `localai-q`: its groups, its version, and how an error ends it. Each group is a module of its own."""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (said before an import fails for that reason)
    sys.exit("localai-q: needs Python 3.11 or newer, this is {}.{}: make the .venv with it".format(*sys.version_info))

from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from localai_q.cli import backends, jobs, keys, models, nodes, quantize
from localai_q.cli.chat import chat
from localai_q.cli.up import up
from localai_q.cluster.joblog import shown
from localai_q.errors import LocalAIError

app = typer.Typer(
    name="localai-q",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(up)
app.command()(chat)
for group in (models, backends, quantize, nodes, jobs, keys):
    app.add_typer(group.app, name=group.__name__.rpartition(".")[2])


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"localai-q {installed_version('localai-q')}")
        raise typer.Exit


@app.callback()
def localai_q(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve language models from your own machines behind one OpenAI-compatible URL.

    Start with 'localai-q up'; it prints what to do next.
    """


@app.command()
def version() -> None:
    """Print the version."""
    _print_version(True)


def main() -> None:
    """Run the command line: exit code 1 with one line for an error of ours, 130 for Ctrl-C."""
    try:
        app()
    except LocalAIError as error:
        print(f"localai-q: {shown(' '.join(error.message.split()))}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
