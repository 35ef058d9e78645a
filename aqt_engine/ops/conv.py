"""Quantized convolution: one forward, and two backward.

Forward, an example on the left has one scale and an output channel on the right has one, so that
both can be taken out of the sum:

    out = float(sum(q_lhs * q_rhs)) * s_lhs[n] * s_rhs[o]    the sum in int32

What `aqt_engine.ops.dot_general` says of its bits holds here too. Backward, each gradient is a
convolution of its own, quantized by its own configuration, with scales that are shared along what
that one sums: in `dlhs` there is one for an example of the gradient and an input channel of the
kernel, in `drhs` one for an output channel of the gradient and an input channel of the left
operand; groups have each their own. Gradients pass straight through the rounding.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from aqt_engine.context import Context
from aqt_engine.modes import DequantMode
from aqt_engine.ops.axes import Axes
from aqt_engine.ops.contraction import check_accumulator, split_key
from aqt_engine.ops.operand import (
    Given,
    Key,
    Operand,
    as_forward_quantized,
    quantize,
    quantize_forward,
    refuse_gradient,
    require_float,
    require_taken_out,
)
from aqt_engine.ops.rescaling import Side, operands, rescaled
from aqt_engine.ops.windows import ConvAxes, Windows, summed
from aqt_engine.qtensor import QTensor, Scale
from aqt_engine.quantizer import Gradient

if TYPE_CHECKING:
    from aqt_engine.config import DotGeneral, DotGeneralRaw, Tensor


def conv_general_dilated(
    lhs: Operand,
    rhs: Operand,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    config: "DotGeneral",
    context: Context = Context(),
    lhs_scale: Scale | None = None,
    rhs_scale: Scale | None = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, quantized by `config`, for any spatial rank and layout.

    A side that is a `QTensor` already, or has a scale given, is taken as in
    `aqt_engine.ops.dot_general`, with scales in the layout of the operand. `calib_shared_axes` of a
    forward side are axes of the operand as given; those of a backward side are axes in the layout
    of `aqt_engine.ops.windows`. `precision` applies to float convolutions only. The result has the
    dtype of `lhs`, or `preferred_element_type` where that is given.

    A value that is not finite makes NaN of all that share its scale: its example, or its output
    channel.

    Bits: every value is the same eager, jitted, and in any batch, for configurations that convolve
    integers without a bias.

    Raises:
      TypeError: an operand is not float, or the shapes do not fit, in the words of `jax.lax`.
      ValueError: likewise; or a scale varies along what is summed, an int32 sum could overflow,
        noise is drawn without a key, or `local_aqt` or `DequantMode.OTHER_INPUT` is configured.
    """
    require_float(lhs, rhs)
    if any(c.local_aqt is not None for c in (config.fwd, config.dlhs, config.drhs)):
        raise ValueError("`local_aqt` splits a contracted axis, and a convolution splits none")
    axes = ConvAxes.parse(
        lhs.shape,
        rhs.shape,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
    )
    precision = lax.Precision.DEFAULT if precision is None else precision
    stored = isinstance(lhs, QTensor) or isinstance(rhs, QTensor)
    convolution = _conv_stored if stored else _conv
    given = Given(context.key, lhs_scale, rhs_scale)
    out = cast(jax.Array, convolution(config, axes, precision, lhs, rhs, given))
    return out.astype(lhs.dtype if preferred_element_type is None else preferred_element_type)


def quantize_lhs(x: jax.Array, axes: ConvAxes, *, config: "DotGeneral") -> QTensor:
    """`x` as the forward pass quantizes its left side: what is stored."""
    return _quantize_forward("lhs", config.fwd.lhs, x, axes.lhs_contracting, None, None)[0]


def quantize_rhs(x: jax.Array, axes: ConvAxes, *, config: "DotGeneral") -> QTensor:
    """`x` as the forward pass quantizes its right side: what is stored."""
    return _quantize_forward("rhs", config.fwd.rhs, x, axes.rhs_contracting, None, None)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _conv_stored(
    config: "DotGeneral",
    axes: ConvAxes,
    precision: lax.PrecisionLike,
    lhs: Operand,
    rhs: Operand,
    given: Given,
) -> jax.Array:
    return _forward(config, axes, precision, lhs, rhs, given)[0]


def _conv_stored_fwd(*args: Any) -> tuple[jax.Array, None]:
    return _conv_stored(*args), None


