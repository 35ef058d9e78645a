"""How AQT rounds to a small float, so that models trained with it keep their values.

It reads bfloat16, and treats normal and subnormal values each by a rule of its own.
"""

import jax
import jax.numpy as jnp

from aqt_engine.numerics.grid import FloatGrid, as_bfloat16, as_float

MAX_MANTISSA_BITS = int(jnp.finfo(jnp.bfloat16).nmant)
"""Of a grid to round to: those of bfloat16."""


def aqt_nearest(grid: FloatGrid, x: jax.Array) -> jax.Array:
    """The value of `grid` nearest to each of `x`, as float32 (float64 for float64).

    Halves go away from zero among normal values, and to even among subnormal ones. With
    subnormals, -0 becomes 0.
    """
    x = _read(grid, x)

    def rounding(steps: jax.Array) -> jax.Array:
        # The sum is exact: values of bfloat16 leave room for the bit that 0.5 needs.
        return jnp.where(_is_normal(grid, steps), jnp.floor(steps + 0.5), jnp.round(steps))

    return grid.place(x, rounding, ~jnp.signbit(x))


def aqt_stochastic(grid: FloatGrid, x: jax.Array, key: jax.Array) -> jax.Array:
    """One of the two values of `grid` that enclose each of `x`, drawn as AQT draws it.

    From 16 random bits a value: normal ones use as many of the low bits as bfloat16 has mantissa
    bits below theirs; subnormal ones all of them, centered about zero and added to the signed
    value; in a gap without subnormals they are compared with the share of the upper end.
    """
    x = _read(grid, x)
    bits = jax.random.bits(key, x.shape, jnp.uint16)
    uniform = (bits.astype(x.dtype) + 0.5) / 2**16
    spare = 2 ** (MAX_MANTISSA_BITS - grid.mantissa_bits)

    def rounding(steps: jax.Array) -> jax.Array:
        low = (bits & (spare - 1)).astype(x.dtype) / spare
        away_from_zero = jnp.where(x < 0, 0.5 - uniform, uniform - 0.5)
        return jnp.where(
            _is_normal(grid, steps), jnp.floor(steps + low), jnp.round(steps + away_from_zero)
        )

    share = (x / grid.smallest_normal(x.dtype) + 1) / 2
    return grid.place(x, rounding, uniform < share)


def _read(grid: FloatGrid, x: jax.Array) -> jax.Array:
    x = as_bfloat16(as_float(x))
    return jnp.where(x == 0, 0, x) if grid.subnormals else x


def _is_normal(grid: FloatGrid, steps: jax.Array) -> jax.Array:
    return steps >= 2**grid.mantissa_bits
