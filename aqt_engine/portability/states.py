"""What a value of a computation is to the bits that different platforms give it."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_engine.rows.states import Op


@dataclasses.dataclass(frozen=True, slots=True)
class Exact:
    """The same bits everywhere, and rounded already.

    With `power_of_two`, every value is 0 or a power of two or the negative of one: a product with
    it is not rounded.
    """

    power_of_two: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
    """A product that `op` rounds, unless a compiler computes a sum that follows in one step."""

    op: Op


@dataclasses.dataclass(frozen=True, slots=True)
class Narrowed:
    """Rounded to a narrow float by `op`; a compiler may go on with the bits it had before."""

    op: Op


State = Exact | Product | Narrowed


def joined(states: Iterable[State]) -> State:
    """What a value is that may be any of these."""
    return functools.reduce(_join, states, Exact(power_of_two=True))


def constant(value: Any) -> State:
    """What a value is that is known beforehand."""
    if jnp.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.prng_key):
        return Exact()
    array = np.asarray(value)
    if array.dtype.kind in "iub":
        return Exact(power_of_two=array.dtype.kind == "b")
    mantissa = np.frexp(np.abs(array.astype(np.float64)))[0]
    return Exact(power_of_two=bool(((mantissa == 0.5) | (mantissa == 0)).all()))


def _join(a: State, b: State) -> State:
    if isinstance(a, Exact) and isinstance(b, Exact):
        return Exact(power_of_two=a.power_of_two and b.power_of_two)
    # A narrowed value may do the least: it stands for whatever else there is.
    for kind in (Narrowed, Product):
        for one in (a, b):
            if isinstance(one, kind):
                return one
    return a
