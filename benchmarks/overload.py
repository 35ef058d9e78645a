"""What a server does that is asked for more than it can: answers in time, and what it refuses.

    python -m benchmarks.overload --markdown --json out/bench/overload.json

The capacity is measured first, by clients that wait for each answer before they ask again. Then
requests come at drawn moments, so many times as fast as that whatever is answered, each with the
same deadline. Goodput is what is answered before its deadline; the table has it as a share of the
capacity that was measured right before. Every answer is compared with the training forward's.
"""

import argparse
import asyncio
import collections
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import grpc
import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from aqt_engine import QuantMode, config
from aqt_engine.convert import convert
from aqt_engine.flax import AqtDotGeneral
from aqt_protos import SERVICE_NAME
from aqt_protos import open_inference_pb2 as pb
from benchmarks.contenders import ours, running
from benchmarks.environment import described, environment
from benchmarks.serving import message
from examples.entry import forward_of

MODEL = "wide"
FEATURES = 1024
LAYERS = 16
ROWS = 16
FACTORS = (0.5, 1.0, 2.0, 4.0)
IN_FLIGHT = 32
_RETRY = "grpc-status-details-bin"


@dataclasses.dataclass
class Outcomes:
    """What came of the requests of one load, in seconds from when each was sent."""

    answered: list[float] = dataclasses.field(default_factory=list)
    refused: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )
    with_retry: int = 0
    """Of the refused, those that were told when to come again."""
    wrong: int = 0


class Clients:
    """Many clients of one server, which send the same request."""

    def __init__(self, channel: grpc.aio.Channel, sent: bytes, expected: bytes, deadline_s: float):
        self._call: Any = channel.unary_unary(
            f"/{SERVICE_NAME}/ModelInfer", response_deserializer=pb.ModelInferResponse.FromString
        )
        self._sent = sent
        self._expected = expected
        self.deadline_s = deadline_s

    async def ask(self, outcomes: Outcomes, deadline_s: float) -> None:
        started = time.perf_counter()
        try:
            response = await self._call(self._sent, timeout=deadline_s)
        except grpc.aio.AioRpcError as error:
            outcomes.refused[error.code().name].append(time.perf_counter() - started)
            outcomes.with_retry += any(key == _RETRY for key, _ in error.trailing_metadata() or ())
        else:
            outcomes.answered.append(time.perf_counter() - started)
            outcomes.wrong += response.raw_output_contents[0] != self._expected

    async def capacity(self, seconds: float) -> float:
        """Answers a second, while `IN_FLIGHT` clients each wait for theirs and ask again."""
        outcomes = Outcomes()
        end = time.perf_counter() + seconds

        async def client() -> None:
            while time.perf_counter() < end:
                await self.ask(outcomes, 60)

        await asyncio.gather(*(client() for _ in range(IN_FLIGHT)))
        assert not outcomes.refused
        assert not outcomes.wrong
        return len(outcomes.answered) / seconds

    async def offer(self, rate: float, seconds: float, seed: int) -> Outcomes:
        """What comes of `rate` requests a second at drawn moments, whatever is answered."""
        outcomes = Outcomes()
        rng = np.random.default_rng(seed)
        started = time.perf_counter()
        at = 0.0
        async with asyncio.TaskGroup() as asked:
            while (at := at + rng.exponential(1 / rate)) < seconds:
                await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
                asked.create_task(self.ask(outcomes, self.deadline_s))
        return outcomes


def _model(mode: QuantMode = QuantMode.TRAIN) -> nn.Module:
    int8 = AqtDotGeneral(config.fully_quantized(8), rhs_quant_mode=mode)
    return nn.Sequential([nn.Dense(FEATURES, dot_general=int8) for _ in range(LAYERS)])


