"""Servers that answer the same request under load: started, checked with a client, ended."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from aqt_client import Client, ClientError
from benchmarks.mortal import mortal

READY_S = 120
Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A server of the Open Inference Protocol, before it runs.

    Attributes:
      name: as the table has it.
      command: what starts it, listening on 127.0.0.1; {port} stands for a free port.
      model: what is asked.
      inputs: what it is asked, by name.
      expected: what it has to answer, from what it answered.
      environment: variables of its process beside those of this one, {port} in them too.
    """

    name: str
    command: tuple[str, ...]
    model: str
    inputs: Arrays
    expected: Callable[[Arrays], bool]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server that answers: where, and the id of its process, whose children are its too."""

    contender: Contender
    address: str
    process: int


@contextlib.contextmanager
def running(contender: Contender) -> Iterator[Running]:
    """`contender` in a process of its own, which has answered as it should, and ends with this one.

    Raises:
      RuntimeError: it ended, did not answer in time, or answered something else.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    command = mortal(*(part.format(port=port) for part in contender.command))
    environment = {name: v.format(port=port) for name, v in contender.environment.items()}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            _wait_ready(contender, address, process)
            yield Running(contender=contender, address=address, process=process.pid)
        except Exception as error:
            log.seek(0)
            error.add_note(f"the log of {contender.name}: {log.read()[-4000:]}")
            raise
        finally:
            _end(process)


def _wait_ready(contender: Contender, address: str, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + READY_S
    with Client(address, timeout_s=READY_S) as client:
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(ClientError):
                if client.is_model_ready(contender.model):
                    break
            time.sleep(0.2)
        else:
            raise RuntimeError(f"{contender.name} ended, or was not ready in {READY_S} s")
        answer = client.infer(contender.model, contender.inputs)
    if not contender.expected(answer):
        raise RuntimeError(f"{contender.name} answered {dict(answer)}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends the process and, by the session that it began, all that it has started."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)


def ours(
    repository: Path, model: str, inputs: Arrays, expected: Callable[[Arrays], bool], *, fast: bool
) -> Contender:
    """`aqt serve` with the bundle `model` of `repository`: its fast door, or that of Python."""
    asked, other = ("--fast-port", "--port") if fast else ("--port", "--fast-port")
    return Contender(
        name="aqt serve --fast-port" if fast else "aqt serve",
        command=(
            *(str(Path(sys.executable).parent / "aqt"), "serve"),
            *("--model-repository", str(repository), "--host", "127.0.0.1", "--metrics-port", "-1"),
            *(asked, "{port}", other, "0" if fast else "-1"),
        ),
        model=model,
        inputs=inputs,
        expected=expected,
    )
