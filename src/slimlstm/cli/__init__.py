"""The command ``slimlstm``: one module per verb. PyTorch is imported inside the verbs only, so help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from slimlstm.cli import bench, compress, demo, evaluate, export, inspect, shrink
from slimlstm.cli.output import print_error, tolerate_encodings
from slimlstm.errors import SlimLSTMError

INTERRUPTED = 130
"""The exit status that shells use for a program that Ctrl-C ended."""


class _Commands(TyperGroup):
    """The verbs; an interrupt ends any of them with one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print_error("interrupted")
            sys.exit(INTERRUPTED)


app = typer.Typer(
    cls=_Commands,
    help="Make trained LSTMs small and fast: low-rank factors, low-bit weights, or both.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
VERBS = {
    "demo": demo.command,
    "inspect": inspect.command,
    "compress": compress.command,
    "shrink": shrink.command,
    "bench": bench.command,
    "eval": evaluate.command,
    "export": export.command,
}
for _name, _command in VERBS.items():
    app.command(_name)(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"slimlstm {version('slimlstm')}")
        raise typer.Exit


@app.callback()
def _options(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Make trained LSTMs small and fast: low-rank factors, low-bit weights, or both."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; print an error in one line and exit with status 1.

    Args:
        arguments: the words after ``slimlstm``; by default ``sys.argv[1:]``.
    """
    tolerate_encodings()
    try:
        app(arguments, prog_name="slimlstm")
    except (SlimLSTMError, OSError) as error:
        print_error(" ".join(str(error).split()))
        sys.exit(1)
    except ImportError as error:
        print_error(f"{error.name or error} cannot be imported; install it, or the extra that brings it: see the README")
        sys.exit(1)
    except KeyboardInterrupt:
        print_error("interrupted")
        sys.exit(INTERRUPTED)
