"""The program `tucker-ops`: its commands, its options, and how it ends."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from typing import Annotated

import typer

from tucker_ops.cli.compressing import compress, explain, sweep
from tucker_ops.cli.predicting import evaluate, predict
from tucker_ops.cli.showing import demo, report
from tucker_ops.cli.terminal import console
from tucker_ops.cli.timing import bench, tune
from tucker_ops.cli.training import finetune
from tucker_ops.errors import TuckerOpsError

app = typer.Typer(
    name="tucker-ops",
    help="Compress a trained nnU-Net with Tucker decomposition and run it with stock nnU-Net.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

for _command in (compress, explain, predict, evaluate, sweep, finetune, report, bench, tune, demo):
    app.command()(_command)


def _print_version(value: bool) -> None:
    if value:
        import tucker_ops

        typer.echo(f"tucker-ops {tucker_ops.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (or set TUCKER_OPS_DEBUG=1).")
    ] = False,
) -> None:
    if debug:
        os.environ["TUCKER_OPS_DEBUG"] = "1"


def _exit_once(number: int, frame: object) -> None:
    """Leave by an exception; a second signal must not interrupt the clean-up of the first."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> None:
    """Entry point. An error that tucker_ops raises on purpose is one message and exit code 2."""
    # A batch system ends jobs with these; as an exit, they clean up what is half-made.
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, _exit_once)
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"
    try:
        app()
    except TuckerOpsError as error:
        if os.environ.get("TUCKER_OPS_DEBUG"):
            raise
        from rich.markup import escape

        console(stderr=True).print(f"[red]{type(error).__name__}:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
