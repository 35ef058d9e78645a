"""The long attack, with a progress bar and a closing table: `make attack`.

PYTHONPATH=tests python -m exactness --requests 100000 --seed 7 --models digits_mixer
"""

import argparse
import asyncio
import math
import secrets
import sys
import tempfile
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from exactness.attack import Disturbance, Tally, attack
from exactness.pools import Pool, convert_all
from exactness.replica import Replica, two_replicas
from examples.zoo import MODELS

LINE = 1000
"""Requests for each line of progress where there is no terminal for a bar."""

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000, help="to send at least")
    parser.add_argument("--minutes", type=float, default=math.inf, help="to go on at most")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--tile", type=int, help="of all models, in place of each one's own")
    parser.add_argument("--rounds", type=int, default=3, help="of every disturbance")
    arguments = parser.parse_args()
    console.print(f"seed {arguments.seed}: converting {', '.join(arguments.models)}")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pools = convert_all(arguments.models, root / "bundles", tile=arguments.tile)
        started = time.monotonic()
        tally = _attacked(root, pools, arguments)
        elapsed = time.monotonic() - started
    console.print(_table(tally, elapsed))
    if tally.differing:
        sys.exit("\n".join(tally.wrong))


def _attacked(root: Path, pools: dict[str, list[Pool]], arguments: argparse.Namespace) -> Tally:
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[now]}"))
    with (
        two_replicas(root / "bundles", root) as (polling, explicit),
        Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task("attack", total=arguments.requests, now="")
        next_line = LINE

        def on_progress(tally: Tally) -> None:
            nonlocal next_line
            answers = sum(tally.answers.values())
            now = f"{answers} answers, {tally.differing} values differ"
            progress.update(task, completed=tally.requests, now=now)
            if not console.is_terminal and tally.requests >= next_line:
                next_line += LINE
                console.print(f"{tally.requests} requests, {now}")

        return asyncio.run(
            attack(
                pools,
                [polling, explicit],
                requests=arguments.requests,
                seed=arguments.seed,
                most_s=arguments.minutes * 60,
                disturbances=_disturbances(polling, explicit) * arguments.rounds,
                on_progress=on_progress,
            )
        )


def _disturbances(polling: Replica, explicit: Replica) -> list[Disturbance]:
    """Each replica is restarted and killed, and reloads in the way that it is made to."""
    return [
        ("killed, with SIGKILL", polling.kill),
        ("models unloaded and loaded", explicit.reload),
        ("restarted, with SIGTERM", polling.restart),
        ("killed, with SIGKILL", explicit.kill),
        ("models replaced by new versions", polling.new_version),
        ("restarted, with SIGTERM", explicit.restart),
    ]


def _table(tally: Tally, elapsed_s: float) -> Table:
    table = Table(box=box.MARKDOWN, title=f"Attack of seed {tally.seed}, {elapsed_s:.0f} s")
    table.add_column("what")
    table.add_column("how many", justify="right")
    counted = {
        "requests": tally.requests,
        **{f"answers of {model}": count for model, count in sorted(tally.answers.items())},
        "answers": sum(tally.answers.values()),
        "rows": tally.rows,
        "cancelled by the caller": tally.cancelled,
        "out of time": tally.expired,
        "refused, and sent again": tally.refused,
        **tally.disturbances,
        "values compared": tally.values,
        "values that differ in any bit": tally.differing,
    }
    for what, count in counted.items():
        table.add_row(what, f"{count:,}")
    return table


if __name__ == "__main__":
    main()
