"""How long a server takes from its start to its first exact answer, beside importing JAX.

    python -m benchmarks.start --markdown --json out/bench/start.json

`aqt serve` is started on one model of the zoo, MiniLM, in a process of its own. A client waits for
its health service and asks for one row of the bundle's witness; what counts ends when the answer is
there, which has to be the training forward's in every bit. It is started with an empty compilation
cache, and with one that an earlier start has filled. In the same rounds a bare Python imports JAX
and computes a zero: what slows the machine down slows all, and the table has the median of the
ratios of each round. Processor time is that of the server's process, of all threads, until then.
Both have the bytecode of what they import, as a package that was installed does: a Python that is
told to write none (`PYTHONDONTWRITEBYTECODE`) would compile a checkout at every start.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich import box
from rich.console import Console
from rich.table import Table

from aqt_client import Client
from aqt_engine import bundle
from benchmarks import command
from benchmarks.bundles import newest, repository_or_zoo
from benchmarks.environment import described, environment
from examples.zoo import MODELS, convert_untrained

MODEL = "minilm_dynamic_int8"
BARE = "Python imports JAX and computes a zero"
COLD = "first start: all is compiled and proved"
WARM = "restart"
# Of the time that a bare Python takes to import JAX, a restart.
MARK = 2.0
_BARE_CODE = "import jax; jax.numpy.zeros(1).block_until_ready(); print(flush=True); input()"
_WAIT_S = 300
Figures = dict[str, float]


@contextlib.contextmanager
def started(repository: Path, cache: Path, *flags: str) -> Iterator[tuple[psutil.Popen, str]]:
    """A server's process and its address, from when it says that."""
    serve = [Path(sys.executable).parent / "aqt", "serve", "--model-repository", repository]
    serve += ["--compilation-cache", cache, "--port", "0", "--metrics-port", "0", *flags]
    with tempfile.TemporaryFile("w+") as log:
        process = psutil.Popen(
            list(map(str, serve)),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=_with_bytecode(),
        )
        try:
            line = process.stdout.readline()
            if not line.startswith("listening on "):
                log.seek(0)
                raise RuntimeError(f"the server did not start: {log.read()[-2000:]}")
            yield process, line.split()[-1]
        finally:
            process.terminate()
            process.wait(_WAIT_S)
            process.stdout.close()


def first_answer(path: Path, cache: Path, *flags: str) -> Figures:
    """Seconds from the start of a server to its first answer, elapsed and of processors.

    Raises:
      RuntimeError: it did not start, or the answer is not exact.
    """
    asked = bundle.load(path, with_graphs=False)
    manifest = asked.manifest
    inputs = {s.name: asked.witness.inputs[s.name][:1] for s in manifest.inputs}
    expected = {s.name: asked.witness.outputs[s.name][:1] for s in manifest.outputs}
    began = time.perf_counter()
    with started(path.parent.parent, cache, *flags) as (process, address):
        with grpc.insecure_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(), timeout=_WAIT_S, wait_for_ready=True
            )
            for told in watch:
                if told.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        with Client(address, timeout_s=_WAIT_S) as client:
            found = client.infer(path.parent.name, inputs).outputs
        taken = {"elapsed_s": time.perf_counter() - began, "processor_s": _processor_s(process)}
    if any(found[k].tobytes() != np.ascontiguousarray(v).tobytes() for k, v in expected.items()):
        raise RuntimeError(f"the first answer of {path.parent.name} is not what training answered")
    return taken


def bare() -> Figures:
    """Seconds until a new Python process has imported JAX and computed a zero."""
    began = time.perf_counter()
    process = psutil.Popen(
        [sys.executable, "-c", _BARE_CODE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=_with_bytecode(),
    )
    try:
        if not process.stdout.readline():
            raise RuntimeError("a bare Python with JAX did not come to its end")
        return {"elapsed_s": time.perf_counter() - began, "processor_s": _processor_s(process)}
    finally:
        process.communicate(b"\n", timeout=_WAIT_S)


def measure(path: Path, *, rounds: int) -> dict[str, list[Figures]]:
    """What each way to start takes in each round, in one order and then in the other."""
    found: dict[str, list[Figures]] = {BARE: [], COLD: [], WARM: []}
    with tempfile.TemporaryDirectory() as made:
        filled = Path(made, "filled")
        first_answer(path, filled)
        for count in range(rounds):
            print(f"round {count + 1} of {rounds}", file=sys.stderr, flush=True)
            ways = {
                BARE: bare,
                COLD: lambda empty=Path(made, f"empty{count}"): first_answer(path, empty),
                WARM: lambda: first_answer(path, filled),
            }
            for way in list(ways)[:: 1 if count % 2 else -1]:
                found[way].append(ways[way]())
    return found


def results(found: Mapping[str, Sequence[Figures]]) -> list[dict[str, Any]]:
    """Medians, and of the ratios to the bare Python of the same round also the quartiles."""
    told: list[dict[str, Any]] = []
    for way, figures in found.items():
        one: dict[str, Any] = {"way": way, "all": list(figures)}
        for kind in ("elapsed_s", "processor_s"):
            seconds = np.array([each[kind] for each in figures])
            ratios = seconds / [each[kind] for each in found[BARE]]
            one[kind] = float(np.median(seconds))
            low, one[f"{kind}_ratio"], high = np.percentile(ratios, (25, 50, 75)).tolist()
            one[f"{kind}_quartiles"] = [low, high]
        told.append(one)
    return told


def show(told: Sequence[Mapping[str, Any]], *, markdown: bool) -> None:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in ("s", "x bare", "quartiles", "processor s", "x bare", "quartiles"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in told:
        cells: list[str] = []
        for kind in ("elapsed_s", "processor_s"):
            low, high = one[f"{kind}_quartiles"]
            cells += [f"{one[kind]:.2f}", f"{one[f'{kind}_ratio']:.2f}", f"{low:.2f} to {high:.2f}"]
        table.add_row(one["way"], *cells)
    Console(width=max(120, Console().width)).print(table)
    ratio = next(one["elapsed_s_ratio"] for one in told if one["way"] == WARM)
    met = "met" if ratio <= MARK else "missed"
    Console().print(f"mark: a restart within {MARK:g}x of the bare Python: {ratio:.2f}x, {met}")


def _with_bytecode() -> dict[str, str]:
    """The environment of a Python that keeps what it compiles of modules."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def _processor_s(process: psutil.Process) -> float:
    spent = process.cpu_times()
    return spent.user + spent.system


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser("start", __doc__)
    parser.add_argument(
        "--repository",
        type=Path,
        metavar="DIR",
        help="of one model that was converted; without it MiniLM is, which takes a while",
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    options = parser.parse_args(arguments)
    before = environment()
    with repository_or_zoo(options.repository, _minilm) as repository:
        (path,) = newest(repository).values()
        told = results(measure(path, rounds=options.rounds))
    show(told, markdown=options.markdown)
    Console().print(described(before), soft_wrap=True)
    command.write(options.json, before, told)


def _minilm(repository: Path) -> None:
    convert_untrained(MODELS[MODEL], repository)


if __name__ == "__main__":
    main()
