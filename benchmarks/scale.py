"""How cost grows: with rows, layers, lengths, models that are loaded, and clients.

    python -m benchmarks.scale --markdown --json out/bench/scale.json --plot docs/images/scale.png

Rows, layers and lengths are those of programs in this process: a chain of dense layers in int8, and
the zoo's language model, with weights that were not trained. Models and clients are those of a
server in a process of its own: the same tiny model under so many names, and so many connections of
`h2load` that each send one request at a time to the fast door. Each row of the table says what a
step costs, and what it is of the cost that would be in proportion to the step before: 1 is in
proportion, less is better.
"""

import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from aqt_engine import bundle
from aqt_engine.convert import convert
from aqt_engine.execution import Program
from aqt_protos import SERVICE_NAME
from benchmarks import command
from benchmarks.bundles import TINY, TINY_FEATURES, tiny
from benchmarks.contenders import Arrays, Contender, ours, running
from benchmarks.environment import described, environment
from benchmarks.load import load
from benchmarks.memory import Chain
from benchmarks.serving import message
from examples.zoo import MODELS, convert_untrained

WIDTH, TILE = 256, 16
ROWS = (1, 4, 16, 64, 256, 1024)
LAYERS = (1, 2, 4, 8, 16, 32)
LENGTHS = (16, 32, 64, 128)
SERVED = (1, 10, 100)
CLIENTS = (1, 10, 100, 1000)
_CALLS_S = 0.3
_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What was measured at one size of one thing."""

    of: str
    size: int
    measured: str
    unit: str
    value: float


def in_program(program: Program, inputs: Arrays) -> float:
    """Milliseconds of a call, in the median."""
    program(inputs)
    taken: list[float] = []
    end = time.monotonic() + _CALLS_S
    while time.monotonic() < end or len(taken) < 3:
        start = time.perf_counter()
        program(inputs)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e3


def chain(folder: Path, layers: int) -> Path:
    """A bundle of so many dense layers."""
    rng = np.random.default_rng(0)
    typical = rng.normal(size=(TILE, WIDTH)).astype(np.float32)

    def model(mode: Any) -> Chain:
        return Chain(layers=layers, quant_mode=mode)

    params = {
        f"Dense_{i}": {"kernel": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 16}
        for i in range(layers)
    }
    path = folder / f"chain{layers}" / "1"
    convert(model, {"params": params}, {"inputs": typical}, path, tile=TILE)
    return path


def rows(folder: Path, sizes: Sequence[int]) -> Iterator[Step]:
    program = Program(bundle.load(chain(folder / "rows", 4)), max_rows=sizes[-1])
    for size in sizes:
        taken = in_program(program, {"inputs": np.ones((size, WIDTH), np.float32)})
        yield Step(of="rows", size=size, measured="a call", unit="ms", value=taken)


def layers(folder: Path, sizes: Sequence[int]) -> Iterator[Step]:
    for size in sizes:
        path = chain(folder / "layers", size)
        start = time.perf_counter()
        program = Program(bundle.load(path), max_rows=TILE)
        program.compile(1)
        loaded = time.perf_counter() - start
        yield Step(of="layers", size=size, measured="loading", unit="ms", value=loaded * 1e3)
        taken = in_program(program, {"inputs": np.ones((TILE, WIDTH), np.float32)})
        yield Step(of="layers", size=size, measured="a call", unit="ms", value=taken)


def lengths(folder: Path, sizes: Sequence[int]) -> Iterator[Step]:
    model = MODELS["language_int8"].with_lengths(*sizes)
    convert_untrained(model, folder / "lengths")
    program = Program(bundle.load(folder / "lengths" / model.name / "1"), max_rows=TILE)
    for size in sizes:
        inputs = model.inputs(np.random.default_rng(0), TILE, size)
        taken = in_program(program, inputs)
        yield Step(of="length", size=size, measured="a call", unit="ms", value=taken)


def models(folder: Path, sizes: Sequence[int]) -> Iterator[Step]:
    for size in sizes:
        server = _tiny(folder / f"served{size}", size)
        start = time.perf_counter()
        with running(server) as found:
            ready = time.perf_counter() - start
            held = _resident(found.process)
            measured = _asked(found.address, server, 1, found.process)
        told = {"until ready": ("s", ready), "memory": ("MB", held / 1e6)}
        for what, (unit, value) in {**told, "a request": ("processor us", measured)}.items():
            yield Step(of="models", size=size, measured=what, unit=unit, value=value)


def clients(folder: Path, sizes: Sequence[int]) -> Iterator[Step]:
    server = _tiny(folder / "clients", 1)
    with running(server) as found:
        for size in sizes:
            spent = _asked(found.address, server, size, found.process)
            yield Step(
                of="clients", size=size, measured="a request", unit="processor us", value=spent
            )
            held = _resident(found.process) / 1e6
            yield Step(of="clients", size=size, measured="memory", unit="MB", value=held)


AXES: dict[str, tuple[Callable[[Path, Sequence[int]], Iterator[Step]], Sequence[int]]] = {
    "rows": (rows, ROWS),
    "layers": (layers, LAYERS),
    "length": (lengths, LENGTHS),
    "models": (models, SERVED),
    "clients": (clients, CLIENTS),
}


def _tiny(folder: Path, names: int) -> Contender:
    """A server of one tiny model under so many names."""
    reference = tiny(folder)
    for i in range(1, names):
        shutil.copytree(folder / TINY, folder / f"{TINY}{i}")
    inputs = {"inputs": np.ones((1, TINY_FEATURES), np.float32)}
    expected = reference(inputs)["output"].tobytes()
    # The last in the order of loading answers last.
    last = max(path.name for path in folder.iterdir())
    return ours(folder, last, inputs, lambda a: a["output"].tobytes() == expected, fast=True)


def _asked(address: str, server: Contender, clients: int, process: int) -> float:
    """Microseconds of processor time that a request takes of the server."""
    found = load(
        address,
        f"/{SERVICE_NAME}/ModelInfer",
        message(server.model, server.inputs),
        in_flight=1,
        clients=clients,
        seconds=_SECONDS,
        processes=[process],
    )
    return found.processor_s * 1e6


def _resident(process: int) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def proportions(steps: Sequence[Step]) -> list[tuple[Step, float | None]]:
    """Each step, and its cost as a part of what the one before costs in proportion."""
    before: dict[tuple[str, str], Step] = {}
    found: list[tuple[Step, float | None]] = []
    for step in steps:
        last = before.get((step.of, step.measured))
        grown = step.value / last.value / (step.size / last.size) if last else None
        found.append((step, grown))
        before[step.of, step.measured] = step
    return found


def show(steps: Sequence[Step], *, markdown: bool) -> None:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for column in ("", "how many", "what", "cost", "of what is in proportion"):
        table.add_column(column, justify="right", no_wrap=True)
    for step, grown in proportions(steps):
        told = "" if grown is None else f"{grown:.2f}"
        cost = f"{step.value:,.{3 if step.value < 1 else 1}f} {step.unit}"
        table.add_row(step.of, f"{step.size:,}", step.measured, cost, told)
    Console(width=100).print(table)


def draw(steps: Sequence[Step], path: Path) -> None:
    """A picture for each thing, with axes in powers."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(step.of for step in steps))
    figure = Figure(figsize=(3.2 * len(names), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for measured in dict.fromkeys(s.measured for s in steps if s.of == name):
            own = [s for s in steps if (s.of, s.measured) == (name, measured)]
            label = f"{measured}, {own[0].unit}"
            axes.loglog([s.size for s in own], [s.value for s in own], "o-", label=label)
        sizes = list(dict.fromkeys(s.size for s in steps if s.of == name))
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser("scale", __doc__)
    parser.add_argument("--plot", type=Path, help="draw it here")
    parser.add_argument("--of", nargs="+", choices=AXES, default=list(AXES), help="only these")
    parser.add_argument("--steps", type=int, help="so many of the smallest sizes only")
    options = parser.parse_args(arguments)
    before = environment()
    steps: list[Step] = []
    with tempfile.TemporaryDirectory() as made:
        for name in options.of:
            print(f"measuring {name}", file=sys.stderr, flush=True)
            measure, sizes = AXES[name]
            steps += measure(Path(made), sizes[: options.steps])
    show(steps, markdown=options.markdown)
    Console().print(described(before), soft_wrap=True)
    command.write(options.json, before, [dataclasses.asdict(step) for step in steps])
    if options.plot:
        draw(steps, options.plot)


if __name__ == "__main__":
    main()
