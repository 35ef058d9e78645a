"""Which operation first gives a row other bits in other company, found by computing one by one.

For what the analysis cannot decide. Operations are computed alone, so that what the compiler makes
of several together is not seen here.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from aqt_engine import witness
from aqt_engine.functions import jaxprs
from aqt_engine.rows.analysis import results
from aqt_engine.rows.states import Along, Free, Mixed, Op, State, op_of

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class _Pair:
    """A value of both runs, and what it is to the rows."""

    one: Any
    other: Any
    state: State


class _Found(Exception):
    def __init__(self, op: Op):
        super().__init__()
        self.op = op


def first_mixing(
    forward: Callable[[Any, Mapping[str, Any]], Mapping[str, jax.Array]],
    variables: Any,
    inputs: Mapping[str, Array],
) -> Op | None:
    """The first operation of `forward` that gives a row of `inputs` other bits in other company.

    The others are overwritten, and the rows are shifted by one. None if no operation does, each
    computed alone.
    """
    rows = len(next(iter(inputs.values())))
    shifted = {name: np.roll(array, 1, axis=0) for name, array in inputs.items()}
    companies = [(shifted, 1)]
    for neighbor in ("zeros", "NaNs"):
        others = np.arange(1, rows)
        companies.append(
            ({k: witness.overwritten(a, others, neighbor) for k, a in inputs.items()}, 0)
        )
    for company, row in companies:
        try:
            _run(forward, variables, inputs, company, rows, row)
        except _Found as found:
            return found.op
    return None


def _run(
    forward: Callable[[Any, Mapping[str, Any]], Mapping[str, jax.Array]],
    variables: Any,
    inputs: Mapping[str, Array],
    company: Mapping[str, Array],
    rows: int,
    row: int,
) -> None:
    closed = jax.make_jaxpr(forward)(variables, dict(inputs))
    weights = [_Pair(leaf, leaf, Free()) for leaf in jax.tree.leaves(variables)]
    operands = [
        _Pair(one, other, Along(0))
        for one, other in zip(
            jax.tree.leaves(dict(inputs)), jax.tree.leaves(dict(company)), strict=True
        )
    ]

    def inside(
        within: Op | None,
    ) -> Callable[[JaxprEqn, list[_Pair], jaxprs.Path], Sequence[_Pair]]:
        def step(eqn: JaxprEqn, pairs: list[_Pair], _: jaxprs.Path) -> Sequence[_Pair]:
            inner = jaxprs.called(eqn)
            if inner is not None:
                return jaxprs.walk(inner, pairs, inside(op_of(eqn, within)), lift=_constant)
            states = results(eqn, [pair.state for pair in pairs], rows, within)
            one = jaxprs.carry_out(eqn, [pair.one for pair in pairs])
            other = jaxprs.carry_out(eqn, [pair.other for pair in pairs])
            found = [_Pair(*of) for of in zip(one, other, states, strict=True)]
            if any(_differs(pair, rows, row) for pair in found):
                raise _Found(op_of(eqn, within))
            return found

        return step

    jaxprs.walk(closed, [*weights, *operands], inside(None), lift=_constant)


def _constant(value: Any) -> _Pair:
    return _Pair(value, value, Free())


def _differs(pair: _Pair, rows: int, row: int) -> bool:
    state = pair.state
    if isinstance(state, Free) or jnp.issubdtype(pair.one.dtype, jax.dtypes.prng_key):
        return False
    one, other = np.asarray(pair.one), np.asarray(pair.other)
    where = state if isinstance(state, Along) else _guessed(one.shape, rows)
    if where is not None:
        one, other = _part(one, where, rows, 0), _part(other, where, rows, row)
    elif not isinstance(state, Mixed):
        # Some of the rows, it may be, which come back to where they were.
        return False
    found = witness.compare({"": one[None]}, {"": other[None]})
    return not found.exact


def _guessed(shape: Sequence[int], rows: int) -> Along | None:
    axes = [axis for axis, size in enumerate(shape) if size == rows]
    return Along(axes[0]) if len(axes) == 1 else None


def _part(array: Array, where: Along, rows: int, row: int) -> Array:
    index = np.arange(array.shape[where.axis])
    return np.take(array, np.flatnonzero(index // where.inner % rows == row), axis=where.axis)
