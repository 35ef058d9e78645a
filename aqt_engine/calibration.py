"""How a tensor gets its scale, and where zero is not its middle, its bias.

A tensor is quantized as q = (x + bias) / scale and comes back as q * scale - bias. The scale maps
the bound of a group of values, from the calibration, onto the bound of the numerics.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from aqt_engine.numerics import Numerics
from aqt_engine.numerics.grid import as_float


class Calibration(abc.ABC):
    """Finds the bound of each group of values that shares a scale, and the group's bias.

    `has_zero_point` says that the bias is a whole number of scales, the zero point.
    """

    has_zero_point: ClassVar[bool] = False

    @abc.abstractmethod
    def bound(self, x: jax.Array, shared_axes: Sequence[int], numerics: Numerics) -> jax.Array:
        """The positive bound of `x`, in a float dtype, its shape with `shared_axes` reduced to 1.

        `numerics` is what `x` will be quantized by, for a calibration that tries it.
        """

    def scale(self, x: jax.Array, shared_axes: Sequence[int], numerics: Numerics) -> jax.Array:
        """The bound over that of the numerics, in the dtype and shape of the bound."""
        return over(self.bound(x, shared_axes, numerics), numerics.quant_bound())

    def bias(
        self, x: jax.Array, shared_axes: Sequence[int], scale: jax.Array, numerics: Numerics
    ) -> jax.Array | None:
        """What is added to `x` before it is scaled, in the shape of `scale`; None for nothing."""
        del x, shared_axes, scale, numerics
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class AbsMaxCalibration(Calibration):
    """The largest magnitude. A group of zeros gets 1, so that it is quantized to zeros.

    `clipping_scale` multiplies it: below 1, the largest values are clipped.

    Raises:
      ValueError: `clipping_scale` is not positive.
    """

    clipping_scale: float | None = None

    def __post_init__(self):
        _require_positive("clipping_scale", self.clipping_scale)

    def bound(self, x: jax.Array, shared_axes: Sequence[int], numerics: Numerics) -> jax.Array:
        """max |x| over `shared_axes`, not clipped yet."""
        return _one_for_zero(largest_magnitude(x, shared_axes))

    def scale(self, x: jax.Array, shared_axes: Sequence[int], numerics: Numerics) -> jax.Array:
        """The bound times `clipping_scale`, over that of the numerics."""
        bound = self.bound(x, shared_axes, numerics)
        return over(bound, numerics.quant_bound(), self.clipping_scale)


@dataclasses.dataclass(frozen=True, slots=True)
class AbsMeanCalibration(Calibration):
    """The p-norm mean (sum |x|^p / n)^(1/p) of the n values that are not 0, times a factor.

    The factor is `clipping_scale`: for values from a normal distribution and p = 1, one between 2
    and 4 clips a few outliers. A group of zeros gets 1.

    Raises:
      ValueError: `clipping_scale` or `p` is not positive.
    """

    clipping_scale: float
    p: float = 1.0

    def __post_init__(self):
        _require_positive("clipping_scale", self.clipping_scale)
        _require_positive("p", self.p)

    def bound(self, x: jax.Array, shared_axes: Sequence[int], numerics: Numerics) -> jax.Array:
        """The mean over `shared_axes`, times `clipping_scale`."""
        axes = tuple(shared_axes)
        total = jnp.sum(jnp.power(jnp.abs(x), self.p), axis=axes, keepdims=True)
        count = _one_for_zero(jnp.sum((x != 0).astype(x.dtype), axis=axes, keepdims=True))
        return _one_for_zero(jnp.power(total / count, 1 / self.p) * self.clipping_scale)


@dataclasses.dataclass(frozen=True, slots=True)
class ConstantCalibration(Calibration):
    """A bound that is known beforehand, as of images in 0..1, and a bias if there is one.

    A compiler multiplies it beforehand with what is constant in the other side's scale, and what is
    served from a stored side may then differ in its last bit: conversion notices, and refuses.

    Raises:
      ValueError: the numbers are not finite, or the bound is not positive.
    """

    bound_value: float
    bias_value: float | None = None

    def __post_init__(self):
        _require_positive("bound_value", self.bound_value)
        if self.bias_value is not None and not math.isfinite(self.bias_value):
            raise ValueError(f"`bias_value` must be finite, got {self.bias_value}")

    def bound(self, x: jax.Array, shared_axes: Sequence[int], numerics: Numerics) -> jax.Array:
        """`bound_value`, whatever `x` holds."""
        return jnp.full(_reduced(x, shared_axes), self.bound_value, x.dtype)

    def scale(self, x: jax.Array, shared_axes: Sequence[int], numerics: Numerics) -> jax.Array:
        """`bound_value` over the bound of the numerics, divided once and for all."""
        dtype = np.dtype(x.dtype)
        quotient = np.asarray(self.bound_value, dtype) / np.asarray(numerics.quant_bound(), dtype)
        return jnp.full(_reduced(x, shared_axes), quotient, dtype)

    def bias(
        self, x: jax.Array, shared_axes: Sequence[int], scale: jax.Array, numerics: Numerics
    ) -> jax.Array | None:
        """`bias_value`, whatever `x` holds."""
        if self.bias_value is None:
            return None
        return jnp.full(_reduced(x, shared_axes), self.bias_value, x.dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class PercentileCalibration(Calibration):
    """The smallest magnitude in the tensor that at least `percentile` percent do not exceed.

    Raises:
      ValueError: `percentile` is not in (0, 100].
    """

    percentile: float

    def __post_init__(self):
        if not 0 < self.percentile <= 100:
            raise ValueError(f"`percentile` must be above 0 and at most 100, got {self.percentile}")

    def bound(self, x: jax.Array, shared_axes: Sequence[int], numerics: Numerics) -> jax.Array:
        """The percentile of |x| over `shared_axes`; 1 where that is 0."""
        # One of the values, not a mean of two: that would round otherwise when it is compiled.
        found = jnp.percentile(
            jnp.abs(x), self.percentile, axis=tuple(shared_axes), keepdims=True, method="higher"
        )
        return _one_for_zero(found.astype(x.dtype))


@dataclasses.dataclass(frozen=True, slots=True)
class SnrCalibration(Calibration):
    """The largest magnitude, times the clipping scale that leaves the best signal to noise ratio.

    Each candidate is tried by quantizing and dequantizing. A group in which none has a ratio above
    0, as one of zeros, keeps its largest magnitude.

    Raises:
      ValueError: there are no candidates, or one is not positive.
    """

    clipping_scales: tuple[float, ...] = tuple(i / 20 for i in range(20, 3, -1))

    def __post_init__(self):
        _require_candidates(self.clipping_scales)

    def bound(self, x: jax.Array, shared_axes: Sequence[int], numerics: Numerics) -> jax.Array:
        """The best candidate's bound: highest log(1 + sum x^2 / sum error^2)."""
        axes = tuple(shared_axes)
        signal = jnp.sum(x * x, axis=axes, keepdims=True)

        def badness(error: jax.Array) -> jax.Array:
            noise = jnp.sum(error * error, axis=axes, keepdims=True)
            return -jnp.log(1 + signal / noise)

        return _search(x, axes, numerics, self.clipping_scales, badness, 0.0)


