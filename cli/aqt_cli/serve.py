"""`aqt serve`: the server, with the flags that its settings define."""

import gc
import logging
import os
from collections.abc import Sequence

from aqt_cli.failures import as_sentence, of_the_server


def serve(arguments: Sequence[str]) -> None:
    """Serves as the `arguments` say; those of `--help` lists all settings."""
    # What is imported stays: to look through it again and again takes a tenth of the start.
    gc.disable()
    with of_the_server():
        from aqt_server import configuration

    with as_sentence(configuration.SettingsError):
        found = configuration.read(arguments, os.environ)
    if found.print_only:
        print(found, end="")
        return

    from aqt_server import records
    from aqt_server.server import StartError, run

    gc.freeze()
    gc.enable()
    records.use(found.settings.observe.log_format)
    for variable in configuration.unknown_variables(os.environ):
        logging.getLogger("aqt_server").warning("%s is no setting and is ignored", variable)
    with as_sentence(StartError):
        run(found.settings)
