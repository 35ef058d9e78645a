"""One side of a contraction that is quantized with a learned bound: static quantization."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from aqt_engine.config import DotGeneral, Tensor
from aqt_engine.numerics import NoNumerics
from aqt_engine.ops.axes import Axes
from aqt_engine.qtensor import Scale
from aqt_engine.quantizer import shared_axes
from aqt_engine.statistics import KnownBound, Statistics, StatisticsCalibration


@dataclasses.dataclass(frozen=True, slots=True)
class StaticSide:
    """The statistics of a side, and the scale that they give. `shared` are the axes that share it.

    Statistics may have leading axes of turns, which `empty` is told of.
    """

    tensor: Tensor
    calibration: StatisticsCalibration
    shared: Axes

    @staticmethod
    def of(
        config: DotGeneral, side: str, ndim: int, axes: tuple[Axes, Axes]
    ) -> "StaticSide | None":
        """The side "lhs" or "rhs" of the forward contraction, with its contracting and batch axes.

        None where its calibration keeps no statistics.

        Raises:
          ValueError: the contraction has `local_aqt`.
        """
        tensor: Tensor = getattr(config.fwd, side)
        calibration = tensor.calibration
        if not isinstance(calibration, StatisticsCalibration) or not tensor.is_quantized:
            return None
        if config.fwd.local_aqt is not None:
            raise ValueError(
                f"a contraction has `local_aqt` and {type(calibration).__name__}, which keeps no "
                f"statistics by shard: use one of them"
            )
        calibration_axes = tensor.shared_by(ndim, *axes)
        return StaticSide(
            tensor, calibration, shared_axes(tensor.calib_shared_axes, calibration_axes, ndim)
        )

    def empty(self, x: jax.ShapeDtypeStruct, turns: Sequence[int]) -> Statistics:
        """Statistics of nothing, for operands like `x` in each of so many turns."""
        one = self.calibration.empty(jnp.zeros(x.shape, x.dtype), self.shared)
        return {k: jnp.broadcast_to(v, (*turns, *v.shape)) for k, v in one.items()}

    def observed(self, statistics: Statistics, x: jax.Array) -> Statistics:
        """The statistics of one turn after `x` as well."""
        return self.calibration.update(statistics, jax.lax.stop_gradient(x), self.shared)

    def scale(self, statistics: Statistics, x: jax.Array) -> Scale:
        """The scale that they give, of which `x` lends its shape and dtype alone."""
        bound = self.calibration.learned(statistics).astype(x.dtype)
        return self._scale(jnp.where(bound == 0, jnp.ones_like(bound), bound), x)

    def current(self, statistics: Statistics, x: jax.Array) -> Scale:
        """The same, or the scale of `x` itself where nothing was observed yet."""
        assert not isinstance(self.tensor.numerics, NoNumerics)
        return self._scale(
            self.calibration.current_bound(statistics, x, self.shared, self.tensor.numerics), x
        )

    def _scale(self, bound: jax.Array, x: jax.Array) -> Scale:
        if any(size not in (1, whole) for size, whole in zip(bound.shape, x.shape, strict=True)):
            raise ValueError(
                f"a scale of shape {bound.shape} was learned, and the operand is of shape "
                f"{x.shape}: share it along all axes whose sizes vary, as those of rows, with "
                f"`calibration_mode=CalibrationMode.ALL_AXES` or `calib_shared_axes`"
            )
        known = dataclasses.replace(self.tensor.quantizer(None), calibration=KnownBound(bound))
        return known.calibrate(x, calibration_axes=self.shared)
