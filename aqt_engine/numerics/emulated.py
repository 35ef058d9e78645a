"""Floats of any size, emulated: their values, stored in a wider float."""

import dataclasses
import enum
import re

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from aqt_engine.numerics.aqt_rounding import MAX_MANTISSA_BITS as AQT_MAX_MANTISSA_BITS
from aqt_engine.numerics.aqt_rounding import aqt_nearest, aqt_stochastic
from aqt_engine.numerics.base import Numerics, require_key
from aqt_engine.numerics.grid import MAX_EXPONENT, MIN_STEP_EXPONENT, FloatGrid

_MAX_EXPONENT_BITS = 8
_MAX_MANTISSA_BITS = 10


class FloatRounding(enum.Enum):
    """Which of the two nearest values is taken.

    HALF_TO_EVEN is the rounding of IEEE 754 and of the OCP formats: the nearer, and of two as near
    the one whose last bit is zero; without mantissa bits the larger, though zero before it.

    AQT rounds to bfloat16 first, and then to the nearer; of two as near it takes the one further
    from zero, among subnormals the one whose last bit is zero; -0 becomes 0. Stochastic rounding
    draws 16 random bits a value, as AQT does.
    """

    HALF_TO_EVEN = "half_to_even"
    AQT = "aqt"


@dataclasses.dataclass(frozen=True, slots=True)
class FloatNumerics(Numerics):
    """Floats of one sign bit, `exponent_bits` (0 to 8) and `mantissa_bits` (0 to 10).

    With `subnormals` the lowest exponent code stands for evenly spaced values around zero, as in
    IEEE 754. Without, it stands for normal values like any other: there is then no zero, and what
    lies between the smallest two becomes the one that has its sign. No code stands for infinity or
    NaN.

    The smallest normal is 2^`min_exponent`; None takes IEEE's, 2 - 2^(exponent_bits - 1), and 0
    where there are no exponent bits. `max_value` is the largest value, as far as float32 goes; a
    smaller one than the codes allow makes room for codes that are no values: 448 with 4 and 3 bits
    is float8_e4m3fn. Values beyond become the largest, infinities too; NaN stays NaN.

    `rounding` says what the nearest value is. With `stochastic_rounding` it is instead one of the
    two neighbors, drawn by how near each is. `clip_gradient` stops gradients beyond the largest
    value. `dtype` is what the values are stored as; None keeps the input's float dtype.

    Raises:
      ValueError: a number of bits is out of range, no value but zero is left, the exponents leave
        those of float32, `max_value` is none of the values, or `dtype` cannot hold them.
    """

    exponent_bits: int
    mantissa_bits: int
    subnormals: bool = True
    min_exponent: int | None = None
    max_value: float | None = None
    rounding: FloatRounding = FloatRounding.HALF_TO_EVEN
    stochastic_rounding: bool = False
    clip_gradient: bool = False
    dtype: DTypeLike | None = None

    def __post_init__(self):
        for name, bits, limit in (
            ("exponent_bits", self.exponent_bits, _MAX_EXPONENT_BITS),
            ("mantissa_bits", self.mantissa_bits, _MAX_MANTISSA_BITS),
        ):
            if not 0 <= bits <= limit:
                raise ValueError(f"`{name}` must be from 0 to {limit}, got {bits}")
        if self.subnormals and self.exponent_bits == self.mantissa_bits == 0:
            raise ValueError(
                "no exponent and no mantissa bits leave no value but zero: give one of them, or "
                "set `subnormals=False` (values -1 and 1)"
            )
        if self.rounding is FloatRounding.AQT and self.mantissa_bits > AQT_MAX_MANTISSA_BITS:
            raise ValueError(
                f"`rounding=FloatRounding.AQT` rounds to bfloat16 first, which has "
                f"{AQT_MAX_MANTISSA_BITS} mantissa bits, got `mantissa_bits={self.mantissa_bits}`: "
                f"use FloatRounding.HALF_TO_EVEN"
            )
        lowest = MIN_STEP_EXPONENT + self.mantissa_bits
        if not lowest <= self._min_exponent() <= MAX_EXPONENT:
            raise ValueError(
                f"`min_exponent` must be from {lowest} to {MAX_EXPONENT} for {self.mantissa_bits} "
                f"mantissa bits, which float32 holds exactly, got {self.min_exponent}"
            )
        if self.max_value is not None and not self._widest_grid().contains(self.max_value):
            raise ValueError(
                f"`max_value` must be a value of the format, at most "
                f"{self._widest_grid().max_value}, got {self.max_value}"
            )
        if self.dtype is not None:
            # One spelling of the dtype, so that equal numerics are equal and hash alike.
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
            self._require_fit(self.dtype)

    def needs_key(self) -> bool:
        """Whether rounding is stochastic."""
        return self.stochastic_rounding

    def quant_bound(self) -> float:
        """The largest value."""
        return self._grid().max_value

    def quantize(self, scaled: jax.Array, key: jax.Array | None) -> jax.Array:
        """`scaled` rounded to a value of the format.

        Raises:
          ValueError: rounding is stochastic and `key` is None, or the values do not fit the dtype
            of `scaled` and `dtype` is None.
        """
        dtype = scaled.dtype if self.dtype is None else self.dtype
        self._require_fit(dtype)
        if self.stochastic_rounding:
            key = require_key(key, "`stochastic_rounding=False`")
            stochastic = {
                FloatRounding.HALF_TO_EVEN: FloatGrid.stochastic,
                FloatRounding.AQT: aqt_stochastic,
            }[self.rounding]
            return stochastic(self._grid(), scaled, key).astype(dtype)
        nearest = {
            FloatRounding.HALF_TO_EVEN: FloatGrid.nearest,
            FloatRounding.AQT: aqt_nearest,
        }[self.rounding]
        return nearest(self._grid(), scaled).astype(dtype)

    def gradient_mask(self, scaled: jax.Array) -> jax.Array | None:
        """False where `clip_gradient` is set and the value was clipped."""
        return jnp.abs(scaled) <= self.quant_bound() if self.clip_gradient else None

    def _min_exponent(self) -> int:
        if self.min_exponent is not None:
            return self.min_exponent
        if self.exponent_bits == 0:
            return 0
        return max(2 - 2 ** (self.exponent_bits - 1), MIN_STEP_EXPONENT + self.mantissa_bits)

    def _grid(self) -> FloatGrid:
        grid = self._widest_grid()
        if self.max_value is None:
            return grid
        return dataclasses.replace(grid, max_value=float(self.max_value))

    def _widest_grid(self) -> FloatGrid:
        binades = 2**self.exponent_bits - (1 if self.subnormals else 0)
        last_exponent = min(self._min_exponent() + binades - 1, MAX_EXPONENT)
        spacing = 2.0 ** (max(last_exponent, self._min_exponent()) - self.mantissa_bits)
        codes = 2**self.mantissa_bits if binades == 0 else 2 ** (self.mantissa_bits + 1)
        return FloatGrid(
            mantissa_bits=self.mantissa_bits,
            min_exponent=self._min_exponent(),
            max_value=(codes - 1) * spacing,
            subnormals=self.subnormals,
        )

    def _require_fit(self, dtype: DTypeLike) -> None:
        if not self._grid().fits(dtype):
            raise ValueError(
                f"`dtype={jnp.dtype(dtype).name}` cannot hold the values of a float with "
                f"{self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits up to "
                f"{self.quant_bound()}: set `dtype` to a wider float"
            )


def aqt_float(
    name: str, *, stochastic_rounding: bool = False, clip_gradient: bool = False
) -> FloatNumerics:
    """The emulated float that AQT has by this name, with AQT's values and rounding.

    `name` is "e2m1" for two exponent bits and one mantissa bit without subnormals, "e2m1_ocp" with
    them, and so on for any numbers of bits that bfloat16 holds. The smallest normal is 1. Only NaN
    fares otherwise than in AQT, which turns it into numbers: here it stays NaN.

    Raises:
      ValueError: `name` is no such name, or the format has too many bits.
    """
    parts = re.fullmatch(r"e(\d)m(\d+)(_ocp)?", name)
    if parts is None:
        raise ValueError(f'`name` must look like "e2m1" or "e2m1_ocp", got {name!r}')
    return FloatNumerics(
        exponent_bits=int(parts[1]),
        mantissa_bits=int(parts[2]),
        subnormals=parts[3] is not None,
        min_exponent=0,
        rounding=FloatRounding.AQT,
        stochastic_rounding=stochastic_rounding,
        clip_gradient=clip_gradient,
        dtype=jnp.bfloat16,
    )