def bundle(repository: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Converts a model that takes a while to compute; a request to it, and its answer."""
    typical = np.random.default_rng(0).normal(size=(ROWS, FEATURES)).astype(np.float32)
    variables = _model().init(jax.random.key(0), typical)
    convert(_model, variables, {"inputs": typical}, repository / MODEL / "1", tile=ROWS)

    def named(variables: Any, inputs: np.ndarray) -> dict[str, Any]:
        return {"output": _model().apply(variables, inputs)}

    inputs = {"inputs": typical}
    return inputs, forward_of(named, variables, ROWS)(inputs)["output"]


async def measure(
    address: str, sent: bytes, expected: bytes, *, factors: Sequence[float], seconds: float,
    deadline_s: float, repeats: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """For each factor the medians over `repeats`, capacity and load by turns."""
    async with grpc.aio.insecure_channel(address) as channel:
        clients = Clients(channel, sent, expected, deadline_s)
        await clients.capacity(1.0)
        measured: dict[float, list[dict[str, float]]] = collections.defaultdict(list)
        for repeat in range(repeats):
            for factor in factors:
                capacity = await clients.capacity(seconds)
                outcomes = await clients.offer(factor * capacity, seconds, repeat)
                measured[factor].append(_summary(capacity, outcomes, seconds))
    return [
        {"factor": factor, "worst_goodput": min(one["goodput"] for one in found)}
        | {key: statistics.median(one[key] for one in found) for key in found[0]}
        for factor, found in measured.items()
    ]


def _summary(capacity: float, outcomes: Outcomes, seconds: float) -> dict[str, float]:
    refused = [took for times in outcomes.refused.values() for took in times]
    return {
        "capacity_per_s": capacity,
        "offered_per_s": (len(outcomes.answered) + len(refused)) / seconds,
        "goodput": len(outcomes.answered) / seconds / capacity,
        "answered_p50_s": _percentile(outcomes.answered, 50),
        "answered_p99_s": _percentile(outcomes.answered, 99),
        "refused": len(refused) / max(1, len(refused) + len(outcomes.answered)),
        "refused_p50_s": _percentile(refused, 50),
        "with_retry": outcomes.with_retry / max(1, len(refused)),
        "wrong": outcomes.wrong,
        **{f"refused_{code}": len(outcomes.refused[code]) for code in _CODES},
    }


_CODES = ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")


def _percentile(times: Sequence[float], percent: float) -> float:
    return float(np.percentile(times, percent)) if times else 0.0


def table(measured: Sequence[dict[str, Any]], title: str) -> Table:
    """The figures, a line for each load."""
    made = Table(box=box.MARKDOWN, title=title)
    for column in (
        *("load", "offered/s", "goodput of capacity", "worst", "answered p50, ms", "p99, ms"),
        *("refused", "told in, ms", "queue full", "no time"),
    ):
        made.add_column(column, justify="right")
    for one in measured:
        made.add_row(
            f"{one['factor']:g}x",
            f"{one['offered_per_s']:.0f}",
            f"{one['goodput']:.0%}",
            f"{one['worst_goodput']:.0%}",
            f"{one['answered_p50_s'] * 1e3:.0f}",
            f"{one['answered_p99_s'] * 1e3:.0f}",
            f"{one['refused']:.0%}",
            f"{one['refused_p50_s'] * 1e3:.1f}",
            *(f"{one[f'refused_{code}']:.0f}" for code in _CODES),
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--deadline-s", type=float, default=0.5)
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        repository = Path(name)
        inputs, expected = bundle(repository)

        def exact(answer: Any) -> bool:
            return answer["output"].tobytes() == expected.tobytes()

        with running(ours(repository, MODEL, inputs, exact, fast=False)) as server:
            measured = asyncio.run(
                measure(
                    server.address,
                    message(MODEL, inputs),
                    expected.tobytes(),
                    factors=arguments.factors,
                    seconds=arguments.seconds,
                    deadline_s=arguments.deadline_s,
                    repeats=arguments.repeats,
                )
            )
    where = environment()
    title = f"Overload, deadline {arguments.deadline_s:g} s, medians of {arguments.repeats}"
    console = Console(width=140)
    console.print(table(measured, title))
    console.print(described(where))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"environment": where, "arguments": vars(arguments), "measured": measured}
        arguments.json.write_text(json.dumps(document, indent=1, default=str))


if __name__ == "__main__":
    main()
