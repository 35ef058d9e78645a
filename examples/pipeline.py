"""What every example does with a trained model: save it, run `aqt`, serve it in a process."""

import contextlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from rich.console import Console

from aqt_client import Client, DeadlineExceeded, NotFound, Unavailable

READY_S = 300

# In a file, too, a table keeps its words.
console = Console(width=None if sys.stdout.isatty() else 120)


def save(variables: Mapping[str, Any], path: Path) -> None:
    """Writes an Orbax checkpoint."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), variables)


def aqt(*arguments: str | Path) -> None:
    """Runs the command `aqt` of the environment that this runs in, and shows it."""
    console.print(f"[dim]$ aqt {shlex.join(map(str, arguments))}[/dim]", soft_wrap=True)
    subprocess.run([_command("aqt"), *arguments], check=True)


def shown(name: str) -> Path | str:
    """A console script as a reader would type it."""
    command = _command(name)
    return command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else name


def size_on_disk(directory: Path) -> int:
    """Bytes of all files in it."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _command(name: str) -> Path:
    return Path(sys.executable).parent / name


@contextlib.contextmanager
def server(repository: Path) -> Iterator[str]:
    """A server process of its own, on a free port; gives its address."""
    command = [_command("aqt"), "serve", "--model-repository", repository]
    command += ["--port", "0", "--metrics-port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            first_line = process.stdout.readline()
            if not first_line.startswith("listening on "):
                log.seek(0)
                sys.exit(f"the server did not start: {log.read()}")
            yield first_line.split()[-1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def wait_ready(client: Client, model: str) -> None:
    """Returns when the server has proved the model.

    Raises:
      ServerError: the server has refused it, and says why.
      TimeoutError: it does neither.
    """
    end = time.monotonic() + READY_S
    while not client.is_model_ready(model):
        if time.monotonic() > end:
            raise TimeoutError(f"{model} did not become ready in {READY_S} s")
        with contextlib.suppress(NotFound, Unavailable, DeadlineExceeded):
            client.model_metadata(model)
        time.sleep(0.1)
