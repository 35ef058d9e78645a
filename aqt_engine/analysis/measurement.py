"""How well one operand survives its quantization: sums that add up over batches.

The measure of error is the signal-to-quantization-noise ratio, 10 log10(sum x^2 / sum (x - x')^2)
decibels, where x' is x quantized and returned to float; one bit more is worth about 6 dB.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_engine.numerics import FloatNumerics, Fp8Numerics, IntNumerics, NoNumerics, Numerics
from aqt_engine.qtensor import QTensor

if TYPE_CHECKING:
    from aqt_engine.config import Tensor

BINS = 64
HISTOGRAM_REACH = 1.25
"""Histograms count scaled values from -reach to reach times the bound of the numerics."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["power", "noise", "values", "clipped", "before", "after"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What is summed over the values of a tensor, and over batches.

    `power` and `noise` are sums of squares, of the values and of what quantization changed of them.
    Of `values` values, `clipped` lay beyond the last bucket. `before` and `after` are histograms of
    `BINS` bins of the scaled values and of their buckets; what lies beyond is in the outermost.
    """

    power: Any
    noise: Any
    values: Any
    clipped: Any
    before: Any
    after: Any

    def __add__(self, other: "Sums") -> "Sums":
        return jax.tree.map(np.add, jax.tree.map(np.float64, self), other)

    @property
    def sqnr_db(self) -> float:
        """The signal-to-quantization-noise ratio in decibels: infinite where nothing changed."""
        return ratio_db(float(self.power), float(self.noise))

    @property
    def clipped_share(self) -> float:
        """The share of values beyond the last bucket, from 0 to 1."""
        return float(self.clipped) / max(1.0, float(self.values))


def ratio_db(power: float, noise: float) -> float:
    """10 log10(power / noise); infinite without noise, NaN where either is none."""
    if math.isnan(power) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return -math.inf if power == 0 else 10 * math.log10(power / noise)


def error(x: jax.Array, approximation: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sum x^2 and sum (x - x')^2, as float32."""
    x, approximation = x.astype(jnp.float32), approximation.astype(jnp.float32)
    return jnp.sum(x * x), jnp.sum((x - approximation) ** 2)


def measure(x: jax.Array, q: QTensor, tensor: "Tensor") -> Sums:
    """The sums of one tensor `x` that `tensor` quantizes to `q`.

    `q` may have an axis of `x` split in two, as shards are stored.
    """
    assert not isinstance(tensor.numerics, NoNumerics)
    whole = q.dequant()
    split = x.reshape(whole.shape).astype(jnp.float32)
    power, noise = error(split, whole)
    shifted = split if q.bias is None else split + q.bias
    scaled = shifted if q.scale is None else shifted / q.scale
    return Sums(
        power=power,
        noise=noise,
        values=jnp.float32(x.size),
        clipped=jnp.sum(jnp.abs(scaled) > last_bucket(tensor.numerics), dtype=jnp.float32),
        before=_histogram(scaled, tensor.numerics),
        after=_histogram(q.qvalue.astype(jnp.float32), tensor.numerics),
    )


def last_bucket(numerics: Numerics) -> float:
    """The largest scaled magnitude that is not clipped: the outer edge of the last bucket."""
    if isinstance(numerics, IntNumerics):
        # Half a bucket beyond its centre, values still round onto it.
        return numerics.clip_bound() + (0.5 if numerics.round else 0.0)
    return numerics.quant_bound()


def bits(numerics: Numerics) -> int:
    """The bits of one value."""
    match numerics:
        case IntNumerics():
            return numerics.bits
        case FloatNumerics():
            return 1 + numerics.exponent_bits + numerics.mantissa_bits
        case Fp8Numerics():
            return 8
        case _:
            raise TypeError(f"{type(numerics).__name__} does not say how many bits a value has")


def _histogram(scaled: jax.Array, numerics: Numerics) -> jax.Array:
    reach = HISTOGRAM_REACH * numerics.quant_bound()
    position = jnp.floor((scaled / reach + 1) * (BINS / 2))
    bins = jnp.clip(jnp.nan_to_num(position), 0, BINS - 1).astype(jnp.int32)
    return jnp.bincount(bins.ravel(), length=BINS).astype(jnp.float32)
