"""Symmetric integers."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from aqt_engine.numerics.base import Numerics, require_key
from aqt_engine.numerics.noise import Noise

_MAX_BITS = 22
"""Beyond this, float32 can no longer tell a bucket's edge from its centre."""


@dataclasses.dataclass(frozen=True, slots=True)
class IntNumerics(Numerics):
    """Signed integers of `bits` bits, symmetric about zero.

    With `preserve_zero` the buckets are the integers: zero is one of them, and there are
    2^bits - 1. Without it they are the half-integers, 2^bits of them; one bit gives -0.5 and 0.5.

    With `preserve_max_val` the calibrated bound of a tensor falls onto the centre of the last
    bucket, else onto that bucket's outer edge, half a bucket further: at 8 bits, 127.5.

    `clip` keeps values inside the last bucket, `round` puts them onto a centre, `clip_gradient`
    stops gradients where a value was clipped. `noise_fn` makes rounding stochastic. `dtype` is
    what the buckets are stored as; None keeps the input's float dtype.

    Raises:
      ValueError: `bits` is not in 1..22, one bit is asked to preserve zero, or `dtype` cannot hold
        the buckets.
    """

    bits: int
    preserve_zero: bool
    preserve_max_val: bool
    clip: bool
    clip_gradient: bool
    round: bool
    noise_fn: Noise | None = None
    dtype: DTypeLike | None = None

    def __post_init__(self):
        if self.bits not in range(1, _MAX_BITS + 1):
            raise ValueError(
                f"`bits` must be from 1 to {_MAX_BITS}, got {self.bits}: give a whole number"
            )
        if self.bits == 1 and self.preserve_zero:
            raise ValueError(
                "one bit has no bucket left beside zero: set `preserve_zero=False` (buckets -0.5 "
                "and 0.5), or use 2 bits"
            )
        if self.dtype is None:
            return
        # One spelling of the dtype, so that equal numerics are equal and hash alike.
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        name = jnp.dtype(self.dtype).name
        integer = jnp.issubdtype(self.dtype, jnp.signedinteger)
        if integer and not (self.preserve_zero and self.round and self.clip):
            raise ValueError(
                f"`dtype={name}` holds whole numbers only: set `preserve_zero`, `round` and "
                f"`clip`, or leave `dtype` None"
            )
        if not self._fits(self.dtype):
            raise ValueError(
                f"`dtype={name}` cannot hold {self.bits}-bit buckets: use a wider signed dtype"
            )

    def needs_key(self) -> bool:
        """Whether there is a `noise_fn`."""
        return self.noise_fn is not None

    def quant_bound(self) -> float:
        """Edge or centre of the last bucket, as `preserve_max_val` says."""
        return self._last_edge() - (0.5 if self.preserve_max_val else 0.0)

    def clip_bound(self) -> float:
        """The largest magnitude that is not clipped: 127 for the default 8 bits."""
        return self._last_edge() - (0.5 if self.round else 0.0)

    def quantize(self, scaled: jax.Array, key: jax.Array | None) -> jax.Array:
        """The buckets of `scaled`: noise, clip, round half to even (without zero: floor + 0.5).

        Raises:
          ValueError: noise is drawn and `key` is None, or the dtype of `scaled` ends below the last
            bucket.
        """
        largest = float(jnp.finfo(scaled.dtype).max)
        if self.quant_bound() > largest:
            raise ValueError(
                f"{self.bits}-bit integers reach {self.quant_bound()}, and a tensor of dtype "
                f"{scaled.dtype} ends at {largest}: use fewer bits or a wider dtype"
            )
        x = scaled
        if self.noise_fn is not None:
            key = require_key(key, "`noise_fn=None`")
            x = (x + self.noise_fn.draw(key, x.shape)).astype(scaled.dtype)
        if self.clip:
            x = jnp.clip(x, -self.clip_bound(), self.clip_bound())
        if self.round:
            x = jnp.round(x) if self.preserve_zero else jnp.floor(x) + 0.5
        return x if self.dtype is None else x.astype(self.dtype)

    def gradient_mask(self, scaled: jax.Array) -> jax.Array | None:
        """False where `clip_gradient` is set and the value was clipped."""
        return jnp.abs(scaled) <= self.clip_bound() if self.clip_gradient else None

    def _fits(self, dtype: DTypeLike) -> bool:
        if jnp.issubdtype(dtype, jnp.signedinteger):
            return self.clip_bound() <= jnp.iinfo(dtype).max
        # A float holds one bit more than its mantissa; the buckets' sign is no concern of it.
        needed = self.bits - (1 if self.preserve_zero else 0)
        return jnp.issubdtype(dtype, jnp.floating) and needed <= jnp.finfo(dtype).nmant + 1

    def _last_edge(self) -> float:
        return 2.0 ** (self.bits - 1) - (0.5 if self.preserve_zero else 0.0)
