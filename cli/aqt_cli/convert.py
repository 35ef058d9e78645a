"""`aqt convert`: a trained checkpoint and its model become a bundle."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from aqt_cli import signature
from aqt_cli.failures import as_sentence
from aqt_cli.models import load_model
from aqt_cli.sources import batches, read_arrays


def convert(
    model: Annotated[
        str,
        typer.Option(
            metavar="PACKAGE.MODULE:NAME",
            help="What was trained: a function from a QuantMode to a linen module, a function of "
            "variables and named inputs to outputs, or a function without arguments to an nnx "
            "model.",
        ),
    ],
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="The Orbax checkpoint: variables, parameters, collections or a train state. Or "
            "model.safetensors, its index, or the directory of either: then `TENSORS` in the "
            "model's module says where each tensor belongs."
        ),
    ],
    example: Annotated[
        Path,
        typer.Option(
            help="An .npz of typical inputs, an array of rows for each argument of the model. "
            "They become the witness, so give real ones."
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="REPOSITORY/NAME/VERSION", help="The bundle to write.")
    ],
    rules: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file of rules to quantize a model in float by, or to change one that has "
            "AQT modules, as `aqt report` writes it."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="An .npz of typical inputs to learn static scales from, for a model whose "
            "activations have a calibration that keeps statistics."
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT=batch,DIM,...",
            help="The axes of an input of which some vary from request to request, as in "
            "ids=batch,length. May be repeated.",
        ),
    ] = None,
    lengths: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIM=SIZE,...",
            help="The sizes that such an axis is padded to, as in length=16,32,64; the last is the "
            "longest that is served. May be repeated.",
        ),
    ] = None,
    pad: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT=VALUE", help="What an input is padded with, if not 0. May be repeated."
        ),
    ] = None,
    per_request: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT",
            help="An input that is one scalar for all rows of a request; the model is given it for "
            "each row, of shape (rows,). May be repeated.",
        ),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            help="Rows that are computed at once; the bits depend on it. Without it, several are "
            "measured on this machine and the cheapest is taken."
        ),
    ] = None,
    portable: Annotated[
        bool,
        typer.Option(
            help="Refuse a model whose bits depend on the platform, and name the operations."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Converts a trained model for serving, and proves that it still answers what was trained."""
    # The heavy imports wait until the command runs: `aqt --help` and `aqt predict` need no JAX.
    from rich.console import Console

    from aqt_engine import heap
    from aqt_engine.bundle import BundleError
    from aqt_engine.checkpoint import CheckpointError
    from aqt_engine.config.serialization import SerializationError
    from aqt_engine.convert import ConversionError, calibrate
    from aqt_engine.convert import convert as convert_model
    from aqt_engine.pretrained import PretrainedError
    from aqt_engine.rules import RuleError
    from aqt_engine.spool import spool
    from aqt_engine.tiles import measured

    heap.keep_large_apart()
    declared = signature.parse(shape or (), lengths or (), pad or (), per_request or ())
    errors = (BundleError, CheckpointError, ConversionError, PretrainedError, OSError)
    progress = Console(stderr=True)
    with (
        as_sentence(*errors, RuleError, SerializationError),
        progress.status("Reading the checkpoint") as status,
        spool(output) as spooled,
    ):
        inputs = read_arrays(example)
        factory, variables = load_model(model, checkpoint, rules, inputs, keep=spooled.keep)

        def show(stage: str) -> None:
            progress.print(f"  {stage}", style="dim")
            status.update(stage)

        if calibration is not None:
            show("Calibrating")
            variables = calibrate(factory, variables, batches(read_arrays(calibration)))
        manifest = convert_model(
            factory,
            variables,
            inputs,
            output,
            signature=declared,
            tile=measured if tile is None else tile,
            portable=portable,
            on_stage=show,
        )
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "bundle": str(output),
                    "tile": manifest.tile,
                    "tile_costs": {
                        k: dataclasses.asdict(c) for k, c in manifest.tile_costs.items()
                    },
                    "float_bytes": manifest.float_nbytes,
                    "bundle_bytes": manifest.nbytes,
                }
            )
        )
        return
    Console().print(
        f"[bold]{output}[/bold]: weights {manifest.float_nbytes:,} bytes in float, "
        f"{manifest.nbytes:,} converted "
        f"([bold]{manifest.float_nbytes / max(1, manifest.nbytes):.2f}x[/bold] smaller); "
        f"tile of {manifest.tile} rows, exact on its witness",
        soft_wrap=True,
    )
