"""How a command fails: one sentence on stderr and exit code 1, no traceback."""

import contextlib
from collections.abc import Generator
from typing import NoReturn

import typer


@contextlib.contextmanager
def as_sentence(*expected: type[Exception]) -> Generator[None]:
    """Turns `expected` errors, which speak for themselves, into a failure of the command."""
    try:
        yield
    except expected as error:
        _fail(str(error))


@contextlib.contextmanager
def of_the_server() -> Generator[None]:
    """Around imports of what comes with `aqt-server`: the command says so if that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        _fail(f"this command needs {error.name}, which is not installed: pip install aqt-server")


def _fail(sentence: str) -> NoReturn:
    typer.secho(f"aqt: {sentence}", err=True, fg=typer.colors.RED)
    raise typer.Exit(1) from None
