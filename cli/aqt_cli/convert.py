"""`aqt convert`: a trained checkpoint and its model become a bundle."""

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqt_cli import signature
from aqt_cli.failures import as_sentence

if TYPE_CHECKING:
    import numpy as np

_CALIBRATION_ROWS = 64


def convert(
    model: Annotated[
        str,
        typer.Option(
            metavar="PACKAGE.MODULE:FACTORY",
            help="A function from a QuantMode to the linen module that was trained.",
        ),
    ],
    checkpoint: Annotated[
        Path, typer.Option(help="The Orbax checkpoint: parameters, collections or a train state.")
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
            metavar="INPUT", help="An input that is one scalar for all rows. May be repeated."
        ),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            help="Rows that are computed at once; the bits depend on it. Without it, several are "
            "measured on this machine and the cheapest is taken."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Converts a trained model for serving, and proves that it still answers what was trained."""
    # The heavy imports wait until the command runs: `aqt --help` and `aqt predict` need no JAX.
    from rich.console import Console

    from aqt_engine.bundle import BundleError
    from aqt_engine.checkpoint import CheckpointError, load_variables
    from aqt_engine.convert import ConversionError, calibrate
    from aqt_engine.convert import convert as convert_model
    from aqt_engine.tiles import measured

    declared = signature.parse(shape or (), lengths or (), pad or (), per_request or ())
    progress = Console(stderr=True)
    with (
        as_sentence(BundleError, CheckpointError, ConversionError, FileExistsError, OSError),
        progress.status("Reading the checkpoint") as status,
    ):
        factory = _load_factory(model)
        variables = load_variables(checkpoint)
        inputs = _read(example)

        def show(stage: str) -> None:
            progress.print(f"  {stage}", style="dim")
            status.update(stage)

        if calibration is not None:
            show("Calibrating")
            variables = calibrate(factory, variables, _batches(_read(calibration)))
        manifest = convert_model(
            factory,
            variables,
            inputs,
            output,
            signature=declared,
            tile=measured if tile is None else tile,
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


def _read(file: Path) -> dict[str, "np.ndarray[Any, Any]"]:
    import numpy as np

    from aqt_engine.convert import ConversionError

    try:
        with np.load(file) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, AttributeError) as error:
        raise ConversionError(
            f"{file} is no .npz file of plain arrays ({error}): write it with numpy.savez"
        ) from error


def _batches(
    arrays: dict[str, "np.ndarray[Any, Any]"],
) -> Iterator[dict[str, "np.ndarray[Any, Any]"]]:
    rows = min(map(len, arrays.values()), default=0)
    for start in range(0, max(rows, 1), _CALIBRATION_ROWS):
        yield {name: array[start : start + _CALIBRATION_ROWS] for name, array in arrays.items()}


def _load_factory(reference: str) -> Callable[..., Any]:
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise typer.BadParameter(
            f"{reference!r} is not of the form package.module:factory", param_hint="--model"
        )
    # A console script does not have the working directory on its path, where models mostly are.
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            f"{error}; run `aqt convert` where {module_name!r} can be imported",
            param_hint="--model",
        ) from error
    except AttributeError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
