"""Calibrations that learn a bound over many calls: static quantization.

Each is a pure function of its statistics, a dict of arrays that the caller keeps between calls; the
Flax modules keep them as variables. Until something was observed, the bound is that of the tensor
at hand. Conversion freezes the bound into a stored scale, and serving calibrates nothing.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from aqt_engine.calibration import AbsMaxCalibration, Calibration, largest_magnitude
from aqt_engine.numerics import Numerics

Statistics = Mapping[str, jax.Array]


class StatisticsCalibration(Calibration):
    """A calibration with memory. `freeze_after` observations, it learns no more.

    `learns_in_training` says whether training updates the statistics too, or only CALIBRATE does.
    """

    learns_in_training: ClassVar[bool]
    freeze_after: int | None

    @abc.abstractmethod
    def empty(self, x: jax.Array, shared_axes: Sequence[int]) -> Statistics:
        """Statistics of nothing, for tensors like `x`: with an int32 `count` of 0."""

    @abc.abstractmethod
    def observed(
        self, statistics: Statistics, x: jax.Array, shared_axes: Sequence[int]
    ) -> Statistics:
        """The statistics after `x` as well."""

    @abc.abstractmethod
    def learned(self, statistics: Statistics) -> jax.Array:
        """The bound that the statistics give, in the shape of a scale, where `count` is not 0."""

    def bound(self, x: jax.Array, shared_axes: Sequence[int], numerics: Numerics) -> jax.Array:
        """Refuses: a bound is learned, and this call has nowhere to learn from.

        Raises:
          ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} needs statistics from earlier calls: use it on a forward side "
            f"of a Flax module of ours, or give the scale with `lhs_scale` or `rhs_scale`"
        )

    def update(
        self, statistics: Statistics, x: jax.Array, shared_axes: Sequence[int]
    ) -> Statistics:
        """As `observed`, until `freeze_after` observations were made."""
        updated = self.observed(statistics, x, shared_axes)
        if self.freeze_after is None:
            return updated
        frozen = statistics["count"] >= self.freeze_after
        return {name: jnp.where(frozen, statistics[name], updated[name]) for name in updated}

    def current_bound(
        self, statistics: Statistics, x: jax.Array, shared_axes: Sequence[int], numerics: Numerics
    ) -> jax.Array:
        """The learned bound, or the largest magnitude in `x` where nothing was observed yet."""
        own = AbsMaxCalibration().bound(x, shared_axes, numerics)
        learned = self.learned(statistics).astype(x.dtype)
        bound = jnp.where(statistics["count"] == 0, own, learned)
        return jnp.where(bound == 0, jnp.ones_like(bound), bound)


