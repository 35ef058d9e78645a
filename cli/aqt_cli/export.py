"""`aqt export`: a bundle becomes a SavedModel of TensorFlow."""

import json
from pathlib import Path
from typing import Annotated

import typer

from aqt_cli.failures import as_sentence


def export(
    bundle: Annotated[Path, typer.Argument(metavar="REPOSITORY/NAME/VERSION")],
    saved_model: Annotated[
        Path, typer.Option(metavar="DIRECTORY", help="The SavedModel to write.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON.")] = False,
) -> None:
    """Writes a bundle as a SavedModel, and says whether TensorFlow gives its bits here.

    It needs TensorFlow. The SavedModel answers what TensorFlow's own compiler makes of the graph.
    """
    from rich.console import Console

    from aqt_engine import saved_model as tensorflow
    from aqt_engine.bundle import BundleError, load

    with as_sentence(BundleError, tensorflow.SavedModelError, OSError):
        verdicts = tensorflow.write(load(bundle), saved_model)
    if as_json:
        found = {
            name: {"exact": verdict.exact, "verdict": str(verdict)}
            for name, verdict in verdicts.items()
        }
        typer.echo(json.dumps({"saved_model": str(saved_model), "signatures": found}))
        return
    for name, verdict in verdicts.items():
        Console().print(f"[bold]{saved_model}[/bold], {name}: {verdict}", soft_wrap=True)
