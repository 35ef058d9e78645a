"""How much memory converting and serving take, beside the weights: peaks of processes of their own.

    python -m benchmarks.memory --markdown --json out/bench/memory.json

A chain of dense layers of 2,048x2,048 is converted from its checkpoint by `aqt convert`, then
loaded, proved and asked for a row by what loads versions in a server, each in a process of its own,
whose memory is read again and again. The same is done with one layer of 16x16: that is the base, of
Python, JAX and the compiler. What is more is divided by the bytes of the weights, or of the largest
of them.

Resident is all that a process has in memory. Anonymous is what of it has no file behind it, so that
the system cannot take it away and read it again.
"""

import argparse
import asyncio
import contextlib
import dataclasses
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
from aqt_engine.flax import AqtDotGeneral
from aqt_server.directory import Directory
from aqt_server.loader import Loader
from aqt_server.settings import Models, Settings
from benchmarks import command
from benchmarks.environment import described, environment
from examples.pipeline import save

WIDTH, LAYERS, SMALL_WIDTH = 2048, 16, 16
TILE = 16
# Beside the base: of the bundle while serving, of the largest float tensor while converting.
MOST = {("serving", "resident"): 1.3, ("converting", "anonymous"): 1.5}


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
    """What a server does with a bundle before and for its first answer, with its defaults."""
    repository = path.parent.parent
    settings = Settings(models=Models(model_repository=str(repository)))
    loading = Loader(settings, Directory(repository)).load((path.parent.name, 1), held=0)
    loaded = asyncio.run(loading)
    (spec,) = loaded.manifest.inputs
    loaded.executor({spec.name: np.ones((1, spec.shape[1]), np.float32)})


@dataclasses.dataclass(frozen=True, slots=True)
class Peak:
    """The most bytes that a process had resident, and of these without a file behind them."""

    resident: int
    anonymous: int


def peak(*command: str | Path) -> Peak:
    """That of the command.

    Raises:
      RuntimeError: it failed.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        resident = anonymous = 0
        while process.poll() is None:
            status = _status(process.pid)
            # Not that of `wait4`, which begins with what this process had when it started another.
            resident = max(resident, status.get("VmHWM", 0))
            anonymous = max(anonymous, status.get("RssAnon", 0))
            time.sleep(0.005)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{command} failed: {log.read()[-2000:]}")
    return Peak(resident, anonymous)


def _status(process: int) -> dict[str, int]:
    """The figures of the memory of a process, in bytes; none of one that has just ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        parts = (line.split() for line in lines if line.endswith(" kB"))
        return {name.removesuffix(":"): int(kilobytes) * 1024 for name, kilobytes, _ in parts}
    return {}


def peaks(folder: Path, name: str, layers: int, width: int) -> dict[str, Peak]:
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

    def result(phase: str, memory: str) -> dict[str, Any]:
        what, nbytes = of[phase]
        at_base, at_peak = (getattr(peaks[phase], memory) for peaks in (base, found))
        ratio = (at_peak - at_base) / nbytes
        return {
            "phase": phase,
            "memory": memory,
            "base": at_base,
            "peak": at_peak,
            "of": what,
            "nbytes": nbytes,
            "ratio": ratio,
            "most": MOST.get((phase, memory)),
        }

    return [result(phase, memory) for phase in of for memory in ("resident", "anonymous")]


def show(results: Sequence[dict[str, Any]], *, markdown: bool) -> None:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for column in ("", "memory", "base MB", "peak MB", "of", "MB", "(peak - base) / that", "mark"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        sizes = (f"{r[k] / 1e6:.0f}" for k in ("base", "peak"))
        row = (*sizes, r["of"], f"{r['nbytes'] / 1e6:.0f}", f"{r['ratio']:.2f}")
        mark = ""
        if r["most"] is not None:
            mark = f"{r['most']}: {'met' if r['ratio'] <= r['most'] else 'missed'}"
        table.add_row(r["phase"], r["memory"], *row, mark)
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
