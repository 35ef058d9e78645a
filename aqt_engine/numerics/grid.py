"""The values of a small float, and how others are rounded onto them.

Rounding is arithmetic on ordinary floats: a value is divided by the power of two that its
neighbors on the grid are apart, which is exact, and the quotient is made whole. The result lies
on the grid before it is cast to the dtype that stores it. The cast is then exact, and a compiler
that folds a cast to few bits and back away, as XLA may, changes nothing.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

MIN_STEP_EXPONENT = -125
"""Steps are 2^-125 and wider: half of one is then still a normal float32, never flushed to 0."""

MAX_EXPONENT = 127
"""Of the largest power of two that float32 holds."""

Rounding = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FloatGrid:
    """Floats of `mantissa_bits`, from 2^`min_exponent` up to `max_value`, and their negatives.

    With `subnormals` evenly spaced values fill the gap between -2^`min_exponent` and
    2^`min_exponent`, and zero is one of them. Without, the gap is empty: the grid has no zero.
    """

    mantissa_bits: int
    min_exponent: int
    max_value: float
    subnormals: bool = True

    def nearest(self, x: jax.Array) -> jax.Array:
        """The value of the grid nearest to each of `x`, half to even, as float32 or float64.

        Beyond the grid's ends that is its end, for infinities too; a NaN stays one.
        """
        x = as_float(x)
        return self.place(x, jnp.round, ~jnp.signbit(x))

    def stochastic(self, x: jax.Array, key: jax.Array) -> jax.Array:
        """One of the two values of the grid that enclose each of `x`, drawn by how near it is.

        The expectation is `x`, to within 2^-23 of a step, unless `x` lies beyond the grid's ends:
        then, and for NaN, and for values of the grid, it is as `nearest` says.
        """
        x = as_float(x)
        uniform = jax.random.uniform(key, x.shape, x.dtype)

        def rounding(steps: jax.Array) -> jax.Array:
            # Not floor(steps + uniform): that sum rounds, and could lift a whole number by one.
            below = jnp.floor(steps)
            return below + (uniform < steps - below).astype(steps.dtype)

        share = (x / self.smallest_normal(x.dtype) + 1) / 2
        return self.place(x, rounding, uniform < share)

    def place(self, x: jax.Array, rounding: Rounding, positive: jax.Array) -> jax.Array:
        """Values of the grid for `x`, a result of `as_float`, by a rounding of one's own.

        `rounding` makes distances from zero whole, counted in steps between values of the grid.
        `positive` says on which side of a gap without subnormals a value inside it ends.
        """
        magnitude = jnp.minimum(jnp.abs(x), self.max_value)
        # The upper limit only matters to zero mantissa bits: one binade less, in which the largest
        # value is two steps, keeps the reciprocal of the step a normal float32.
        exponent = jnp.clip(
            _exponent(magnitude), self.min_exponent, MAX_EXPONENT - 1 + self.mantissa_bits
        )
        steps = magnitude * _power_of_two(self.mantissa_bits - exponent, x.dtype)
        step = _power_of_two(exponent - self.mantissa_bits, x.dtype)
        magnitude = rounding(steps) * step
        placed = jnp.where(jnp.signbit(x), -magnitude, magnitude)
        if self.subnormals:
            return placed
        normal = self.smallest_normal(x.dtype)
        return jnp.where(jnp.abs(x) < normal, jnp.where(positive, normal, -normal), placed)

    def smallest_normal(self, dtype: DTypeLike) -> jax.Array:
        """2^`min_exponent`."""
        return jnp.asarray(2.0**self.min_exponent, dtype)

    def fits(self, dtype: DTypeLike) -> bool:
        """Whether `dtype` holds every value of the grid."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return False
        info = jnp.finfo(dtype)
        return (
            float(info.min) < 0
            and info.nmant >= self.mantissa_bits
            and float(info.max) >= self.max_value
            and float(info.smallest_subnormal) <= 2.0 ** (self.min_exponent - self.mantissa_bits)
        )

    def contains(self, value: float) -> bool:
        """Whether the positive `value` is one of the grid."""
        if not 0 < value <= self.max_value:
            return False
        exponent = max(math.frexp(value)[1] - 1, self.min_exponent)
        return math.ldexp(value, self.mantissa_bits - exponent).is_integer() and (
            self.subnormals or value >= 2.0**self.min_exponent
        )


def as_float(x: jax.Array) -> jax.Array:
    """`x` as float32 or float64, with the bits that its dtype has and no more.

    XLA may compute narrow floats with more bits than their dtype has, and keep them where a value
    is widened again: a compiled program would then round other values than an eager one does.
    """
    if x.dtype in (jnp.float32, jnp.float64):
        return x
    if x.dtype == jnp.bfloat16:
        return as_bfloat16(x.astype(jnp.float32))
    # Not reduce_precision: it flushes the subnormals of float16.
    return lax.optimization_barrier(x).astype(jnp.float32)


def as_bfloat16(x: jax.Array) -> jax.Array:
    """`x` rounded to the values of bfloat16, in its own dtype."""
    info = jnp.finfo(jnp.bfloat16)
    return lax.reduce_precision(x, info.nexp, info.nmant)


def _exponent(x: jax.Array) -> jax.Array:
    """floor(log2(x)) of positive normal floats, as int; less than any of those for zero."""
    info = jnp.finfo(x.dtype)
    integer = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    return (lax.bitcast_convert_type(x, integer) >> info.nmant) + (int(info.minexp) - 1)


def _power_of_two(exponent: jax.Array, dtype: DTypeLike) -> jax.Array:
    """2^exponent, exactly, where that is a normal float."""
    info = jnp.finfo(dtype)
    return lax.bitcast_convert_type((exponent - (int(info.minexp) - 1)) << info.nmant, dtype)
