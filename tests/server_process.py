"""A real server process for tests: on a free port, with its log kept, ended by its own id."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from compiled import shared_cache
from forked import Forked

AQT = Path(sys.executable).parent / "aqt"
WAIT_S = 120


class ServerProcess:
    """A process that runs `command`, or `aqt serve` with these flags as one that is forked."""

    def __init__(self, command: list[str | Path], log: Path, *, forked: bool = False):
        self._log = log
        if forked:
            self.process = Forked([str(argument) for argument in command[1:]], log)
        else:
            with log.open("w") as stream:
                self.process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=stream, text=True
                )
        line = self.process.stdout.readline()
        assert line.startswith("listening on "), self.log()
        self.address = line.split()[-1]
        self.fast_address = self._url("fast on ") if "--fast-port" in command else None
        self.http_url = self._url("http on ") if "--http-port" in command else None
        self.page_url = self._url("status page on ") if "--status-page" in command else None
        off = command[-2:] == ["--metrics-port", "-1"]
        self.metrics_url = None if off else self._url("metrics on ")

    def _url(self, beginning: str) -> str:
        line = self.process.stdout.readline()
        assert line.startswith(beginning), self.log()
        return line.split()[-1]

    def log(self) -> str:
        return self._log.read_text()

    def wait_ready(self, credentials: grpc.ChannelCredentials | None = None) -> None:
        """Blocks on the health service's own stream until everything is loaded or refused."""
        with self.channel(credentials) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(), timeout=WAIT_S, wait_for_ready=True
            )
            for response in watch:
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return
        raise AssertionError(f"the server ended before it was ready: {self.log()}")

    def channel(self, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
        if credentials:
            return grpc.secure_channel(self.address, credentials)
        return grpc.insecure_channel(self.address)

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)


@contextlib.contextmanager
def serving(
    repository: Path,
    *flags: str,
    log: Path,
    ready: bool = True,
    credentials: grpc.ChannelCredentials | None = None,
    forked: bool = True,
    by: Sequence[str | Path] = (AQT,),
) -> Iterator[ServerProcess]:
    """A server of `repository`; not `forked`, `by` the command, as a user starts it."""
    command = [*by, "serve", "--model-repository", repository, "--port", "0", "--metrics-port", "0"]
    command += ["--compilation-cache", shared_cache(), *flags]
    server = ServerProcess(command, log, forked=forked)
    try:
        if ready:
            server.wait_ready(credentials)
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()
        server.process.stdout.close()


def eventually(condition: Callable[[], bool]) -> None:
    """Returns once `condition` holds, which has to be within the bounded wait."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "the condition never came to hold"
        time.sleep(0.05)


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, **variables}
