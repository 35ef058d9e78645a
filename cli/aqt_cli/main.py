"""The command `aqt`."""

import sys


def app() -> None:
    """Runs the subcommand that the command line names."""
    if sys.argv[1:2] == ["serve"]:
        # Without what the others import, which is a tenth of a restart.
        from aqt_cli.serve import serve

        serve(sys.argv[2:])
        return
    from aqt_cli.commands import app as commands

    commands()