_conv_stored.defvjp(_conv_stored_fwd, refuse_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _conv(
    config: "DotGeneral",
    axes: ConvAxes,
    precision: lax.PrecisionLike,
    lhs: jax.Array,
    rhs: jax.Array,
    given: Given,
) -> jax.Array:
    return _forward(config, axes, precision, lhs, rhs, given)[0]


# What the backward convolution for the *other* side needs of an operand, and its own gradient.
_Residual = tuple[Operand, Gradient | None]


def _forward(
    config: "DotGeneral",
    axes: ConvAxes,
    precision: lax.PrecisionLike,
    lhs: Operand,
    rhs: Operand,
    given: Given,
) -> tuple[jax.Array, tuple[_Residual, _Residual, Key, Key]]:
    fwd_key, dlhs_key, drhs_key = split_key(given.key, 3)
    lhs_key, rhs_key = split_key(fwd_key, 2)
    lhs_q, lhs_gradient = _quantize_forward(
        "lhs", config.fwd.lhs, lhs, axes.lhs_contracting, lhs_key, given.lhs_scale
    )
    rhs_q, rhs_gradient = _quantize_forward(
        "rhs", config.fwd.rhs, rhs, axes.rhs_contracting, rhs_key, given.rhs_scale
    )
    left, right = jax.tree.map(axes.to_lhs, lhs_q), jax.tree.map(axes.to_rhs, rhs_q)
    out = axes.from_out(_contract(config.fwd, left, right, axes.windows, precision))
    lhs_kept = lhs_q if config.drhs.rhs.use_fwd_quant else lhs
    rhs_kept = rhs_q if config.dlhs.rhs.use_fwd_quant else rhs
    return out.astype(lhs.dtype), (
        (lhs_kept, lhs_gradient),
        (rhs_kept, rhs_gradient),
        dlhs_key,
        drhs_key,
    )


def _backward(
    config: "DotGeneral",
    axes: ConvAxes,
    precision: lax.PrecisionLike,
    residuals: tuple[_Residual, _Residual, Key, Key],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, None]:
    (lhs, lhs_gradient), (rhs, rhs_gradient), dlhs_key, drhs_key = residuals
    assert lhs_gradient is not None
    assert rhs_gradient is not None
    left, right = jax.tree.map(axes.to_lhs, lhs), jax.tree.map(axes.to_rhs, rhs)
    g = axes.to_out(g)
    sizes = (left.shape[1:-2], right.shape[:-3], g.shape[1:-2])
    windows = axes.windows.dlhs(*sizes)
    g_scaled, other = as_forward_quantized(g, right, (), _as_it_is)
    dlhs = _dlhs(config.dlhs, g_scaled, other, windows, precision, dlhs_key)
    windows = axes.windows.drhs(*sizes)
    g_scaled, other = as_forward_quantized(g, left, (), _as_it_is)
    drhs = _drhs(config.drhs, g_scaled, other, windows, precision, drhs_key)
    return (
        lhs_gradient(axes.from_lhs(dlhs)).astype(lhs.dtype),
        rhs_gradient(axes.from_rhs(drhs)).astype(rhs.dtype),
        None,
    )


_conv.defvjp(_forward, _backward)


def _dlhs(
    raw: "DotGeneralRaw",
    g: jax.Array,
    kernel: jax.Array,
    windows: Windows,
    precision: lax.PrecisionLike,
    key: Key,
) -> jax.Array:
    """The gradient (N, *T, G, O) over the reversed kernel (*K, O, G, C): (N, *S, G, C)."""
    g_key, kernel_key = split_key(key, 2)
    kernel = jnp.swapaxes(jnp.flip(kernel, range(kernel.ndim - 3)), -3, -1)
    g_q = _quantize_left(raw.lhs, g, g_key)
    kernel_q = _quantize_right(raw.rhs, kernel, kernel_key)
    return _contract_in_parts(raw, g_q, kernel_q, windows, precision)


def _drhs(
    raw: "DotGeneralRaw",
    g: jax.Array,
    lhs: jax.Array,
    windows: Windows,
    precision: lax.PrecisionLike,
    key: Key,
) -> jax.Array:
    """The left operand (C, *S, G, N) under the gradient (*T, N, G, O): (*K, C, G, O)."""
    g_key, lhs_key = split_key(key, 2)
    # Moved before they are quantized: XLA:CPU would join the moves with an integer convolution,
    # into one that it is 50 times slower at.
    g_q = _quantize_right(raw.lhs, jnp.moveaxis(g, 0, -3), g_key)
    lhs_q = _quantize_left(raw.rhs, jnp.swapaxes(lhs, 0, -1), lhs_key)
    out = _contract_in_parts(raw.swapped(), lhs_q, g_q, windows, precision)
    return jnp.moveaxis(out, 0, -3)


def _contract_in_parts(
    raw: "DotGeneralRaw",
    lhs: QTensor,
    rhs: QTensor,
    windows: Windows,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """As `_contract`; where the accumulator could overflow, float sums of parts of the features.

    The gradient of a kernel sums over all examples and positions, more than int32 holds in a
    batch of images.
    """
    features = size = lhs.shape[-1]
    while size > 1:
        try:
            check_accumulator(operands(raw, lhs, rhs)[0], summed(rhs.qvalue) // features * size)
            break
        except ValueError:
            size = (size + 1) // 2

    def part(start: int) -> jax.Array:
        stop = min(start + size, features)
        left, right = lhs.qvalue[..., start:stop], rhs.qvalue[..., start:stop, :, :]
        return _contract(
            raw,
            dataclasses.replace(lhs, qvalue=left),
            dataclasses.replace(rhs, qvalue=right),
            windows,
            precision,
        )

    return sum((part(start) for start in range(size, features, max(size, 1))), start=part(0))


def _contract(
    raw: "DotGeneralRaw",
    lhs: QTensor,
    rhs: QTensor,
    windows: Windows,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """(N, *S, G, C) over (*K, C, G, O): (N, *T, G, O), in the promoted float dtype."""
    raw, lhs, rhs = operands(raw, lhs, rhs)
    require_taken_out("lhs", lhs, _left_contracting(lhs.ndim))
    require_taken_out("rhs", rhs, _right_contracting(rhs.ndim))
    check_accumulator(raw, summed(rhs.qvalue))
    left, right = lhs.qvalue, rhs.qvalue
    convolve = functools.partial(
        windows.convolve, precision=precision, dtype=raw.dg_accumulator_dtype
    )
    # Padding is no value: it adds no bias. So what biases add is found by convolving ones.
    left_ones = jnp.ones((1, *left.shape[1:]), left.dtype)
    right_ones = jnp.ones((*right.shape[:-1], 1), right.dtype)
    return rescaled(
        convolve(left, right),
        Side(
            scale=lhs.scale,
            bias=lhs.bias,
            total=lambda: convolve(left, right_ones),
            whole=raw.lhs.calibration.has_zero_point,
        ),
        Side(
            scale=rhs.scale,
            bias=rhs.bias,
            total=lambda: convolve(left_ones, right),
            whole=raw.rhs.calibration.has_zero_point,
        ),
        lambda: convolve(left_ones, right_ones),
        jnp.promote_types(lhs.dequant_dtype, rhs.dequant_dtype),
    )


def _quantize_forward(
    side: str, tensor: "Tensor", x: Operand, contracting: Axes, key: Key, scale: Scale | None
) -> tuple[QTensor, Gradient | None]:
    """An operand as the caller has it; what is a `QTensor` already has no gradient."""
    gradient = None
    if isinstance(x, QTensor):
        q = x
    else:
        q, gradient = quantize_forward(tensor, x, contracting, (), key, scale)
    if tensor.dequantized_at is not DequantMode.THIS_INPUT:
        require_taken_out(side, q, contracting)
    return q, gradient


def _quantize_left(tensor: "Tensor", x: jax.Array, key: Key) -> QTensor:
    return quantize(tensor, x, _left_contracting(x.ndim), (x.ndim - 2,), key)[0]


def _quantize_right(tensor: "Tensor", x: jax.Array, key: Key) -> QTensor:
    return quantize(tensor, x, _right_contracting(x.ndim), (x.ndim - 2,), key)[0]


def _as_it_is(scale: jax.Array) -> jax.Array:
    """A scale of the common layout, laid out over the output: by broadcasting."""
    return scale


def _left_contracting(ndim: int) -> Axes:
    return (*range(1, ndim - 2), ndim - 1)


def _right_contracting(ndim: int) -> Axes:
    return tuple(range(ndim - 2))
