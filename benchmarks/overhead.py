"""What serving adds to computing: MiniLM behind a server, beside the same executable in process.

    python -m benchmarks.overhead --markdown --json out/bench/overhead.json

Requests are of 32 sentences. In each repeat, `h2load` sends them to `aqt serve` for a while, and
this process then computes them by itself for as long; the rows per second are divided.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from aqt_engine import bundle
from aqt_engine.execution import Program
from aqt_protos import SERVICE_NAME
from benchmarks import command
from benchmarks.contenders import Arrays, ours, running
from benchmarks.environment import described, environment
from benchmarks.load import load
from benchmarks.serving import message
from examples.zoo import MODELS, convert_untrained

MODEL = "minilm_dynamic_int8"
ROWS = 32
IN_FLIGHT = (1, 2, 4)
MARK = 0.9
REPEATS = 5
SECONDS = 4.0


def rows_per_s(program: Program, inputs: Arrays, seconds: float) -> float:
    """Of calls in this process, that follow on each other for about so long."""
    program(inputs)
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        program(inputs)
        calls += 1
    return calls * ROWS / (time.perf_counter() - start)


def measure(repository: Path, *, repeats: int, seconds: float) -> list[dict[str, Any]]:
    """For each number in flight: rows per second served and in process, and their ratios."""
    model = MODELS[MODEL]
    convert_untrained(model, repository)
    program = Program(bundle.load(repository / MODEL / "1"), max_rows=ROWS)
    inputs = model.inputs(np.random.default_rng(1), ROWS, model.lengths[0])
    expected = program(inputs)

    def exact(answer: Arrays) -> bool:
        return all(answer[name].tobytes() == a.tobytes() for name, a in expected.items())

    found: dict[int, list[tuple[float, float]]] = {count: [] for count in IN_FLIGHT}
    with running(ours(repository, MODEL, inputs, exact, fast=False)) as server:
        for _ in range(repeats):
            for count in IN_FLIGHT:
                path = f"/{SERVICE_NAME}/ModelInfer"
                of = {"in_flight": count, "seconds": seconds, "processes": [server.process]}
                served = load(server.address, path, message(MODEL, inputs), **of)
                pair = served.requests_per_s * ROWS, rows_per_s(program, inputs, seconds)
                found[count].append(pair)
    results = []
    for count, pairs in found.items():
        rates = np.array(pairs)
        low, middle, high = np.percentile(rates[:, 0] / rates[:, 1], (25, 50, 75)).tolist()
        served, alone = np.median(rates, axis=0).tolist()
        ratio = {"ratio": middle, "quartiles": [low, high], "pairs": pairs}
        results.append({"in_flight": count, "served": served, "in_process": alone, **ratio})
    return results


def show(results: Sequence[dict[str, Any]], *, markdown: bool) -> None:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for column in ("in flight", "rows/s served", "rows/s in process", "ratio", "quartiles", "mark"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        table.add_row(
            str(r["in_flight"]),
            f"{r['served']:.0f}",
            f"{r['in_process']:.0f}",
            f"{r['ratio']:.2f}",
            "{:.2f} to {:.2f}".format(*r["quartiles"]),
            f"{MARK}: {'met' if r['ratio'] >= MARK else 'missed'}",
        )
    Console(width=max(120, Console().width)).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser("overhead", __doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="default: %(default)s")
    options = parser.parse_args(arguments)
    before = environment()
    with tempfile.TemporaryDirectory() as made:
        results = measure(Path(made), repeats=options.repeats, seconds=options.seconds)
    show(results, markdown=options.markdown)
    Console().print(f"{options.repeats} repeats; {described(before)}", soft_wrap=True)
    command.write(options.json, before, results)


if __name__ == "__main__":
    main()
