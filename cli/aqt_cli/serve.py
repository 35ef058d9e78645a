"""`aqt serve`: the server, with the flags that its settings define."""

import logging
from typing import TYPE_CHECKING

import typer

from aqt_cli.failures import as_sentence

if TYPE_CHECKING:
    import pydantic_core

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""What the command needs so that every flag, `--help` too, reaches the settings."""


def serve(context: typer.Context) -> None:
    """Serves a model repository over gRPC; `aqt serve --help` lists all settings."""
    import pydantic
    from pydantic_settings import CliApp

    from aqt_server.server import StartError, run
    from aqt_server.settings import Settings

    # By force, as what was just imported has put a handler of its own in place.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("aqt_server").setLevel(logging.INFO)
    with as_sentence(StartError):
        try:
            settings = CliApp.run(Settings, cli_args=context.args)
        except pydantic.ValidationError as error:
            raise StartError("; ".join(map(_sentence, error.errors()))) from None
        run(settings)


def _sentence(error: "pydantic_core.ErrorDetails") -> str:
    if not error["loc"]:
        return error["msg"].removeprefix("Value error, ")
    name = "-".join(str(part) for part in error["loc"]).replace("_", "-")
    given = "" if error["type"] == "missing" else f" (got {error['input']!r})"
    return f"--{name} is wrong{given}: {error['msg'].lower()}"
