"""Puts the subcommands of `aqt` together."""

import typer

app = typer.Typer(
    name="aqt",
    help="Accurate Quantized Training: convert, inspect, verify, serve and query int8 models.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