@dataclasses.dataclass(frozen=True, slots=True)
class MeanOfAbsMaxCalibration(StatisticsCalibration):
    """The mean, over calls in CALIBRATE, of the largest magnitude."""

    freeze_after: int | None = None

    learns_in_training: ClassVar[bool] = False

    def empty(self, x: jax.Array, shared_axes: Sequence[int]) -> Statistics:
        """`sum_of_max`, in the shape of a scale and the dtype of `x`, and `count`."""
        return {
            "sum_of_max": jnp.zeros(_scale_shape(x, shared_axes), x.dtype),
            "count": jnp.zeros((), jnp.int32),
        }

    def observed(
        self, statistics: Statistics, x: jax.Array, shared_axes: Sequence[int]
    ) -> Statistics:
        """One more largest magnitude."""
        absmax = largest_magnitude(x, shared_axes)
        return {
            "sum_of_max": statistics["sum_of_max"] + absmax.astype(statistics["sum_of_max"].dtype),
            "count": statistics["count"] + 1,
        }

    def learned(self, statistics: Statistics) -> jax.Array:
        """sum_of_max / count."""
        total = statistics["sum_of_max"]
        # A quotient would have other bits compiled than eager, where XLA makes it this product.
        return total * (1 / jnp.maximum(statistics["count"], 1).astype(total.dtype))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WeightedStatsCalibration(StatisticsCalibration):
    """A weighted sum of moving averages: of the largest magnitude, and of norms of the values.

        bound = max_coeff * max + l1_coeff * mean |x| + lp_coeff * (mean |x|^p)^(1/p) + constant

    Each call moves the averages by 1 / `ema_update_count` of the difference, and the first calls by
    more, so that they start as plain means. With `filter_zeros` zeros do not count.

    Raises:
      ValueError: no coefficient is positive, or `ema_update_count` or `lp_order` is below 1.
    """

    max_coeff: float = 1.0
    l1_coeff: float = 0.0
    lp_coeff: float = 0.0
    constant: float = 0.0
    lp_order: int = 2
    ema_update_count: int = 100
    filter_zeros: bool = True
    freeze_after: int | None = None

    learns_in_training: ClassVar[bool] = True

    def __post_init__(self):
        coefficients = (self.max_coeff, self.l1_coeff, self.lp_coeff, self.constant)
        if min(coefficients) < 0 or max(coefficients) == 0:
            raise ValueError(f"coefficients must be at least 0 and not all 0, got {coefficients}")
        if self.ema_update_count < 1 or self.lp_order < 1:
            raise ValueError(
                f"`ema_update_count` and `lp_order` must be at least 1, got "
                f"{self.ema_update_count} and {self.lp_order}"
            )

    def empty(self, x: jax.Array, shared_axes: Sequence[int]) -> Statistics:
        """`max`, `l1` and `lp`, float32 in the shape of a scale, and `count`."""
        shape = _scale_shape(x, shared_axes)
        averages = {name: jnp.zeros(shape, jnp.float32) for name in ("max", "l1", "lp")}
        return {**averages, "count": jnp.zeros((), jnp.int32)}

    def observed(
        self, statistics: Statistics, x: jax.Array, shared_axes: Sequence[int]
    ) -> Statistics:
        """Averages moved towards those of `x`."""
        axes = tuple(shared_axes)
        magnitude = jnp.abs(x.astype(jnp.float32))
        counted = magnitude != 0 if self.filter_zeros else jnp.ones_like(magnitude, bool)
        number = jnp.maximum(jnp.sum(counted, axis=axes, keepdims=True), 1)
        now = {
            "max": largest_magnitude(magnitude, axes),
            "l1": jnp.sum(magnitude, axis=axes, keepdims=True) / number,
            "lp": jnp.sum(magnitude**self.lp_order, axis=axes, keepdims=True) / number,
        }
        count = statistics["count"] + 1
        step = 1 / jnp.minimum(count, self.ema_update_count).astype(jnp.float32)
        moved = {name: statistics[name] + step * (now[name] - statistics[name]) for name in now}
        return {**moved, "count": count}

    def learned(self, statistics: Statistics) -> jax.Array:
        """The weighted sum."""
        norm = statistics["lp"] ** (1 / self.lp_order)
        return (
            self.max_coeff * statistics["max"]
            + self.l1_coeff * statistics["l1"]
            + self.lp_coeff * norm
            + self.constant
        )


@dataclasses.dataclass(frozen=True, slots=True)
class DelayedScalingCalibration(StatisticsCalibration):
    """The largest magnitude of the last `amax_history_length` calls, not counting this one.

    A call need not wait for its own maximum, which is what fp8 training wants; as in Micikevicius
    et al., arXiv:2209.05433. One scale for the whole tensor: set `calibration_mode` to ALL_AXES.

    Raises:
      ValueError: `amax_history_length` is below 1.
    """

    amax_history_length: int = 1024
    freeze_after: int | None = None

    learns_in_training: ClassVar[bool] = True

    def __post_init__(self):
        if self.amax_history_length < 1:
            raise ValueError(
                f"`amax_history_length` must be at least 1, got {self.amax_history_length}"
            )

    def empty(self, x: jax.Array, shared_axes: Sequence[int]) -> Statistics:
        """`amax_history`, float32 of shape (amax_history_length, *scale shape), and `count`."""
        shape = (self.amax_history_length, *_scale_shape(x, shared_axes))
        return {"amax_history": jnp.zeros(shape, jnp.float32), "count": jnp.zeros((), jnp.int32)}

    def observed(
        self, statistics: Statistics, x: jax.Array, shared_axes: Sequence[int]
    ) -> Statistics:
        """The history with this call's maximum in the place of the oldest; NaN is left out."""
        absmax = largest_magnitude(x.astype(jnp.float32), shared_axes)
        absmax = jnp.where(jnp.isfinite(absmax), absmax, 0)
        history = jnp.roll(statistics["amax_history"], 1, axis=0).at[0].set(absmax)
        return {"amax_history": history, "count": statistics["count"] + 1}

    def learned(self, statistics: Statistics) -> jax.Array:
        """The largest of the history."""
        return jnp.max(statistics["amax_history"], axis=0)


@dataclasses.dataclass(frozen=True, slots=True)
class KnownBound(Calibration):
    """A bound that was found elsewhere, of the shape of a scale."""

    value: jax.Array

    def bound(self, x: jax.Array, shared_axes: Sequence[int], numerics: Numerics) -> jax.Array:
        """`value`, whatever `x` holds."""
        return self.value


def _scale_shape(x: jax.Array, shared_axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(1 if axis in shared_axes else size for axis, size in enumerate(x.shape))
