"""How a tensor gets its scale."""

import abc
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp


class Calibration(abc.ABC):
    """Finds the bound of each group of values that shares a scale."""

    @abc.abstractmethod
    def bound(self, x: jax.Array, shared_axes: Sequence[int]) -> jax.Array:
        """The positive bound of `x`, in its dtype, its shape with `shared_axes` reduced to 1."""


@dataclasses.dataclass(frozen=True, slots=True)
class AbsMaxCalibration(Calibration):
    """The largest magnitude. A group of zeros gets 1, so that it is quantized to zeros.

    `clipping_scale` multiplies it: below 1, the largest values are clipped.

    Raises:
      ValueError: `clipping_scale` is not positive.
    """

    clipping_scale: float | None = None

    def __post_init__(self):
        if self.clipping_scale is not None and not self.clipping_scale > 0:
            raise ValueError(f"`clipping_scale` must be positive, got {self.clipping_scale}")

    def bound(self, x: jax.Array, shared_axes: Sequence[int]) -> jax.Array:
        """max |x| over `shared_axes`, times `clipping_scale`."""
        absmax = jnp.max(jnp.abs(x), axis=tuple(shared_axes), keepdims=True)
        absmax = jnp.where(absmax == 0, jnp.ones_like(absmax), absmax)
        return absmax if self.clipping_scale is None else absmax * self.clipping_scale


def ceil_to_power_of_two(scale: jax.Array) -> jax.Array:
    """The smallest power of two that is not below `scale`, elementwise."""
    return 1 / 2 ** jnp.floor(jnp.log2(1 / scale))
