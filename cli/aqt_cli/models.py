"""Models by name, with their variables from a checkpoint: whatever `aqt convert` takes."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from aqt_cli.sources import load_factory

EXPECTED = (
    "a function from a QuantMode to a linen module, a function of variables and named inputs to "
    "outputs, or a function without arguments to an nnx model"
)


def load_model(reference: str, checkpoint: Path) -> tuple[Any, Any]:
    """What `reference`, "package.module:name", names, as `convert` takes it, and its variables.

    Raises:
      typer.BadParameter: there is no such thing, or it is none of `EXPECTED`.
      CheckpointError, ConversionError: the checkpoint cannot be read, or is not of this model.
    """
    # Commands that need no JAX must start without it.
    import flax.linen as nn
    from flax import nnx

    from aqt_engine.checkpoint import load_tree, load_variables
    from aqt_engine.convert import Function
    from aqt_engine.convertible import Convertible
    from aqt_engine.flax.nnx import split
    from aqt_engine.functions import QuantizedFunction
    from aqt_engine.modes import QuantMode

    named = load_factory(reference)
    if isinstance(named, Convertible | QuantizedFunction):
        return named, load_tree(checkpoint)
    if not callable(named):
        raise _unexpected(reference, f"is of type {type(named).__name__}")
    required, takes_more = _parameters(named)
    if required > 1 or (required == 1 and takes_more):
        return Function(named), load_tree(checkpoint)
    try:
        made: Any = named() if required == 0 else named(QuantMode.TRAIN)
    except TypeError as error:
        raise _unexpected(reference, f"cannot be called as one: {error}") from error
    if isinstance(made, nnx.Module):
        graph, _ = split(made)
        return graph, graph.variables_in(load_tree(checkpoint))
    if isinstance(made, nn.Module):
        return named, load_variables(checkpoint)
    raise _unexpected(reference, f"gives an object of type {type(made).__name__}")


def _parameters(named: Callable[..., Any]) -> tuple[int, bool]:
    """How many arguments a call needs, and whether it takes any others by name."""
    parameters = inspect.signature(named).parameters.values()
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return (
        sum(p.default is p.empty for p in plain),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def _unexpected(reference: str, found: str) -> typer.BadParameter:
    return typer.BadParameter(
        f"{reference!r} {found}, and should be {EXPECTED}", param_hint="--model"
    )
