"""How a command fails: one sentence on stderr and exit code 1, no traceback."""

import contextlib
from collections.abc import Generator

import typer


@contextlib.contextmanager
def as_sentence(*expected: type[Exception]) -> Generator[None]:
    """Turns `expected` errors, which speak for themselves, into a failure of the command."""
    try:
        yield
    except expected as error:
        typer.secho(f"aqt: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from None
