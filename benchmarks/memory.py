"""How much memory converting and serving take, beside the weights: peaks of processes of their own.

    python -m benchmarks.memory --markdown --json out/bench/memory.json

A chain of dense layers of 2,048x2,048 is converted from its checkpoint by `aqt convert`, then
loaded and asked for a row as a server does it, each in a process of its own, whose resident memory
is read again and again. The same is done with one layer of 16x16: that is the base, of Python, JAX
and the compiler. What is more is divided by the bytes of the weights, or of the largest of them.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from aqt_engine import QuantMode, bundle, config
from aqt_engine.execution import Program
from aqt_engine.flax import AqtDotGeneral
from benchmarks import command
from benchmarks.environment import described, environment
from examples.pipeline import save

WIDTH, LAYERS, SMALL_WIDTH = 2048, 16, 16
TILE = 16
# Beside the base: of the bundle while serving, of the largest float tensor while converting.
MOST_SERVING, MOST_CONVERTING = 1.3, 1.5


class Chain(nn.Module):
    """`layers` square layers in int8, one after the other."""

    layers: int
    quant_mode: QuantMode

    @nn.compact
    def __call__(self, inputs):
        int8 = config.fully_quantized(fwd_bits=8, bwd_bits=None)
        for _ in range(self.layers):
            dot_general = AqtDotGeneral(int8, rhs_quant_mode=self.quant_mode)
            inputs = nn.Dense(inputs.shape[-1], use_bias=False, dot_general=dot_general)(inputs)
        return inputs


def large(quant_mode: QuantMode) -> Chain:
    return Chain(layers=LAYERS, quant_mode=quant_mode)


def small(quant_mode: QuantMode) -> Chain:
    return Chain(layers=1, quant_mode=quant_mode)


def serve(path: Path) -> None:
    """What a server does with a bundle before and for its first answer."""
    program = Program(bundle.load(path), max_rows=TILE)
    (spec,) = program.manifest.inputs
    program({spec.name: np.ones((1, spec.shape[1]), np.float32)})


def peak(*command: str | Path) -> int:
    """The most bytes that the command had resident.

    Raises:
      RuntimeError: it failed.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        most = 0
        while process.poll() is None:
            most = max(most, _high_water_mark(process.pid))
            time.sleep(0.01)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{command} failed: {log.read()[-2000:]}")
    return most


def _high_water_mark(process: int) -> int:
    """Bytes; 0 of a process that has just ended.

    Not that of `wait4`, which begins with what this process had when it started the other.
    """
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def peaks(folder: Path, name: str, layers: int, width: int) -> dict[str, int]:
    """Of converting and of serving one model."""
    rng = np.random.default_rng(0)
    kernels = (rng.normal(size=(width, width)).astype(np.float32) for _ in range(layers))
    params = {f"Dense_{i}": {"kernel": kernel / width**0.5} for i, kernel in enumerate(kernels)}
    save({"params": params}, folder / "checkpoint")
    np.savez(folder / "example.npz", inputs=rng.normal(size=(TILE, width)).astype(np.float32))
    path = folder / "model" / "1"
    converting = peak(
        *(Path(sys.executable).parent / "aqt", "convert", "--model", f"benchmarks.memory:{name}"),
        *("--checkpoint", folder / "checkpoint", "--example", folder / "example.npz"),
        *("--tile", str(TILE), "--output", path),
    )
    serving = peak(sys.executable, "-m", "benchmarks.memory", "--serve", path)
    return {"converting": converting, "serving": serving}


def measure() -> list[dict[str, Any]]:
    """Both phases: bytes of the base, of the large model, and the ratio that the mark is about."""
    with tempfile.TemporaryDirectory() as made:
        folders = [Path(made, name) for name in ("small", "large")]
        for folder in folders:
            folder.mkdir()
        base = peaks(folders[0], "small", 1, SMALL_WIDTH)
        found = peaks(folders[1], "large", LAYERS, WIDTH)
        stored = bundle.read_manifest(folders[1] / "model" / "1").nbytes
    of = {"serving": ("bundle", stored), "converting": ("largest tensor", WIDTH * WIDTH * 4)}
    return [
        {
            "phase": phase,
            "base": base[phase],
            "peak": found[phase],
            "of": what,
            "nbytes": nbytes,
            "ratio": (found[phase] - base[phase]) / nbytes,
            "most": MOST_SERVING if phase == "serving" else MOST_CONVERTING,
        }
        for phase, (what, nbytes) in of.items()
    ]


def show(results: Sequence[dict[str, Any]], *, markdown: bool) -> None:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for column in ("", "base MB", "peak MB", "of", "MB", "(peak - base) / that", "mark", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        sizes = (f"{r[k] / 1e6:.0f}" for k in ("base", "peak"))
        told = "met" if r["ratio"] <= r["most"] else "missed"
        row = (*sizes, r["of"], f"{r['nbytes'] / 1e6:.0f}", f"{r['ratio']:.2f}")
        table.add_row(r["phase"], *row, f"{r['most']}", told)
    Console(width=max(120, Console().width)).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser("memory", __doc__)
    parser.add_argument("--serve", type=Path, metavar="BUNDLE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve)
        return
    before = environment()
    results = measure()
    show(results, markdown=options.markdown)
    Console().print(described(before), soft_wrap=True)
    command.write(options.json, before, results)


if __name__ == "__main__":
    main()