@dataclasses.dataclass(frozen=True, slots=True)
class MseCalibration(Calibration):
    """The largest magnitude, times the clipping scale with the least mean of |error|^p.

    Each candidate is tried by quantizing and dequantizing. p = 2 is the mean squared error; 2.4
    gives more weight to large errors, and so spares outliers.

    Raises:
      ValueError: there are no candidates, or `p` or a candidate is not positive.
    """

    p: float = 2.0
    clipping_scales: tuple[float, ...] = tuple(i / 20 for i in range(20, 3, -1))

    def __post_init__(self):
        _require_positive("p", self.p)
        _require_candidates(self.clipping_scales)

    def bound(self, x: jax.Array, shared_axes: Sequence[int], numerics: Numerics) -> jax.Array:
        """The best candidate's bound."""
        axes = tuple(shared_axes)

        def badness(error: jax.Array) -> jax.Array:
            return jnp.mean(jnp.power(jnp.abs(error), self.p), axis=axes, keepdims=True)

        return _search(x, axes, numerics, self.clipping_scales, badness, math.inf)


@dataclasses.dataclass(frozen=True, slots=True)
class MinMaxCalibration(Calibration):
    """Asymmetric: the range from the smallest to the largest value, and zero.

    The bias moves the middle of the range to zero. It is a whole number of buckets, the zero point,
    so that a zero stays exactly zero, and integers stay integers. Good for values of one sign, as
    after a relu.
    """

    has_zero_point: ClassVar[bool] = True

    def bound(self, x: jax.Array, shared_axes: Sequence[int], numerics: Numerics) -> jax.Array:
        """Half of the range; 1 in a group of zeros."""
        low, high = _range(x, shared_axes)
        return _one_for_zero((high - low) / 2)

    def bias(
        self, x: jax.Array, shared_axes: Sequence[int], scale: jax.Array, numerics: Numerics
    ) -> jax.Array | None:
        """The zero point times the scale."""
        low, high = _range(x, shared_axes)
        # Not beyond the last bucket, where zero itself would be clipped.
        last = math.floor(numerics.quant_bound())
        bias = jnp.clip(jnp.round(-(low + high) / 2 / scale), -last, last) * scale
        # Else a compiler may fuse this product with the sum that follows, and round only once.
        return jax.lax.optimization_barrier(bias)


