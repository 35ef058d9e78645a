"""`aqt verify`: does a bundle compute here what was trained?"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqt_cli.failures import as_sentence
from aqt_cli.models import load_model
from aqt_cli.sources import batches, read_arrays

if TYPE_CHECKING:
    from aqt_engine.bundle import Bundle
    from aqt_engine.convertible import Convertible
    from aqt_engine.proof import Reference
    from aqt_engine.witness import Verdict

_ROWS = 64


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A directory NAME/VERSION.")],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Compare with the training forward of this checkpoint, run here, and say where "
            "serving leaves it. Without it, random inputs are compared with the bundle's own graph "
            "run tile by tile.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:NAME", help="The model of the checkpoint, as for convert."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="The .npz that static scales were learned from, as for convert."),
    ] = None,
    rows: Annotated[
        int, typer.Option(min=1, help="Rows of the largest batch that is tried.")
    ] = _ROWS,
    seed: Annotated[int, typer.Option(help="For other random inputs.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Proves a bundle on this machine and compares every bit; exit code 1 if any differs.

    The witness and random inputs are presented in every bucket, in any order, beside rows and
    padding of zeros, extremes, infinities and NaNs.
    """
    import jax
    from rich.console import Console

    from aqt_engine import lockstep, proof
    from aqt_engine.bundle import BundleError, load
    from aqt_engine.checkpoint import CheckpointError
    from aqt_engine.convert import ConversionError
    from aqt_engine.execution import Program
    from aqt_engine.pretrained import PretrainedError

    if (against is None) != (model is None):
        raise typer.BadParameter("--against and --model need each other, and one is missing")
    divergence = None
    with as_sentence(BundleError, CheckpointError, ConversionError, PretrainedError, OSError):
        loaded = load(bundle)
        program = Program(loaded, max_rows=rows)
        trained = None
        reference = proof.tile_by_tile(loaded)
        if against is not None and model is not None:
            trained = _Trained.read(against, model, calibration, loaded)
            reference = trained.reference(loaded)
        verdicts = _tried(program, loaded, reference, seed)
        exact = all(verdict.exact for verdict in verdicts.values())
        if not exact and program.kernel:
            # As the server does.
            program = Program(loaded, max_rows=rows, kernel=False)
            verdicts = _tried(program, loaded, reference, seed)
            exact = all(verdict.exact for verdict in verdicts.values())
        if trained and not exact:
            divergence = lockstep.first_divergence(trained.model, trained.variables, loaded)
    device = jax.devices()[0].device_kind
    if as_json:
        document = {
            "bundle": str(bundle),
            "exact": exact,
            "device": device,
            "kernel": program.kernel,
            "reference": "training" if trained else "graph",
            "trials": {name: _document(verdict) for name, verdict in verdicts.items()},
            "first_difference": str(divergence) if divergence else None,
        }
        typer.echo(json.dumps(document, indent=1))
    else:
        _print(f"{bundle} on {device}", verdicts)
        if not exact:
            Console().print(_origin(str(divergence) if divergence else None, bool(trained)))
    raise typer.Exit(0 if exact else 1)


@dataclasses.dataclass(frozen=True, slots=True)
class _Trained:
    """What was trained, as its checkpoint has it."""

    model: "Convertible"
    variables: Any

    @classmethod
    def read(
        cls, checkpoint: Path, reference: str, calibration: Path | None, loaded: "Bundle"
    ) -> "_Trained":
        import jax
        import jax.numpy as jnp

        from aqt_engine.convert import as_convertible, calibrate

        example = loaded.witness.inputs
        named, variables = load_model(reference, checkpoint, example=example)
        model = as_convertible(named)
        if calibration is not None:
            variables = calibrate(model, variables, batches(read_arrays(calibration)))
        return cls(model, jax.tree.map(jnp.asarray, variables))

    def reference(self, loaded: "Bundle") -> "Reference":
        from aqt_engine import graphs, proof

        return proof.of_training(
            graphs.named(self.model.train), self.variables, loaded.manifest.tile
        )


def _tried(
    program: Any, loaded: "Bundle", reference: "Reference", seed: int
) -> dict[str, "Verdict"]:
    from rich.console import Console
    from rich.progress import Progress

    from aqt_engine import proof

    manifest, witnesses, rows = loaded.manifest, loaded.witnesses, program.max_rows
    verdicts: dict[str, Verdict] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Proving", total=proof.trials(manifest, witnesses, rows))
        for made in (
            proof.of_witnesses(program, manifest, witnesses, rows=rows),
            proof.of_random_inputs(program, reference, witnesses, seed=seed),
        ):
            for name, verdict in made:
                verdicts[name] = verdict
                progress.advance(task)
    return verdicts


def _document(verdict: "Verdict") -> dict[str, Any]:
    return {
        "exact": verdict.exact,
        "outputs": [dataclasses.asdict(difference) for difference in verdict.differences],
    }


def _print(title: str, verdicts: dict[str, "Verdict"]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    failed = {name: verdict for name, verdict in verdicts.items() if not verdict.exact}
    values = sum(d.total for verdict in verdicts.values() for d in verdict.differences)
    if not failed:
        console.print(
            f"{title}: {len(verdicts)} trials, {values:,} values, 0 differ in any bit\n"
            f"[green]exact[/green]: this bundle answers here what was trained",
            soft_wrap=True,
        )
        return
    table = Table(title=f"{title}: trials in which bits differ", title_justify="left")
    table.add_column("presented", overflow="fold")
    for column in ("values", "differ", "rows", "max ulps"):
        table.add_column(column, justify="right")
    for name, verdict in failed.items():
        found = verdict.differences
        table.add_row(
            name,
            f"{sum(d.total for d in found):,}",
            f"{sum(d.values for d in found):,}",
            f"{max(d.rows for d in found):,}",
            f"{max(d.max_ulps for d in found):,}",
        )
    console.print(table)
    console.print(
        f"[red]not exact[/red]: bits differ in {len(failed)} of {len(verdicts)} trials; a server "
        f"here refuses this bundle",
        soft_wrap=True,
    )


def _origin(divergence: str | None, trained: bool) -> str:
    if divergence:
        return divergence
    if trained:
        return "no operation that training and serving share differs, each computed alone"
    return "to learn where it comes from, give --against CHECKPOINT and --model"
