"""Whether answers depend on how many rows are computed at once.

A server computes a tile, and training computed whatever batches it had. A model that divides by its
number of rows, or chooses by it, is another model in each.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from aqt_engine.functions import jaxprs

Forward = Callable[[Any, Mapping[str, Any]], Mapping[str, jax.Array]]

_MUCH = 0.01


def counting(
    forward: Forward,
    variables: Any,
    inputs: Mapping[str, np.ndarray[Any, Any]],
    answers: Mapping[str, np.ndarray[Any, Any]],
    tile: int,
) -> str | None:
    """How answers change with the number of rows, in words; None if they do not.

    `answers` are those to `inputs`, computed `tile` rows at once. Rounding moves a few rows far,
    where it turns into another integer, and many a little; what is told of moves half of the rows
    by more than a hundredth of the largest value, where twice as many as there are are computed at
    once.
    """
    rows = len(next(iter(inputs.values())))
    twice = {name: np.concatenate([array, array]) for name, array in inputs.items()}
    try:
        if list(_program(forward, variables, inputs)) == list(_program(forward, variables, twice)):
            return None
        found = jax.jit(forward)(variables, twice)
    except (ValueError, TypeError):
        # It computes no other number of rows, so that it was not trained at another.
        return None
    for name, expected in answers.items():
        moved = float(np.median(_moved(np.asarray(found[name])[:rows], expected)))
        if moved > _MUCH:
            return (
                f"half of those of output {name!r} by more than {moved:.0%} of the largest value, "
                f"between {tile} and {2 * rows} rows"
            )
    return None


def _program(
    forward: Forward, variables: Any, inputs: Mapping[str, np.ndarray[Any, Any]]
) -> Iterator[Any]:
    """What a trace of it has beside shapes: operations, and the values of constants."""

    def constants(closed: ClosedJaxpr) -> Iterator[Any]:
        yield from (np.asarray(value).tobytes() for value in closed.consts)

    closed = jax.make_jaxpr(forward)(variables, inputs)
    yield from constants(closed)
    for eqn in jaxprs.equations(closed.jaxpr):
        yield eqn.primitive.name
        yield from (str(a.val) for a in eqn.invars if isinstance(a, Literal))
        for name, value in eqn.params.items():
            if isinstance(value, ClosedJaxpr):
                yield from constants(value)
            elif isinstance(value, (bool, int, float)) or name == "start_indices":
                yield name, value


def _moved(
    found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How far each row has moved, as a part of the largest value; 1 where it is no number."""
    rows = len(expected)
    found, expected = found.reshape(rows, -1), expected.reshape(rows, -1)
    if not jax.numpy.issubdtype(expected.dtype, np.inexact):
        return (found != expected).any(axis=1).astype(np.float64)
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    apart = np.where(same, 0.0, np.abs(found - expected))
    largest = np.abs(expected).max(where=np.isfinite(expected), initial=0) or 1.0
    return np.nan_to_num(apart.max(axis=1, initial=0) / largest, nan=1.0, posinf=1.0)
