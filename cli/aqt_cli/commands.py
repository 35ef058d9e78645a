"""All subcommands of `aqt`, put together."""

import typer

from aqt_cli.bench import bench
from aqt_cli.convert import convert
from aqt_cli.export import export
from aqt_cli.health import health
from aqt_cli.inspect import inspect
from aqt_cli.predict import predict
from aqt_cli.report import report
from aqt_cli.serve import serve as serve_with
from aqt_cli.top import top
from aqt_cli.verify import verify

app = typer.Typer(
    name="aqt",
    help="Accurate Quantized Training: convert, inspect, verify, serve and query int8 models.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
for command in (convert, inspect, verify, export, report, predict, bench, top, health):
    app.command()(command)


@app.command(
    # Every flag, `--help` too, reaches the settings.
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def serve(context: typer.Context) -> None:
    """Serves a model repository; `aqt serve --help` lists all settings."""
    serve_with(context.args)
