"""`aqt verify`: does a bundle compute here what was trained?"""

import json
from pathlib import Path
from typing import Annotated

import typer

from aqt_cli.failures import as_sentence


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A directory NAME/VERSION.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Replays the witness on this machine and compares every bit; exit code 1 if any differs."""
    import jax
    from rich.console import Console
    from rich.table import Table

    from aqt_engine import witness
    from aqt_engine.bundle import BundleError, load
    from aqt_engine.execution import Program

    with (
        as_sentence(BundleError),
        Console(stderr=True).status("Checking files, compiling and replaying the witness"),
    ):
        loaded = load(bundle)
        rows = len(next(iter(loaded.witness.inputs.values())))
        verdicts = witness.prove(Program(loaded, max_rows=rows), loaded.witness)
    exact = all(verdict.exact for verdict in verdicts.values())
    device = jax.devices()[0].device_kind
    if as_json:
        trials = {manner: str(verdict) for manner, verdict in verdicts.items()}
        typer.echo(
            json.dumps(
                {"bundle": str(bundle), "exact": exact, "device": device, "trials": trials},
                indent=1,
            )
        )
    else:
        table = Table(title=f"{bundle} on {device}", title_justify="left")
        table.add_column("witness presented")
        for column in ("values", "differ", "rows", "max ulps"):
            table.add_column(column, justify="right")
        for manner, verdict in verdicts.items():
            found = verdict.differences
            table.add_row(
                manner,
                f"{sum(d.total for d in found):,}",
                f"{sum(d.values for d in found):,}",
                f"{max(d.rows for d in found):,}",
                f"{max(d.max_ulps for d in found):,}",
                style="" if verdict.exact else "red",
            )
        Console().print(table)
        Console().print(
            "[green]exact[/green]: this bundle answers here what was trained"
            if exact
            else "[red]not exact[/red]: a server here refuses this bundle"
        )
    raise typer.Exit(0 if exact else 1)
