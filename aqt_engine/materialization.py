"""A value that the compiler computes on its own, and what uses it on its own.

A compiler repeats a cheap computation wherever its result is used, in one loop with what uses it,
and how it orders and joins the operations of a loop changes a float sum in its last bit. So the
same layer normalization could have other bits behind a scale that is computed, as in training, than
behind one that is read, as in serving. With `materialized` in between, both read it.

On CPU, where XLA drops its own optimization barriers before it joins loops, the barrier is a loop
of one turn whose end only the value tells; elsewhere it is XLA's.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

materialize_p = Primitive("aqt_materialize")
"""The identity. Analyses of jaxprs may take it for a copy."""


def materialized(x: jax.Array) -> jax.Array:
    """`x`, as if it were an argument of whatever is computed of it."""
    return cast(jax.Array, materialize_p.bind(x))


def _one_turn(x: jax.Array) -> jax.Array:
    if x.size == 0:
        return x
    # Any number of turns but none gives x. That it is one or two, the compiler must not know.
    turns = jnp.where(x.ravel()[0] < 0, 2, 1)

    def turn(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return carry[0] + 1, x

    start = (jnp.zeros_like(turns), jnp.zeros_like(x))
    return lax.while_loop(lambda carry: carry[0] < turns, turn, start)[1]


def _same(x: Any) -> Any:
    return x


def _batched(args: Any, axes: Any) -> Any:
    return materialize_p.bind(*args), axes[0]


def _transposed(cotangent: Any, x: Any) -> Any:
    return [cotangent]


def _lowered(by: Callable[[Any], Any]) -> Any:
    return mlir.lower_fun(by, multiple_results=False)


materialize_p.def_impl(_same)
materialize_p.def_abstract_eval(_same)
batching.primitive_batchers[materialize_p] = _batched
ad.deflinear2(materialize_p, _transposed)
mlir.register_lowering(materialize_p, _lowered(_one_turn), "cpu")
mlir.register_lowering(materialize_p, _lowered(lax.optimization_barrier))
