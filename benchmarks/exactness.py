"""What exactness costs: a bundle's programs in mode exact and in mode fast, side by side.

    python -m benchmarks.exactness --markdown --json out/bench/exactness.json
    python -m benchmarks.exactness --repository out/zoo/repository

The bundles are those of a repository, the newest version of each, or else the models of the zoo,
converted here with weights that were not trained, and in the tiles that are measured to be cheapest
here. Both modes compute the same rows in one process, one after the other, in another order each
time, and each pair gives a ratio of its times: what slows the machine down slows both. The table
gives the median of the ratios and their quartiles twice: of elapsed time, and of processor time,
which is summed over all threads and hardly changes with what else the machine does. It also counts
the rows that have other bits in mode fast.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from aqt_engine import bundle, proof, witness
from aqt_engine.execution import Mode, Program
from benchmarks import command
from benchmarks.bundles import newest, repository_or_zoo, whole_zoo
from benchmarks.environment import described, environment

ROWS = (1, 8, 32, 128)
PAIRS = 60
# What takes longer is timed in fewer pairs; and a batch that takes still longer is left out.
PAIRS_S = 8.0
LEAST_PAIRS = 6
LONGEST_S = 2.0
# Calls of one timing last together at least this long, so that the clock does not matter.
TIMED_S = 0.01


def seconds(call: Callable[[], object], calls: int) -> tuple[float, float]:
    """Elapsed and processor seconds of one of so many calls."""
    before = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    after = time.perf_counter(), time.process_time()
    elapsed, processor = (np.subtract(after, before) / calls).tolist()
    return elapsed, processor


def compare(programs: dict[Mode, Program], inputs: bundle.Arrays, pairs: int) -> dict[str, Any]:
    """What is reported of one model at one number of rows."""
    calls = {mode: lambda p=program: p(inputs) for mode, program in programs.items()}
    verdict = witness.compare(calls[Mode.FAST](), calls[Mode.EXACT]())
    calls[Mode.FAST]()
    once = seconds(calls[Mode.FAST], 3)[0]
    repeats = int(np.ceil(TIMED_S / once))
    pairs = min(pairs, max(LEAST_PAIRS, round(PAIRS_S / (2 * repeats * once))))
    order = np.random.default_rng(0)
    times: dict[Mode, list[tuple[float, float]]] = {mode: [] for mode in calls}
    for _ in range(pairs):
        for mode in order.permutation(list(calls)):
            times[Mode(mode)].append(seconds(calls[Mode(mode)], repeats))
    exact, fast = (np.array(times[mode]) for mode in (Mode.EXACT, Mode.FAST))
    low, middle, high = np.percentile(exact / fast, (25, 50, 75), axis=0)
    return {
        "rows": len(next(iter(inputs.values()))),
        "pairs": pairs,
        "fast_ms": float(np.median(fast[:, 0])) * 1e3,
        "ratio": float(middle[0]),
        "quartiles": [float(low[0]), float(high[0])],
        "processor_ratio": float(middle[1]),
        "processor_quartiles": [float(low[1]), float(high[1])],
        "differing_rows": max(d.rows for d in verdict.differences),
        "seconds": {mode.value: times[mode] for mode in times},
    }


def of_bundle(name: str, path: Path, pairs: int) -> list[dict[str, Any]]:
    """The same for every number of rows, at the model's longest length bucket."""
    loaded = bundle.load(path)
    if not loaded.batched:
        print(f"{name} has no graph for mode fast: left out", file=sys.stderr, flush=True)
        return []
    modes = (Mode.EXACT, Mode.FAST)
    programs = {mode: Program(loaded, max_rows=ROWS[-1], mode=mode) for mode in modes}
    typical = loaded.witnesses[loaded.manifest.length_buckets[-1]].inputs
    inputs = proof.sampled(typical, ROWS[-1], np.random.default_rng(0))
    found: list[dict[str, Any]] = []
    for rows in ROWS:
        if found and found[-1]["fast_ms"] / found[-1]["rows"] * rows > LONGEST_S * 1e3:
            print(f"{name}, {rows} rows: left out, too long", file=sys.stderr, flush=True)
            break
        print(f"{name}, {rows} rows", file=sys.stderr, flush=True)
        result = compare(programs, {k: a[:rows] for k, a in inputs.items()}, pairs)
        found.append({"model": name, "tile": loaded.manifest.tile, **result})
    return found


def show(results: Sequence[dict[str, Any]], *, markdown: bool) -> None:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    table.add_column("model", no_wrap=True)
    for column in (
        *("tile", "rows", "pairs", "ms, fast", "exact / fast", "quartiles"),
        *("processor", "quartiles", "rows that differ in mode fast"),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result["model"],
            str(result["tile"]),
            str(result["rows"]),
            str(result["pairs"]),
            f"{result['fast_ms']:.2f}",
            f"{result['ratio']:.2f}",
            "{:.2f} to {:.2f}".format(*result["quartiles"]),
            f"{result['processor_ratio']:.2f}",
            "{:.2f} to {:.2f}".format(*result["processor_quartiles"]),
            str(result["differing_rows"]),
        )
    Console(width=max(160, Console().width)).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser("exactness", __doc__)
    parser.add_argument("--pairs", type=int, default=PAIRS, help="at most (default: %(default)s)")
    parser.add_argument("--repository", type=Path, metavar="DIR", help="of bundles, NAME/VERSION/")
    options = parser.parse_args(arguments)
    before = environment()
    with repository_or_zoo(options.repository, whole_zoo) as repository:
        bundles = newest(repository).items()
        results = [r for name, path in bundles for r in of_bundle(name, path, options.pairs)]
    show(results, markdown=options.markdown)
    Console().print(described(before), soft_wrap=True)
    command.write(options.json, before, results)


if __name__ == "__main__":
    main()