def largest_magnitude(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """max |x| over `axes`, which are kept with size 1; infinity where there is a NaN.

    XLA:CPU's maximum loses NaNs in vectors of some sizes, and either makes NaN of all that is
    scaled with it.
    """
    return jnp.max(_infinite_for_nan(x, jnp.abs(x)), axis=tuple(axes), keepdims=True)


def ceil_to_power_of_two(scale: jax.Array) -> jax.Array:
    """The smallest normal power of two that is not below `scale`, elementwise; NaN for NaN."""
    info = jnp.finfo(scale.dtype)
    mantissa = (1 << info.nmant) - 1
    bits = jax.lax.bitcast_convert_type(scale, f"int{info.bits}")
    # A mantissa that is not zero carries into the exponent.
    power = jax.lax.bitcast_convert_type((bits + mantissa) & ~mantissa, scale.dtype)
    return jnp.where(jnp.isnan(scale), scale, power)


def inverse_power_of_two(scale: jax.Array) -> jax.Array:
    """1 / scale of powers of two, without a division, which some devices approximate.

    As in `reciprocal` it is 1 where that overflows, and where scale is too small to be normal.
    """
    info = jnp.finfo(scale.dtype)
    bits = jax.lax.bitcast_convert_type(scale, f"int{info.bits}")
    # The exponents of a float and of its inverse add up to twice the bias.
    twice_the_bias = (2 * (1 - int(info.minexp))) << info.nmant
    inverse = jax.lax.bitcast_convert_type(twice_the_bias - bits, scale.dtype)
    return jnp.where(bits < (1 << info.nmant), jnp.ones_like(scale), inverse)


def _search(
    x: jax.Array,
    axes: tuple[int, ...],
    numerics: Numerics,
    clipping_scales: Sequence[float],
    badness: Callable[[jax.Array], jax.Array],
    worst: float,
) -> jax.Array:
    """The first of the bounds with the least badness, where that is below `worst`."""
    if numerics.needs_key():
        raise ValueError(
            "a search over clipping scales cannot judge stochastic rounding, whose error changes "
            "from call to call: calibrate this side otherwise, or configure it without noise"
        )
    absmax = _one_for_zero(largest_magnitude(x, axes))
    # The bounds that are compared differ by less than a bfloat16 can tell.
    absmax = absmax.astype(jnp.promote_types(x.dtype, jnp.float32))
    best, least = absmax, jnp.full(absmax.shape, worst, x.dtype)
    for clipping_scale in clipping_scales:
        bound = absmax * clipping_scale
        scale = over(bound, numerics.quant_bound()).astype(x.dtype)
        rounded = numerics.quantize(x * reciprocal(scale), None)
        found = badness(x - rounded.astype(x.dtype) * scale)
        # A comparison with NaN is false, so that groups it cannot judge keep their largest value.
        better = found < least
        best, least = jnp.where(better, bound, best), jnp.where(better, found, least)
    return best


def over(bound: jax.Array, divisor: float, factor: float | None = None) -> jax.Array:
    """bound * factor / divisor, with the same bits eager and compiled, in any surrounding.

    XLA turns a division by a constant into a product with its inverse, for some shapes and not for
    others; joins that with another constant factor, where it sees both; and keeps more bits of a
    bfloat16 than it has between two operations. So what it makes of a large compiled tensor is
    written out: one product in float32, of a bound that is rounded explicitly.
    """
    wide = jnp.promote_types(bound.dtype, jnp.float32)
    # XLA has no bfloat16 constants to fold: it computes with those in float32.
    constant = wide if bound.dtype == jnp.bfloat16 else bound.dtype
    inverse = np.asarray(1 / divisor, constant)
    if factor is not None and bound.dtype == jnp.bfloat16:
        bound = bound * factor
    elif factor is not None:
        inverse = np.asarray(factor, constant) * inverse
    if bound.dtype == jnp.float16:
        # Rounding explicitly would flush its subnormals.
        rounded = as_float(bound)
    else:
        info = jnp.finfo(bound.dtype)
        rounded = jax.lax.reduce_precision(bound.astype(wide), info.nexp, info.nmant)
    return (rounded * inverse.astype(wide)).astype(bound.dtype)


def reciprocal(scale: jax.Array) -> jax.Array:
    """1 / scale, and 1 where that overflows: so small a scale quantizes everything to zero."""
    inverse = jax.lax.reciprocal(scale)
    return jnp.where(jnp.isinf(inverse), jnp.ones_like(inverse), inverse)


def _range(x: jax.Array, shared_axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    axes = tuple(shared_axes)
    low = jnp.minimum(jnp.min(x, axis=axes, keepdims=True), 0)
    high = jnp.maximum(jnp.max(_infinite_for_nan(x, x), axis=axes, keepdims=True), 0)
    return low, high


def _infinite_for_nan(x: jax.Array, otherwise: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(x), jnp.asarray(jnp.inf, x.dtype), otherwise)


def _reduced(x: jax.Array, shared_axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(1 if axis in shared_axes else size for axis, size in enumerate(x.shape))


def _one_for_zero(bound: jax.Array) -> jax.Array:
    return jnp.where(bound == 0, jnp.ones_like(bound), bound)


def _require_positive(name: str, value: float | None) -> None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"`{name}` must be a positive, finite number, got {value}")


def _require_candidates(clipping_scales: Sequence[float]) -> None:
    if not clipping_scales:
        raise ValueError("`clipping_scales` must hold at least one candidate")
    for candidate in clipping_scales:
        _require_positive("clipping_scales", candidate)
