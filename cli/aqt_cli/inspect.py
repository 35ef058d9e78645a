"""`aqt inspect`: what a bundle holds, without running it."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqt_cli.failures import as_sentence

if TYPE_CHECKING:
    from aqt_engine.bundle import Manifest


def inspect(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A directory NAME/VERSION.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Shows a bundle's signature, and its layers with their dtypes, bits and bytes."""
    from aqt_engine.bundle import BundleError, read_manifest

    with as_sentence(BundleError):
        manifest = read_manifest(bundle)
    if as_json:
        typer.echo(json.dumps(_document(bundle, manifest), indent=1))
    else:
        _print(bundle, manifest)


def _layers(manifest: "Manifest") -> list[dict[str, Any]]:
    """One entry for each quantized or float weight; a scale stands with its values."""
    from aqt_engine.layers import layers

    return [
        {
            "layer": layer.name,
            "shape": list(layer.values.shape),
            "dtype": layer.values.dtype,
            "bits": layer.values.bits,
            "axes": None if layer.values.axes is None else list(layer.values.axes),
            "scale_shape": None if layer.scale is None else list(layer.scale.shape),
            "bytes": layer.nbytes,
            "quantized": layer.quantized,
            "quantized_by": layer.by
            and {
                "side": layer.by.side,
                "numerics": layer.numerics,
                "calibration": layer.calibration,
                "configuration": layer.configuration,
            },
        }
        for layer in layers(manifest)
    ]


def _axes(axes: list[Any] | None) -> str:
    """In words: "- x model"; of one axis with several names, "data+model"."""
    named = (["-"] if a is None else [a] if isinstance(a, str) else a for a in axes or ())
    return " x ".join("+".join(names) for names in named)


def _document(bundle: Path, manifest: "Manifest") -> dict[str, Any]:
    return {
        "bundle": str(bundle),
        "inputs": [dataclasses.asdict(spec) for spec in manifest.inputs],
        "outputs": [dataclasses.asdict(spec) for spec in manifest.outputs],
        "lengths": {name: list(sizes) for name, sizes in manifest.lengths.items()},
        "pads": dict(manifest.pads),
        "per_request": list(manifest.per_request),
        "tile": manifest.tile,
        "tile_costs": {k: dataclasses.asdict(cost) for k, cost in manifest.tile_costs.items()},
        "portable": manifest.portable,
        "platforms": list(manifest.platforms),
        "tools": dict(manifest.tools),
        "layers": _layers(manifest),
        "configurations": dict(manifest.provenance.configurations),
        "fingerprint": manifest.provenance.fingerprint,
        "float_bytes": manifest.float_nbytes,
        "bundle_bytes": manifest.nbytes,
        "files": {name: file.nbytes for name, file in manifest.files.items()},
    }


def _print(bundle: Path, manifest: "Manifest") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    signature = Table(title=f"Signature of {bundle}", title_justify="left")
    for column in ("", "name", "dtype", "shape"):
        signature.add_column(column)
    for side, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
        for spec in specs:
            signature.add_row(side, spec.name, spec.dtype, str(list(spec.shape)))
    console.print(signature)
    for name, sizes in manifest.lengths.items():
        console.print(f"{name} is padded to {', '.join(map(str, sizes))}")
    for name in manifest.per_request:
        console.print(f"{name} is one scalar for all rows of a request")

    table = Table(title="Weights", title_justify="left")
    table.add_column("layer", overflow="fold")
    for column in ("dtype", "bits", "shape", "scales", "bytes"):
        table.add_column(column, justify="right")
    for column in ("numerics", "calibration"):
        table.add_column(column, overflow="fold")
    layers = _layers(manifest)
    named = any(layer["axes"] for layer in layers)
    if named:
        table.add_column("axes", overflow="fold")
    for layer in layers:
        by = layer["quantized_by"]
        table.add_row(
            layer["layer"],
            layer["dtype"],
            str(layer["bits"]),
            "x".join(map(str, layer["shape"])) or "scalar",
            "" if layer["scale_shape"] is None else "x".join(map(str, layer["scale_shape"])),
            f"{layer['bytes']:,}",
            by["numerics"] if by else "",
            by["calibration"] if by else "",
            *([_axes(layer["axes"])] if named else []),
            style="" if layer["quantized"] else "dim",
        )
    console.print(table)
    count = len(manifest.provenance.configurations)
    console.print(
        f"quantized by {count} configuration{'s' if count != 1 else ''}, together "
        f"{manifest.provenance.fingerprint[:16]}; --json has them whole"
    )
    console.print(
        f"{manifest.float_nbytes:,} bytes of float weights became {manifest.nbytes:,}; "
        f"tile of {manifest.tile} rows; for {', '.join(manifest.platforms)}"
        f"{', the same bits on each' if manifest.portable else ''}; written with "
        + ", ".join(f"{name} {version}" for name, version in manifest.tools.items()),
        soft_wrap=True,
    )
