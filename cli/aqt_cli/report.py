"""`aqt report`: what quantization does to each contraction of a model, and what to do about it."""

import json
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aqt_cli.failures import as_sentence
from aqt_cli.models import load_model
from aqt_cli.sources import batches, read_arrays

if TYPE_CHECKING:
    import numpy as np

    from aqt_engine.analysis import Score

_TRIED_ROWS = 512


def report(
    model: Annotated[
        str,
        typer.Option(
            metavar="PACKAGE.MODULE:FACTORY",
            help="A function from a QuantMode to a linen module with AQT contractions; with "
            "--rules, a function without arguments that gives a linen module in float.",
        ),
    ],
    checkpoint: Annotated[
        Path, typer.Option(help="The Orbax checkpoint: parameters, collections or a train state.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="An .npz of typical inputs, an array of rows for each argument of the model. Bits "
            "are tried on the first 512 rows."
        ),
    ],
    rules: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file of rules to quantize a model in float by, or to change one that has "
            "AQT modules."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The array in the data that holds the right class of each row: accuracy is then "
            "reported beside the error.",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(metavar="OUTPUT", help="The output that has the classes, if not the only."),
    ] = None,
    bits: Annotated[
        list[int] | None,
        typer.Option(help="Bits to try each contraction at, alone. May be repeated.  [default: 4]"),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(help="Propose rules for mixed precision with at most so many bytes."),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(help="Propose the smallest mixed precision with at least this accuracy."),
    ] = None,
    propose: Annotated[
        Path, typer.Option(metavar="FILE", help="Where the proposed rules are written.")
    ] = Path("rules.json"),
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIRECTORY", help="Write report.html and plots there as well."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Shows error, clipping, bits and bytes of each contraction, and how much each costs a model.

    With a budget, --max-bytes or --min-score, it also searches bits for each contraction among 8
    and those of --bits, and writes the rules.
    """
    from rich.console import Console
    from rich.progress import Progress

    from aqt_cli.findings import Findings, write_page
    from aqt_engine.analysis import (
        BudgetError,
        Evaluator,
        ScoreBudget,
        SizeBudget,
        observe,
        search,
        sensitivities,
    )
    from aqt_engine.checkpoint import CheckpointError
    from aqt_engine.config import fully_quantized
    from aqt_engine.rules import RuleError

    if max_bytes is not None and min_score is not None:
        raise typer.BadParameter("give one budget, --max-bytes or --min-score", param_hint="budget")
    budget = None
    if max_bytes is not None:
        budget = SizeBudget(max_bytes)
    elif min_score is not None:
        budget = ScoreBudget(min_score)
    widths = sorted({*(bits or (4,)), *((8,) if budget else ())}, reverse=True)
    errors = (BudgetError, CheckpointError, RuleError, OSError, ValueError)
    with as_sentence(*errors), Progress(console=Console(stderr=True)) as progress:
        inputs = read_arrays(data)
        score = _score(inputs, labels, classes)
        factory, variables = load_model(model, checkpoint, rules, inputs)
        if not isinstance(factory, FunctionType):
            raise typer.BadParameter(
                f"{model!r} is no linen model, and a report is made of the layers of one: give a "
                f"function from a QuantMode to a linen module",
                param_hint="--model",
            )
        task = progress.add_task("Observing", total=None)
        contractions = observe(factory, variables, batches(inputs))
        tried = {name: array[:_TRIED_ROWS] for name, array in inputs.items()}
        evaluator = Evaluator(factory, variables, tried, score)
        places = [c.place for c in contractions]
        progress.update(task, description="Trying", total=len(places) * len(widths))
        alone = sensitivities(evaluator, places, widths, lambda: progress.advance(task))
        mixture = None if budget is None else search(evaluator, contractions, alone, budget)
    mixed_rules = None if mixture is None else mixture.rules(fully_quantized())
    found = Findings(
        contractions=contractions,
        alone=alone,
        in_float=evaluator.in_float(),
        as_it_is=evaluator.as_it_is(),
        mixture=mixture,
    )
    if mixed_rules is not None:
        propose.write_text(mixed_rules.to_json() + "\n")
    if out is not None:
        write_page(found, out)
    if as_json:
        typer.echo(json.dumps(found.document(), indent=1))
        return
    console = Console()
    for table in found.tables():
        console.print(table)
    if mixed_rules is not None:
        console.print(f"Rules written to [bold]{propose}[/bold]", soft_wrap=True)
    if out is not None:
        console.print(f"Plots and tables in [bold]{out / 'report.html'}[/bold]", soft_wrap=True)


def _score(
    arrays: dict[str, "np.ndarray[Any, Any]"], labels: str | None, classes: str | None
) -> "Score | None":
    """What scores answers to `arrays`, out of which it takes the labels."""
    from aqt_engine.analysis import accuracy

    if labels is None:
        return None
    if labels not in arrays:
        raise typer.BadParameter(
            f"the data has no array {labels!r}, but {', '.join(arrays)}", param_hint="--labels"
        )
    return accuracy(arrays.pop(labels)[:_TRIED_ROWS], classes)
