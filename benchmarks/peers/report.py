"""Results of rounds as a table of ratios, marks with what was measured of them, and JSON."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.environment import described

Result = Mapping[str, Any]
"""`case`: what was computed, by the names of the columns; `peers`: what `ratios` gives of each,
first of the one that all are divided by."""


class Mark(NamedTuple):
    """At all results that `at` picks, `peer` takes at least `least` times as long as ours."""

    text: str
    peer: str
    at: Callable[[Mapping[str, Any]], bool]
    least: float = 1.0


def parser(module: str, description: str | None, rounds: int) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.peers.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", type=Path, help="write environment and all times here")
    made.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    made.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    return made


def report(
    options: argparse.Namespace,
    tables: Mapping[str, Sequence[Result]],
    marks: Sequence[Mark],
    versions: Mapping[str, str],
    before: Mapping[str, Any],
) -> None:
    """Prints all tables by their titles, and the marks; writes the JSON file."""
    style = box.MARKDOWN if options.markdown else box.SIMPLE_HEAD
    # A table of Markdown may not be wrapped.
    console = Console(width=1000 if options.markdown else max(200, Console().width))
    for title, results in tables.items():
        console.print(f"{title}\n", highlight=False)
        console.print(_table(results, style))
    if marks:
        console.print(_marks(marks, [r for results in tables.values() for r in results], style))
    foot = ", ".join(f"{name} {version}" for name, version in versions.items())
    console.print(f"{options.rounds} rounds; {foot}; {described(dict(before))}", soft_wrap=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"environment": {**before, **versions}, "results": tables}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def _table(results: Sequence[Result], style: box.Box) -> Table:
    ours, *peers = dict.fromkeys(name for result in results for name in result["peers"])
    table = Table(box=style)
    for column in (*results[0]["case"], f"ms, {ours}", *peers):
        table.add_column(column, justify="right")
    for result in results:
        found = result["peers"]
        table.add_row(
            *map(str, result["case"].values()),
            f"{found[ours]['ms']:.3f}",
            *(ratio(found[p]) if p in found else "" for p in peers),
        )
    return table


def ratio(found: Mapping[str, Any]) -> str:
    """The median of the ratios, and their quartiles."""
    low, high = found["quartiles"]
    return f"{found['ratio']:.2f} ({low:.2f}-{high:.2f})"


def _marks(marks: Iterable[Mark], results: Sequence[Result], style: box.Box) -> Table:
    table = Table("mark", "least that was measured", "at", "", box=style)
    for mark in marks:
        of = [r for r in results if mark.peer in r["peers"] and mark.at(r["case"])]
        if not of:
            table.add_row(mark.text, "not measured", "", "")
            continue
        worst = min(of, key=lambda r: r["peers"][mark.peer]["ratio"])
        found = worst["peers"][mark.peer]
        kept = sum(r["peers"][mark.peer]["ratio"] >= mark.least for r in of)
        at = ", ".join(f"{name} {value}" for name, value in worst["case"].items())
        told = "met" if kept == len(of) else f"missed: met at {kept} of {len(of)}"
        table.add_row(mark.text, ratio(found), at, told)
    return table
