"""The interface of numerics, and the one that quantizes nothing."""

import abc
import dataclasses

import jax
from jax.typing import DTypeLike


class Numerics(abc.ABC):
    """Puts scaled values into buckets, and says what the gradient of that is.

    `dtype` is what the buckets are stored as; None keeps the float dtype of the input.
    """

    dtype: DTypeLike | None

    @abc.abstractmethod
    def needs_key(self) -> bool:
        """Whether `quantize` draws noise."""

    @abc.abstractmethod
    def quant_bound(self) -> float:
        """The scaled value onto which the calibrated bound of a tensor is mapped."""

    @abc.abstractmethod
    def quantize(self, scaled: jax.Array, key: jax.Array | None) -> jax.Array:
        """The buckets of `scaled`, in the same shape, as `dtype`.

        Raises:
          ValueError: noise is drawn and `key` is None.
        """

    @abc.abstractmethod
    def gradient_mask(self, scaled: jax.Array) -> jax.Array | None:
        """Where the straight-through gradient passes, as bool; None where it passes everywhere."""


@dataclasses.dataclass(frozen=True, slots=True)
class NoNumerics:
    """Leaves a tensor in float: it has no buckets and no scale."""


def require_key(key: jax.Array | None, instead: str) -> jax.Array:
    """`key`, which noise is to be drawn with.

    Raises:
      ValueError: it is None; `instead` is the setting that would draw no noise.
    """
    if key is None:
        raise ValueError(
            f"stochastic rounding needs a PRNG key and got none: pass `key=` (in Flax, "
            f"`rngs={{'params': key}}`), or configure with {instead}"
        )
    return key
