"""Whether a bundle gives the same bits on other processors, as far as one processor can play them.

    PYTHONPATH=tests python -m benchmarks.platforms --markdown
    PYTHONPATH=tests python -m benchmarks.platforms --repository out/zoo/repository

XLA is limited to older instruction sets, to one core, and to contractions of one thread; each in a
process of its own, which answers the same random rows from the same bundles: those of a repository,
or else the small models of the zoo, converted here with weights that were not trained; and a model
that is portable. XLA with fewer instructions is not another processor: what one does, only it can
show.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from aqt_engine import bundle, proof, witness
from aqt_engine.convert import convert
from aqt_engine.execution import Program
from benchmarks.bundles import newest, repository_or_zoo, small_models
from benchmarks.environment import described, environment
from engine.portable_models import convnet

ROWS = 256
# By name: XLA's flags, and whether the process is held on one core.
PLATFORMS = {
    "all instructions": ("", False),
    "one core": ("", True),
    "one thread for each contraction": ("--xla_cpu_multi_thread_eigen=false", False),
    "AVX2": ("--xla_cpu_max_isa=AVX2", False),
    "AVX": ("--xla_cpu_max_isa=AVX", False),
    "SSE4.2": ("--xla_cpu_max_isa=SSE4_2", False),
}


def answer(out: Path, bundles: Sequence[Path]) -> None:
    """Writes what each bundle answers, length bucket by length bucket, as bytes."""
    found: dict[str, np.ndarray] = {}
    for path in bundles:
        model, loaded = path.parent.name, bundle.load(path)
        program = Program(loaded, max_rows=ROWS)
        for bucket, w in loaded.witnesses.items():
            inputs = proof.sampled(w.inputs, ROWS, np.random.default_rng(0))
            for name, array in program(inputs).items():
                flat = np.ascontiguousarray(array.reshape(ROWS, -1))
                found[f"{model}/{bucket}/{name}/{array.dtype}"] = flat.view(np.uint8)
    np.savez(out, **found)


def run(bundles: Sequence[Path], flags: str, *, one_core: bool) -> dict[str, np.ndarray]:
    """`answer` in a process of its own."""
    held = ["taskset", "-c", str(min(os.sched_getaffinity(0)))] if one_core else []
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "answers.npz"
        subprocess.run(
            [*held, sys.executable, "-m", "benchmarks.platforms", "--answer", out, *bundles],
            env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
        )
        with np.load(out) as answers:
            return {name: a.view(np.dtype(name.rpartition("/")[2])) for name, a in answers.items()}


def compare(found: bundle.Arrays, expected: bundle.Arrays, model: str) -> str:
    """How the answers of one model differ, for a cell of the table."""
    of = [name for name in expected if name.startswith(f"{model}/")]
    verdict = witness.compare({k: found[k] for k in of}, {k: expected[k] for k in of})
    if verdict.exact:
        return "same"
    values = sum(d.values for d in verdict.differences)
    total = sum(d.total for d in verdict.differences)
    ulps = max(d.max_ulps for d in verdict.differences)
    return f"{values:,} of {total:,}, {ulps:,} ulp"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.platforms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--repository", type=Path, metavar="DIR", help="of bundles, NAME/VERSION/")
    parser.add_argument("--answer", nargs="+", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.answer:
        answer(options.answer[0], options.answer[1:])
        return
    answers: dict[str, dict[str, np.ndarray]] = {}
    with (
        repository_or_zoo(options.repository, small_models) as repository,
        tempfile.TemporaryDirectory() as made,
    ):
        portable = Path(made) / "convnet, portable" / "1"
        convert(*convnet(), portable, portable=True)
        bundles = [*newest(repository).values(), portable]
        for platform, (flags, one_core) in PLATFORMS.items():
            print(platform, file=sys.stderr, flush=True)
            answers[platform] = run(bundles, flags, one_core=one_core)
    first, *others = PLATFORMS
    table = Table(box=box.MARKDOWN if options.markdown else box.SIMPLE_HEAD)
    table.add_column("model", no_wrap=True)
    for platform in others:
        table.add_column(platform, justify="right", no_wrap=True)
    for model in (path.parent.name for path in bundles):
        cells = [compare(answers[platform], answers[first], model) for platform in others]
        table.add_row(model, *cells)
    Console(width=max(200, Console().width)).print(table)
    Console().print(f"Values that differ from {first}; {described(environment())}", soft_wrap=True)


if __name__ == "__main__":
    main()
