"""`aqt predict`: one request to a server, from a file."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aqt_cli.connection import LOCAL, Ca, Certificate, Key, Servers, TokenFile, arguments
from aqt_cli.failures import as_sentence, of_the_server

if TYPE_CHECKING:
    import numpy as np

    from aqt_client import InferResult

_PREVIEWED = 6


def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model's name.")],
    inputs: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="The inputs: .npz or .json by name; for a model with one input .npy, a picture "
            "(8-bit, of the model's size; 0 to 1 for floats) or .txt (a row for each line).",
        ),
    ],
    server: Servers = list(LOCAL),  # noqa: B006 - typer copies it
    version: Annotated[
        str, typer.Option(metavar="N", help="The version; without it, the server chooses.")
    ] = "",
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the outputs to this .npz (BF16 as float32)."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="For each call, its retries included.")
    ] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    token_file: TokenFile = None,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
) -> None:
    """Sends inputs from a file to a server, and shows the model's answer."""
    with of_the_server():
        from aqt_client import Client, ClientError, files

    with as_sentence(ClientError, ValueError, OSError):
        connection = arguments(
            server, token_file=token_file, ca=ca, certificate=certificate, key=key
        )
        with Client(timeout_s=timeout, **connection) as client:
            metadata = client.model_metadata(model, version)
            arrays = files.read_inputs(inputs, metadata)
            result = client.infer(model, arrays, version=version)
        if output is not None:
            files.write_outputs(output, result.outputs)
        if as_json:
            typer.echo(json.dumps(files.as_document(result), allow_nan=False))
        else:
            _print(result)


def _print(result: "InferResult") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = f"{result.model_name} version {result.model_version}"
    table = Table(title=Text(title), title_justify="left")
    for column in ("output", "dtype", "shape", "first values"):
        table.add_column(column, overflow="fold")
    for name, array in result.outputs.items():
        dtype = "bytes" if array.dtype == object else array.dtype.name
        # As Text, for else brackets in names and values are taken for markup.
        cells = (name, dtype, str(list(array.shape)), _first_values(array))
        table.add_row(*map(Text, cells))
    console = Console()
    console.print(table)
    console.print(
        {
            True: "[green]exact[/green]: the bits that training computes",
            False: "[red]not exact[/red]: the witness does not reproduce on this server",
            None: "the server does not say whether this is exact",
        }[result.exact]
    )


def _first_values(array: "np.ndarray") -> str:
    elements = array.ravel()[:_PREVIEWED].tolist()
    more = ["..."] if array.size > _PREVIEWED else []
    return ", ".join([f"{e:.6g}" if isinstance(e, float) else str(e) for e in elements] + more)
