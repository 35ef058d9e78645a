"""The 8-bit floats that hardware multiplies."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from aqt_engine.numerics.base import Numerics, require_key
from aqt_engine.numerics.grid import FloatGrid

_DTYPES = ("float8_e4m3fn", "float8_e5m2")


@dataclasses.dataclass(frozen=True, slots=True)
class Fp8Numerics(Numerics):
    """float8_e4m3fn (largest value 448) or float8_e5m2 (57344).

    Values are rounded to the nearest, half to even; with `stochastic_rounding` to one of the two
    neighbors, drawn by how near each is. What lies beyond the largest value becomes the largest
    value, infinities too; NaN stays NaN. `clip_gradient` stops gradients there. Rounded to
    nearest, the bits are those of AQT; drawn, they differ, for AQT's are biased among subnormals.

    Raises:
      ValueError: `dtype` is neither of the two.
    """

    # Narrower than in Numerics, safely so: frozen fields cannot be assigned the wider type.
    dtype: DTypeLike = jnp.float8_e4m3fn  # pyright: ignore[reportIncompatibleVariableOverride]
    stochastic_rounding: bool = False
    clip_gradient: bool = False

    def __post_init__(self):
        # One spelling of the dtype, so that equal numerics are equal and hash alike.
        dtype = jnp.dtype(self.dtype)
        object.__setattr__(self, "dtype", dtype)
        if dtype.name not in _DTYPES:
            raise ValueError(
                f"`dtype` must be {' or '.join(_DTYPES)}, got {dtype.name}: use FloatNumerics to "
                f"emulate another float"
            )

    def needs_key(self) -> bool:
        """Whether rounding is stochastic."""
        return self.stochastic_rounding

    def quant_bound(self) -> float:
        """The largest value of `dtype`."""
        return float(jnp.finfo(self.dtype).max)

    def quantize(self, scaled: jax.Array, key: jax.Array | None) -> jax.Array:
        """`scaled` rounded to `dtype`."""
        grid = self._grid()
        if self.stochastic_rounding:
            rounded = grid.stochastic(scaled, require_key(key, "`stochastic_rounding=False`"))
        else:
            rounded = grid.nearest(scaled)
        return rounded.astype(self.dtype)

    def gradient_mask(self, scaled: jax.Array) -> jax.Array | None:
        """False where `clip_gradient` is set and the value was clipped."""
        return jnp.abs(scaled) <= self.quant_bound() if self.clip_gradient else None

    def _grid(self) -> FloatGrid:
        info = jnp.finfo(self.dtype)
        return FloatGrid(
            mantissa_bits=info.nmant, min_exponent=int(info.minexp), max_value=float(info.max)
        )
