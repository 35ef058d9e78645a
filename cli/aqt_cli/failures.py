"""How a command fails: one sentence on stderr and exit code 1, no traceback."""

import contextlib
import sys
from collections.abc import Generator
from typing import NoReturn


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
    # A server that starts well does without it.
    import typer

    typer.secho(f"aqt: {sentence}", err=True, fg=typer.colors.RED)
    sys.exit(1)
