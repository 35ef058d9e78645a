"""Load from `h2load`, which costs little, on one connection; and what a server spends on it."""

import contextlib
import dataclasses
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.mortal import mortal

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_WAIT_S = 60


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one run measured.

    `processor_s` are the seconds of all cores that the server spent on each request, and
    `response_bytes` those of the messages that it sent for each, without headers.
    """

    requests_per_s: float
    processor_s: float
    response_bytes: float


def load(
    address: str,
    path: str,
    message: bytes,
    *,
    in_flight: int,
    clients: int = 1,
    seconds: float,
    processes: Iterable[int],
) -> Load:
    """`message` is sent to the RPC at `path` for about so many seconds, `in_flight` at a time.

    So many are under way on the connection of each of the `clients`.

    `processes` are the ids of the server's, whose children count too.

    Raises:
      RuntimeError: h2load is not there, or a request had no answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = (f"http://{address}{path}", _body(folder, message), in_flight, clients)
        # Counted, not timed: h2load then waits for every answer.
        least = in_flight * clients
        trial = _requests_per_s(_h2load(*command, requests=20 * least))
        requests = max(least, math.ceil(trial * seconds / 4))
        rate = _requests_per_s(_h2load(*command, requests=requests))
        requests = max(least, math.ceil(rate * seconds))
        tree = [p for process in processes for p in _tree(process)]
        before = _processor_s(tree)
        told = _h2load(*command, requests=requests)
        spent = _processor_s(tree) - before
    match = re.search(r"\((\d+)\) data$", told, re.MULTILINE)
    if not match or f"{requests} succeeded, 0 failed" not in told:
        raise RuntimeError(f"h2load had not an answer to every request: {told}")
    return Load(
        requests_per_s=_requests_per_s(told),
        processor_s=spent / requests,
        response_bytes=int(match[1]) / requests,
    )


@contextlib.contextmanager
def flooding(address: str, path: str, message: bytes, *, in_flight: int) -> Iterator[None]:
    """Keeps `in_flight` requests under way while the block runs, for a quarter of an hour at most.

    Raises:
      RuntimeError: h2load is not there, or ended before the block.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = _command(f"http://{address}{path}", _body(folder, message), in_flight, 1)
        process = subprocess.Popen(mortal(*command, "-D", "900"), stdout=subprocess.DEVNULL)
        try:
            yield
            if process.poll() is not None:
                raise RuntimeError("h2load ended before it was told to")
        finally:
            process.kill()
            process.wait(_WAIT_S)


def _body(folder: str, message: bytes) -> Path:
    """A file of `message` as gRPC frames it."""
    body = Path(folder, "body")
    body.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
    return body


def _command(url: str, body: Path, in_flight: int, clients: int) -> list[str]:
    command = shutil.which("h2load")
    if command is None:
        raise RuntimeError("h2load is not installed: it is in the package nghttp2-client of Debian")
    headers = ("content-type: application/grpc", "te: trailers")
    return [
        *(command, "-c", str(clients), "-t", "1", "-m", str(in_flight), "-d", str(body)),
        *(*(part for header in headers for part in ("-H", header)), url),
    ]


def _h2load(url: str, body: Path, in_flight: int, clients: int, *, requests: int) -> str:
    done = subprocess.run(
        [*_command(url, body, in_flight, clients), "-n", str(requests)],
        capture_output=True,
        text=True,
        check=True,
        timeout=_WAIT_S,
    )
    return done.stdout


def _requests_per_s(told: str) -> float:
    match = re.search(r"finished in .*, ([\d.]+) req/s", told)
    if not match or not float(match[1]):
        raise RuntimeError(f"h2load did not finish: {told}")
    return float(match[1])


def _tree(process: int) -> list[int]:
    """A process and all that it has started."""
    found = [process]
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        found += [p for child in children.read_text().split() for p in _tree(int(child))]
    return found


def _processor_s(processes: Iterable[int]) -> float:
    ticks = 0
    for process in processes:
        # The name of the command comes second, and may have spaces in its brackets.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_S
