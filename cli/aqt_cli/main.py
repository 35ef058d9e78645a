"""Puts the subcommands of `aqt` together."""

import typer

from aqt_cli.convert import convert
from aqt_cli.inspect import inspect
from aqt_cli.verify import verify

app = typer.Typer(
    name="aqt",
    help="Accurate Quantized Training: convert, inspect, verify, serve and query int8 models.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
for command in (convert, inspect, verify):
    app.command()(command)
