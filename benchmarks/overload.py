"""What a server does that is asked for more than it can: answers in time, and what it refuses.

    python -m benchmarks.overload --json out/bench/overload.json

The capacity is measured first, by clients that wait for each answer before they ask again. Then
requests come at drawn moments, so many times as fast as that whatever is answered, each with the
same deadline. Both are counted over a time that begins when the load has been there for as long as
the deadline, by what comes back in it. Goodput is what is answered before its deadline; the table
has it as a share of the capacity that was measured right before. Every answer is compared with the
training forward's.

The server gets one half of the processors, and the clients the other, as if they had machines of
their own; with `--shared`, and where there is one processor only, both have all. The processor time
of either is told.
"""

import argparse
import asyncio
import collections
import contextlib
import copy
import dataclasses
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import grpc
import jax
import numpy as np
import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from aqt_engine import QuantMode, config
from aqt_engine.convert import convert
from aqt_engine.flax import AqtDotGeneral
from aqt_protos import SERVICE_NAME
from aqt_protos import open_inference_pb2 as pb
from benchmarks import command
from benchmarks.contenders import Arrays, ours, running
from benchmarks.environment import described, environment
from benchmarks.serving import message
from examples import zoo
from examples.entry import forward_of

MODEL = "wide"
FEATURES = 1024
MODELS = ("16", "64", "minilm_dynamic_int8")
"""So many layers: few take little more to compute than to ask for, many long; or one of the zoo."""
ROWS = 16
ZOO_ROWS = 32
FACTORS = (1.0, 2.0)
DOORS = ("port", "fast-port")
IN_FLIGHT = 32
_RETRY = "grpc-status-details-bin"


@dataclasses.dataclass
class Outcomes:
    """What came back after the moment `since`, in seconds from when each request was sent."""

    since: float
    answered: list[float] = dataclasses.field(default_factory=list)
    refused: list[float] = dataclasses.field(default_factory=list)
    """At once, as they were told when to come again."""
    failed: list[float] = dataclasses.field(default_factory=list)
    """After they had been accepted."""
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
            if (now := time.perf_counter()) > outcomes.since:
                told = any(key == _RETRY for key, _ in error.trailing_metadata() or ())
                (outcomes.refused if told else outcomes.failed).append(now - started)
        else:
            if (now := time.perf_counter()) > outcomes.since:
                outcomes.answered.append(now - started)
            outcomes.wrong += response.raw_output_contents[0] != self._expected

    async def capacity(self, seconds: float) -> float:
        """Answers a second, while `IN_FLIGHT` clients each wait for theirs and ask again."""
        started = time.perf_counter()
        outcomes = Outcomes(started + self.deadline_s)
        end = outcomes.since + seconds

        async def client() -> None:
            while time.perf_counter() < end:
                await self.ask(outcomes, 60)

        asked = [asyncio.create_task(client()) for _ in range(IN_FLIGHT)]
        await asyncio.sleep(end - time.perf_counter())
        answered = len(outcomes.answered)
        await asyncio.gather(*asked)
        assert not outcomes.refused
        assert not outcomes.failed
        assert not outcomes.wrong
        return answered / seconds

    async def offer(self, rate: float, seconds: float, seed: int) -> Outcomes:
        """What comes of `rate` requests a second at drawn moments, whatever is answered."""
        rng = np.random.default_rng(seed)
        started = time.perf_counter()
        outcomes = Outcomes(started + self.deadline_s)
        at, asked = 0.0, set[asyncio.Task[None]]()
        while (at := at + rng.exponential(1 / rate)) < self.deadline_s + seconds:
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            task = asyncio.create_task(self.ask(outcomes, self.deadline_s))
            asked.add(task)
            task.add_done_callback(asked.discard)
        counted = copy.deepcopy(outcomes)
        await asyncio.gather(*asked)
        counted.wrong = outcomes.wrong
        return counted


def _model(layers: int, mode: QuantMode = QuantMode.TRAIN) -> nn.Module:
    int8 = AqtDotGeneral(config.fully_quantized(8), rhs_quant_mode=mode)
    return nn.Sequential([nn.Dense(FEATURES, dot_general=int8) for _ in range(layers)])


def bundle(repository: Path, layers: int) -> tuple[Arrays, Arrays]:
    """Converts a model that takes a while to compute; a request to it, and its answer."""
    typical = np.random.default_rng(0).normal(size=(ROWS, FEATURES)).astype(np.float32)
    model = functools.partial(_model, layers)
    variables = model().init(jax.random.key(0), typical)
    convert(model, variables, {"inputs": typical}, repository / MODEL / "1", tile=ROWS)

    def named(variables: Any, inputs: np.ndarray) -> dict[str, Any]:
        return {"output": model().apply(variables, inputs)}

    inputs = {"inputs": typical}
    return inputs, forward_of(named, variables, ROWS)(inputs)


def of_the_zoo(repository: Path, name: str) -> tuple[Arrays, Arrays]:
    """Converts a model of the zoo; a request of `ZOO_ROWS` rows to it, and its answer."""
    model = zoo.MODELS[name]
    forward = zoo.convert_untrained(model, repository)
    inputs = model.inputs(np.random.default_rng(1), ZOO_ROWS, model.lengths[0])
    return inputs, forward(inputs)


