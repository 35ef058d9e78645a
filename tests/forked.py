"""`aqt` forked from one process that has imported what it imports: most of a start is that.

A test worker has one such process. What a server or another command does from there on is what
`aqt` does, in a process of its own; tests of the start itself use the command.
"""

import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

from compiled import shared_cache

ENDS_S = 120


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    # The last is what JAX imports for its first program.
    context.set_forkserver_preload(
        [
            *("aqt_cli.commands", "aqt_server.records", "aqt_server.server"),
            *("aqt_server.page.routes", "aqt_server.rest"),
            "scipy.linalg",
        ]
    )
    return context


class Forked:
    """As much of `subprocess.Popen` as tests use, with a pipe for its output, stderr in `log`."""

    def __init__(self, arguments: Sequence[str], log: Path, **variables: str):
        receiver, sender = _context().Pipe(duplex=False)
        environment = {**os.environ, **variables}
        told = (arguments, Path.cwd(), environment, sender, log.absolute())
        self._process = _context().Process(target=_aqt, args=told)
        self._process.start()
        sender.close()
        self.stdout = open(os.dup(receiver.fileno()))  # noqa: SIM115 - closed by whom it is for
        receiver.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        code = self.poll()
        assert code is not None, f"it still runs after {timeout} s"
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def aqt(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """What the command says with these arguments, and how it ends."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "stderr"
        process = Forked(words, log, **variables)
        try:
            with process.stdout as stream:
                out = stream.read()
            code = process.wait(ENDS_S)
        finally:
            process.kill()
        return subprocess.CompletedProcess(words, code, out, log.read_text())


def _aqt(
    arguments: Sequence[str], folder: Path, environment: dict[str, str], out: Connection, log: Path
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.dup2(out.fileno(), 1)
    out.close()
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 2)
    from aqt_cli.main import app
    from aqt_server.compiled import keep_in

    # What a command compiles, a server or a worker need not; a server says where it keeps its own.
    keep_in(Path(shared_cache()))
    sys.argv = ["aqt", *arguments]
    app()
