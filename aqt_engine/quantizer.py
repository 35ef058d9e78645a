"""From a float tensor to a quantized one."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import Partial
from jax.typing import DTypeLike

from aqt_engine.calibration import (
    AbsMaxCalibration,
    Calibration,
    ceil_to_power_of_two,
    inverse_power_of_two,
    reciprocal,
)
from aqt_engine.context import Context
from aqt_engine.numerics import NoNumerics, Numerics
from aqt_engine.qtensor import POWER_OF_TWO, QTensor, Scale

SharedAxes = int | Sequence[int] | Literal["per_tensor"] | None
Gradient = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, slots=True)
class Quantizer:
    """How one tensor is quantized.

    `calib_shared_axes` are the axes over which values share a scale; None takes the
    `calibration_axes` of the call, "per_tensor" all of them. With `scale_stop_grad` no gradient
    flows into the scale. With `po2_scale` scales are rounded up to powers of two. `scale_dtype` is
    the dtype of scale and bias; None takes that of the tensor.
    """

    numerics: Numerics | NoNumerics
    calib_shared_axes: SharedAxes = None
    scale_stop_grad: bool = True
    calibration: Calibration = AbsMaxCalibration()
    po2_scale: bool = False
    context: Context = Context()
    scale_dtype: DTypeLike | None = None

    def calibrate(self, x: jax.Array, calibration_axes: int | Sequence[int] | None = None) -> Scale:
        """The scale of `x`, and its bias if it has one: the shape of `x` with 1 in shared axes.

        Where no values share a scale, as an axis has size 0, it is 1.

        Raises:
          ValueError: the numerics quantize nothing, so that there is no scale.
        """
        numerics = self._numerics()
        axes = shared_axes(self.calib_shared_axes, calibration_axes, x.ndim)
        dtype = x.dtype if self.scale_dtype is None else self.scale_dtype
        if any(x.shape[axis] == 0 for axis in axes):
            reduced = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
            return Scale(jnp.ones(reduced, dtype))
        scale = self.calibration.scale(x, axes, numerics)
        if self.po2_scale:
            scale = ceil_to_power_of_two(scale)
        scale = scale.astype(dtype)
        bias = self.calibration.bias(x, axes, scale, numerics)
        calibrated = Scale(scale, None if bias is None else bias.astype(dtype))
        return lax.stop_gradient(calibrated) if self.scale_stop_grad else calibrated

    def quant(
        self, x: jax.Array, calibration_axes: int | Sequence[int] | None = None
    ) -> tuple[QTensor, Gradient]:
        """`x` quantized, and the function from a cotangent of the result to one of `x`.

        Values share a scale along `calibration_axes`, for a contraction those contracted over,
        unless `calib_shared_axes` says otherwise.

        Raises:
          ValueError: neither says along which axes, or an axis is out of range.
        """
        x = jnp.asarray(x)
        if isinstance(self.numerics, NoNumerics):
            return QTensor(x, None, x.dtype), Partial(_straight_through, None)
        scale = self.calibrate(x, calibration_axes=calibration_axes)
        return self.quant_with(scale, x)

    def quant_with(self, scale: Scale, x: jax.Array) -> tuple[QTensor, Gradient]:
        """As `quant`, with a `scale` that is given rather than calibrated."""
        numerics = self._numerics()
        scale = scale.marked()
        shifted = x if scale.bias is None else x + scale.bias
        if self.po2_scale:
            scale = dataclasses.replace(scale, scale=checkpoint_name(scale.scale, POWER_OF_TWO))
            inverse = checkpoint_name(inverse_power_of_two(scale.scale), POWER_OF_TWO)
        else:
            inverse = reciprocal(scale.scale)
        scaled = shifted * inverse
        qvalue = checkpoint_name(numerics.quantize(scaled, self.context.key), "aqt_qvalue")
        gradient = Partial(_straight_through, numerics.gradient_mask(scaled))
        return QTensor(qvalue, scale.scale, x.dtype, scale.bias), gradient

    def fake_quant(
        self, x: jax.Array, calibration_axes: int | Sequence[int] | None = None
    ) -> jax.Array:
        """`x` quantized and returned to its dtype; the gradient passes straight through."""
        q, gradient = self.quant(x, calibration_axes)
        return _with_gradient(x, lax.stop_gradient(q.dequant()), gradient)

    def _numerics(self) -> Numerics:
        if isinstance(self.numerics, NoNumerics):
            raise ValueError("NoNumerics leaves a tensor in float and gives it no scale")
        return self.numerics


def shared_axes(own: SharedAxes, calibration_axes: int | Sequence[int] | None, ndim: int):
    """The axes over which values share a scale, sorted and from 0 to `ndim - 1`.

    Raises:
      ValueError: no axes are given, or one is out of range.
    """
    if own == "per_tensor":
        return tuple(range(ndim))
    axes = calibration_axes if own is None else own
    if axes is None:
        raise ValueError("no axes share a scale: give `calibration_axes` or `calib_shared_axes`")
    if isinstance(axes, str):
        raise ValueError(f'`calib_shared_axes` must be axes or "per_tensor", got {axes!r}')
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if any(not -ndim <= axis < ndim for axis in axes):
        raise ValueError(f"calibration axes {axes} do not fit a tensor of {ndim} dimensions")
    return tuple(sorted({axis % ndim for axis in axes}))


def _straight_through(mask: jax.Array | None, cotangent: jax.Array) -> jax.Array:
    return cotangent if mask is None else jnp.where(mask, cotangent, 0)


@jax.custom_vjp
def _with_gradient(x: jax.Array, value: jax.Array, gradient: Gradient) -> jax.Array:
    """`value`, whose cotangent goes to `x` by way of `gradient`."""
    return value


def _with_gradient_fwd(x: jax.Array, value: jax.Array, gradient: Gradient) -> Any:
    return value, gradient


def _with_gradient_bwd(gradient: Gradient, cotangent: jax.Array) -> Any:
    return gradient(cotangent), None, None


_with_gradient.defvjp(_with_gradient_fwd, _with_gradient_bwd)