async def measure(
    address: str, sent: bytes, expected: bytes, *, process: int, factors: Sequence[float],
    seconds: float, deadline_s: float, repeats: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """For each factor the medians over `repeats`, capacity and load by turns."""
    server, client = psutil.Process(process), psutil.Process()
    async with grpc.aio.insecure_channel(address) as channel:
        clients = Clients(channel, sent, expected, deadline_s)
        await clients.capacity(1.0)
        measured: dict[float, list[dict[str, float]]] = collections.defaultdict(list)
        for repeat in range(repeats):
            for factor in factors:
                capacity = await clients.capacity(seconds)
                before = _cores(server), _cores(client), time.perf_counter()
                outcomes = await clients.offer(factor * capacity, seconds, repeat)
                took = time.perf_counter() - before[2]
                one = _summary(capacity, outcomes, seconds, deadline_s)
                one["server_cores"] = (_cores(server) - before[0]) / took
                one["client_cores"] = (_cores(client) - before[1]) / took
                measured[factor].append(one)
    return [
        {"factor": factor, "all": found, "worst_goodput": min(one["goodput"] for one in found)}
        | {key: statistics.median(one[key] for one in found) for key in found[0]}
        for factor, found in measured.items()
    ]


@contextlib.contextmanager
def on_processors(which: Sequence[int]) -> Iterator[None]:
    """This thread, and what it starts, on these processors only, for as long as it is entered."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, which)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def halves(*, shared: bool) -> tuple[list[int], list[int]]:
    """The processors of the server, and those of the clients."""
    every = sorted(os.sched_getaffinity(0))
    half = len(every) // 2
    return (every, every) if shared or not half else (every[half:], every[:half])


def _cores(process: psutil.Process) -> float:
    spent = process.cpu_times()
    return spent.user + spent.system


def _summary(
    capacity: float, outcomes: Outcomes, seconds: float, deadline_s: float
) -> dict[str, float]:
    # One that was accepted and failed in the end took longer than it may have.
    accepted = [*outcomes.answered, *(max(took, deadline_s) for took in outcomes.failed)]
    refused = outcomes.refused
    in_time = sum(took <= deadline_s for took in outcomes.answered)
    return {
        "capacity_per_s": capacity,
        "offered_per_s": (len(accepted) + len(refused)) / seconds,
        "goodput": in_time / seconds / capacity,
        "accepted_p50_s": _percentile(accepted, 50),
        "accepted_p99_s": _percentile(accepted, 99),
        "late": 1 - in_time / max(1, len(accepted)),
        "refused": len(refused) / max(1, len(refused) + len(accepted)),
        "refused_p50_s": _percentile(refused, 50),
        "wrong": outcomes.wrong,
    }


def _percentile(times: Sequence[float], percent: float) -> float:
    return float(np.percentile(times, percent)) if times else 0.0


def table(measured: Sequence[dict[str, Any]], title: str, *, markdown: bool) -> Table:
    """The figures, a line for each load."""
    made = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD, title=title)
    for column in (
        *("model", "door", "load", "capacity/s", "goodput of it", "worst", "accepted p50, ms"),
        *("p99, ms", "late", "refused", "told in, ms", "cores: server", "client"),
    ):
        made.add_column(column, justify="right")
    for one in measured:
        made.add_row(
            one["model"],
            one["door"],
            f"{one['factor']:g}x",
            f"{one['capacity_per_s']:.0f}",
            f"{one['goodput']:.0%}",
            f"{one['worst_goodput']:.0%}",
            f"{one['accepted_p50_s'] * 1e3:.0f}",
            f"{one['accepted_p99_s'] * 1e3:.0f}",
            f"{one['late']:.1%}",
            f"{one['refused']:.0%}",
            f"{one['refused_p50_s'] * 1e3:.1f}",
            f"{one['server_cores']:.2f}",
            f"{one['client_cores']:.2f}",
        )
    return made


def _measured(model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What a model does, through each door."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        made = bundle(repository, int(model)) if model.isdigit() else of_the_zoo(repository, model)
        inputs, expected = made
        name = MODEL if model.isdigit() else model
        (output,) = expected

        def exact(answer: Any) -> bool:
            return answer[output].tobytes() == expected[output].tobytes()

        found: list[dict[str, Any]] = []
        of_server, of_clients = halves(shared=arguments.shared)
        for door in arguments.doors:
            contender = ours(repository, name, inputs, exact, fast=door == "fast-port")
            with contextlib.ExitStack() as stack:
                with on_processors(of_server):
                    server = stack.enter_context(running(contender))
                stack.enter_context(on_processors(of_clients))
                rows = asyncio.run(
                    measure(
                        server.address,
                        message(name, inputs),
                        expected[output].tobytes(),
                        process=server.process,
                        factors=arguments.factors,
                        seconds=arguments.seconds,
                        deadline_s=arguments.deadline_s,
                        repeats=arguments.repeats,
                    )
                )
            found += [{"model": model, "door": door} | row for row in rows]
    return found


def main() -> None:
    parser = command.parser("overload", __doc__)
    parser.add_argument(
        "--models", nargs="+", default=MODELS, help="numbers of layers, and names of the zoo"
    )
    parser.add_argument("--doors", nargs="+", default=DOORS, choices=DOORS)
    parser.add_argument(
        "--shared", action="store_true", help="all processors for the server and the clients"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--deadline-s", type=float, default=0.5)
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS)
    arguments = parser.parse_args()
    measured = [row for model in arguments.models for row in _measured(model, arguments)]
    where = environment()
    title = f"Overload, deadline {arguments.deadline_s:g} s, medians of {arguments.repeats}"
    console = Console(width=170)
    console.print(table(measured, title, markdown=arguments.markdown))
    console.print(described(where))
    command.write(arguments.json, where, measured)


if __name__ == "__main__":
    main()
