"""What the experiments say, and where: a table, JSON, and a plot beside it."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.environment import described, environment

mpl.use("Agg")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says; `seeds` are those to repeat the experiment with."""

    json: Path
    quick: bool
    markdown: bool
    seeds: tuple[int, ...]
    started: float


def options(name: str, doc: str | None, arguments: Sequence[str] | None, seeds: int) -> Options:
    """The options of experiment `name`, repeated with `seeds` seeds if nothing else is asked."""
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.papers.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("out/papers") / f"{name}.json",
        metavar="FILE",
        help="where the numbers go, and the plot beside them (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, default=seeds, help="repetitions (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of few models: only shows that it runs"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    found = parser.parse_args(arguments)
    count = 2 if found.quick else found.seeds
    if count < 2:
        parser.error(f"argument --seeds: at least 2 make a standard deviation, got {count}")
    return Options(found.json, found.quick, found.markdown, tuple(range(count)), time.monotonic())


def publish(options: Options, title: str, rows: Sequence[Row], extra: Row | None = None) -> Figure:
    """Prints `rows` as a table and writes them as JSON; gives a figure for `save_plot`."""
    show(options, title, rows)
    seconds, cpu_seconds = time.monotonic() - options.started, time.process_time()
    where = environment()
    Console().print(
        f"mean ± standard deviation of {len(options.seeds)} seeds"
        f"{', too short to say anything' if options.quick else ''}; "
        f"{seconds:.0f} s, {cpu_seconds:.0f} s of a core; {described(where)}",
        soft_wrap=True,
    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"title": title, "quick": options.quick, "seeds": options.seeds, "rows": rows}
    document |= {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
    document |= {"environment": where} | (extra or {})
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    return Figure(figsize=(10, 4), layout="constrained")


def show(options: Options, title: str, rows: Sequence[Row]) -> None:
    """Prints `rows` as a table.

    A list in a row holds one number for each seed: the table shows mean and standard deviation.
    """
    table = Table(
        title=None if options.markdown else title,
        title_justify="left",
        box=box.MARKDOWN if options.markdown else box.SIMPLE_HEAD,
    )
    for i, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    # Wide enough that nothing is cut off where the output is no terminal.
    Console(width=max(160, Console().width)).print(table)


def progress(text: str) -> None:
    """Says on stderr what was done."""
    print(text, file=sys.stderr, flush=True)


def save_plot(options: Options, figure: Figure) -> None:
    """Writes the figure beside the JSON."""
    path = options.json.with_suffix(".png")
    figure.savefig(path, dpi=120)
    Console().print(f"wrote {options.json} and {path}", soft_wrap=True)


def label(axes: Axes, x: str, y: str) -> None:
    """Names the axes of a plot, and shows its legend."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend()


def _shown(value: Any) -> str:
    match value:
        case list():
            return f"{np.mean(value):.4g} ± {np.std(value, ddof=1):.2g}"
        case bool():
            return "yes" if value else ""
        case float():
            return f"{value:.4g}"
        case int():
            return f"{value:,}"
        case _:
            return str(value)
