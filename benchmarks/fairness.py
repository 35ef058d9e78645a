"""Whether a flooded model holds up another: latency of one on a server, with the other flooded.

    python -m benchmarks.fairness --markdown --json out/bench/fairness.json

One server has two versions of one model, `flooded` and `other`. `other` is asked for one row at a
steady rate, and each answer is timed from when it was due to be asked for; `h2load` keeps 64
requests of 16 rows to `flooded` in flight meanwhile, or none. Both are measured in turn in each
repeat, and the table has the median over repeats of each percentile, of what the server says that
requests took in its queue and computation on average, and of the ratios.
"""

import asyncio
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import grpc
import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from aqt_client import AsyncClient
from aqt_engine import QuantMode, config
from aqt_engine.convert import convert
from aqt_engine.flax import AqtDotGeneral
from aqt_protos import SERVICE_NAME
from aqt_protos import open_inference_pb2 as pb
from aqt_protos import open_inference_pb2_grpc as pb_grpc
from benchmarks import command
from benchmarks.contenders import Running, ours, running
from benchmarks.environment import described, environment
from benchmarks.load import flooding
from benchmarks.serving import message

FLOODED, OTHER = "flooded", "other"
FEATURES = 1024
LAYERS = 3
TILE = 16
IN_FLIGHT = 64
PER_S = 20
PERCENTILES = (50, 99)
ROWS = ("p50", "p99", "queue, mean", "computing, mean")


def mlp(mode: QuantMode = QuantMode.TRAIN) -> nn.Module:
    """Dense layers in int8, of which a full batch takes milliseconds."""
    int8 = AqtDotGeneral(config.fully_quantized(8), rhs_quant_mode=mode)
    return nn.Sequential([nn.Dense(FEATURES, dot_general=int8) for _ in range(LAYERS)])


def models(repository: Path) -> None:
    """Writes the model into `repository`, under both names."""
    typical = np.random.default_rng(0).normal(size=(TILE, FEATURES)).astype(np.float32)
    variables = mlp().init(jax.random.key(0), typical)
    convert(mlp, variables, {"inputs": typical}, repository / FLOODED / "1", tile=TILE)
    shutil.copytree(repository / FLOODED, repository / OTHER)


def latencies(address: str, row: np.ndarray, *, seconds: float) -> np.ndarray:
    """Seconds from when each request for `row` was due to its answer."""

    async def ask(client: AsyncClient, due: float) -> float:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await client.infer(OTHER, {"inputs": row})
        return time.perf_counter() - due

    async def ask_all() -> list[float]:
        async with AsyncClient(address) as client:
            await client.infer(OTHER, {"inputs": row})
            first = time.perf_counter()
            asked = (ask(client, first + i / PER_S) for i in range(round(seconds * PER_S)))
            return await asyncio.gather(*asked)

    return np.array(asyncio.run(ask_all()))


def told(address: str) -> np.ndarray:
    """Requests to `other` that the server counted, and nanoseconds in queue and computation."""
    with grpc.insecure_channel(address) as channel:
        request = pb.ModelStatisticsRequest(name=OTHER)
        (found,) = pb_grpc.GRPCInferenceServiceStub(channel).ModelStatistics(request).model_stats
    stats = found.inference_stats
    return np.array([stats.success.count, stats.queue.ns, stats.compute_infer.ns])


def asked(address: str, row: np.ndarray, *, seconds: float) -> list[float]:
    """Milliseconds, in the order of `ROWS`."""
    before = told(address)
    percentiles = 1e3 * np.percentile(latencies(address, row, seconds=seconds), PERCENTILES)
    count, queue, computing = told(address) - before
    return [*percentiles.tolist(), queue / count / 1e6, computing / count / 1e6]


def measure(server: Running, *, repeats: int, seconds: float) -> list[dict[str, Any]]:
    """Percentiles of `other`, alone and with the other flooded, of each repeat."""
    rows = np.random.default_rng(1).normal(size=(TILE, FEATURES)).astype(np.float32)
    flood = message(FLOODED, {"inputs": rows})
    found: list[dict[str, Any]] = []
    path = f"/{SERVICE_NAME}/ModelInfer"
    for repeat in range(repeats):
        print(f"repeat {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
        alone = asked(server.address, rows[:1], seconds=seconds)
        with flooding(server.address, path, flood, in_flight=IN_FLIGHT):
            latencies(server.address, rows[:1], seconds=0.5)
            beside = asked(server.address, rows[:1], seconds=seconds)
        found.append({"alone_ms": alone, "flooded_ms": beside})
    return found


def show(found: Sequence[Mapping[str, Any]], *, markdown: bool) -> None:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for column in ("", "alone, ms", "other flooded, ms", "ratio", "quartiles"):
        table.add_column(column, justify="right", no_wrap=True)
    for index, name in enumerate(ROWS):
        alone, flooded = (
            np.array([repeat[when][index] for repeat in found])
            for when in ("alone_ms", "flooded_ms")
        )
        low, middle, high = np.percentile(flooded / alone, (25, 50, 75))
        table.add_row(
            name,
            f"{np.median(alone):.1f}",
            f"{np.median(flooded):.1f}",
            f"{middle:.1f}",
            f"{low:.1f} to {high:.1f}",
        )
    Console(width=max(100, Console().width)).print(table)


@contextlib.contextmanager
def served() -> Iterator[Running]:
    """The server with both models."""
    with tempfile.TemporaryDirectory() as made:
        models(Path(made))
        row = np.zeros((1, FEATURES), np.float32)
        contender = ours(
            Path(made), OTHER, {"inputs": row}, lambda answer: answer["output"].size > 0, fast=False
        )
        with running(contender) as server:
            yield server


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser("fairness", __doc__)
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=4.0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    before = environment()
    with served() as server:
        found = measure(server, repeats=options.repeats, seconds=options.seconds)
    show(found, markdown=options.markdown)
    Console().print(f"{options.repeats} repeats; {described(before)}", soft_wrap=True)
    command.write(options.json, before, found)


if __name__ == "__main__":
    main()
