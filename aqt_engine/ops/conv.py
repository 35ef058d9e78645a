"""Quantized convolution: one forward, two backward, each on integers.

Operands are brought into one layout: images (batch, spatial..., features), kernels (spatial..., in,
out). Forward, an image has a scale for each example and a kernel one for each output feature, so
that both can be taken out of the sum:

    out = float(conv(q_lhs, q_rhs)) * s_lhs * s_rhs            conv in int32

Backward, the gradient of the image is a convolution of the output's gradient with the reversed
kernel, which sums over output features: the gradient has a scale for each example, the kernel one
for each input feature. The gradient of the kernel is a convolution of the image with the output's
gradient, which sums over examples and positions: each has a scale for each feature.
"""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from aqt_engine.context import Context
from aqt_engine.modes import DequantMode
from aqt_engine.ops.contraction import check_accumulator, require_shared, split_key
from aqt_engine.ops.dot_general import Given, Operand
from aqt_engine.ops.window import Window
from aqt_engine.qtensor import QTensor, Scale
from aqt_engine.quantizer import Gradient

if TYPE_CHECKING:
    from aqt_engine.config import DotGeneral, DotGeneralRaw, Tensor

_Key = jax.Array | None
_Residual = tuple[jax.Array | QTensor, Gradient]


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

    A side that is a `QTensor` already is convolved as it stands, and then nothing here can be
    differentiated. A side with a scale given is quantized with that, and not calibrated; no
    gradient flows into it. Scales are shared as the module says, or over all axes with ALL_AXES.
    The result has the dtype of `lhs`, or `preferred_element_type` where that is given.

    Raises:
      TypeError: an operand is not float.
      ValueError: batch groups, shards or a bias are asked for; a scale varies along what is summed;
        an int32 sum could overflow; or noise is drawn without a key.
    """
    for side, operand in (("lhs", lhs), ("rhs", rhs)):
        if not jnp.issubdtype(operand.dtype, jnp.floating):
            raise TypeError(
                f"`{side}` has dtype {operand.dtype}, and only floating-point tensors are "
                f"quantized: cast it, or convolve it with `jax.lax.conv_general_dilated`"
            )
    if batch_group_count != 1:
        raise ValueError("`batch_group_count` is not quantized: leave it at 1")
    if any(raw.local_aqt is not None for raw in (config.fwd, config.dlhs, config.drhs)):
        raise ValueError("`local_aqt` splits the sum of a dot_general: leave it out here")
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    batch, feature, *spatial = numbers.lhs_spec
    image_order = (batch, *spatial, feature)
    lhs, lhs_scale = _transposed(lhs, image_order), _transposed_scale(lhs_scale, image_order)
    out_feature, in_feature, *spatial = numbers.rhs_spec
    kernel_order = (*spatial, in_feature, out_feature)
    rhs, rhs_scale = _transposed(rhs, kernel_order), _transposed_scale(rhs_scale, kernel_order)
    window = Window.parse(
        lhs.shape[1:-1],
        rhs.shape[:-2],
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        feature_group_count,
    )
    precision = lax.Precision.DEFAULT if precision is None else precision
    given = Given(context.key, lhs_scale, rhs_scale)
    stored = isinstance(lhs, QTensor) or isinstance(rhs, QTensor)
    convolution = _conv_stored if stored else _conv
    out = cast(jax.Array, convolution(config, window, precision, lhs, rhs, given))
    batch, feature, *spatial = numbers.out_spec
    layout = (batch, *spatial, feature)
    out = jnp.transpose(out, tuple(map(layout.index, range(out.ndim))))
    return out.astype(lhs.dtype if preferred_element_type is None else preferred_element_type)


def image_axes(ndim: int, dimension_numbers: Any) -> tuple[int, ...]:
    """The axes of an image, in its own layout, along which an example shares a scale."""
    numbers = lax.conv_dimension_numbers((1,) * ndim, (1,) * ndim, dimension_numbers)
    return _all_but(ndim, numbers.lhs_spec[0])


def kernel_axes(ndim: int, dimension_numbers: Any) -> tuple[int, ...]:
    """The axes of a kernel, in its own layout, along which an output feature shares a scale."""
    numbers = lax.conv_dimension_numbers((1,) * ndim, (1,) * ndim, dimension_numbers)
    return _all_but(ndim, numbers.rhs_spec[0])


def quantize_image(lhs: jax.Array, dimension_numbers: Any, *, config: "DotGeneral") -> QTensor:
    """`lhs`, in its own layout, as the forward pass quantizes it: what conversion stores."""
    return _quantize(config.fwd.lhs, lhs, image_axes(lhs.ndim, dimension_numbers), None)[0]


def quantize_kernel(rhs: jax.Array, dimension_numbers: Any, *, config: "DotGeneral") -> QTensor:
    """`rhs`, in its own layout, as the forward pass quantizes it: what conversion stores."""
    return _quantize(config.fwd.rhs, rhs, kernel_axes(rhs.ndim, dimension_numbers), None)[0]


def _transposed_scale(scale: Scale | None, order: tuple[int, ...]) -> Scale | None:
    return jax.tree.map(functools.partial(jnp.transpose, axes=order), scale)


def _transposed(operand: Operand, order: tuple[int, ...]) -> Any:
    if not isinstance(operand, QTensor):
        return jnp.transpose(operand, order)
    scale = None if operand.scale is None else jnp.transpose(operand.scale, order)
    bias = None if operand.bias is None else jnp.transpose(operand.bias, order)
    return QTensor(jnp.transpose(operand.qvalue, order), scale, operand.dequant_dtype, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _conv_stored(
    config: "DotGeneral",
    window: Window,
    precision: lax.PrecisionLike,
    lhs: Operand,
    rhs: Operand,
    given: Given,
) -> jax.Array:
    lhs_key, rhs_key = split_key(split_key(given.key, 3)[0], 2)
    if not isinstance(lhs, QTensor):
        lhs = _quantize(config.fwd.lhs, lhs, _all_but(lhs.ndim, 0), lhs_key, given.lhs_scale)[0]
    if not isinstance(rhs, QTensor):
        outputs = _all_but(rhs.ndim, rhs.ndim - 1)
        rhs = _quantize(config.fwd.rhs, rhs, outputs, rhs_key, given.rhs_scale)[0]
    return _forward_sum(config.fwd, lhs, rhs, window, precision).astype(lhs.dtype)


def _conv_stored_fwd(*args: Any) -> tuple[jax.Array, None]:
    return _conv_stored(*args), None


def _conv_stored_bwd(*_: Any):
    raise TypeError(
        "a convolution with a stored QTensor has no gradient: differentiate the model in "
        "QuantMode.TRAIN"
    )


_conv_stored.defvjp(_conv_stored_fwd, _conv_stored_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _conv(
    config: "DotGeneral",
    window: Window,
    precision: lax.PrecisionLike,
    lhs: jax.Array,
    rhs: jax.Array,
    given: Given,
) -> jax.Array:
    return _forward(config, window, precision, lhs, rhs, given)[0]


def _forward(
    config: "DotGeneral",
    window: Window,
    precision: lax.PrecisionLike,
    lhs: jax.Array,
    rhs: jax.Array,
    given: Given,
) -> tuple[jax.Array, tuple[_Residual, _Residual, _Key, _Key]]:
    fwd_key, dlhs_key, drhs_key = split_key(given.key, 3)
    lhs_key, rhs_key = split_key(fwd_key, 2)
    lhs_q, lhs_gradient = _quantize(
        config.fwd.lhs, lhs, _all_but(lhs.ndim, 0), lhs_key, given.lhs_scale
    )
    outputs = _all_but(rhs.ndim, rhs.ndim - 1)
    rhs_q, rhs_gradient = _quantize(config.fwd.rhs, rhs, outputs, rhs_key, given.rhs_scale)
    out = _forward_sum(config.fwd, lhs_q, rhs_q, window, precision).astype(lhs.dtype)
    lhs_kept = lhs_q if config.drhs.rhs.use_fwd_quant else lhs
    rhs_kept = rhs_q if config.dlhs.rhs.use_fwd_quant else rhs
    return out, ((lhs_kept, lhs_gradient), (rhs_kept, rhs_gradient), dlhs_key, drhs_key)


def _backward(
    config: "DotGeneral",
    window: Window,
    precision: lax.PrecisionLike,
    residuals: tuple[_Residual, _Residual, _Key, _Key],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, None]:
    (lhs, lhs_gradient), (rhs, rhs_gradient), dlhs_key, drhs_key = residuals
    scaled, kernel = _as_forward_quantized(g, rhs, "rhs")
    dlhs = _image_gradient(
        config.dlhs, scaled, kernel, lhs.shape[1:-1], window, precision, dlhs_key
    )
    scaled, image = _as_forward_quantized(g, lhs, "lhs")
    drhs = _kernel_gradient(config.drhs, scaled, image, rhs.shape, window, precision, drhs_key)
    return (
        lhs_gradient(dlhs).astype(lhs.dtype),
        rhs_gradient(drhs).astype(rhs.dtype),
        None,
    )


_conv.defvjp(_forward, _backward)


def _as_forward_quantized(
    g: jax.Array, other: jax.Array | QTensor, side: str
) -> tuple[jax.Array, jax.Array]:
    """The gradient times the other operand's scale, and that operand's integers in float."""
    if not isinstance(other, QTensor):
        return g, other
    if other.scale is None:
        return g, other.qvalue
    scale = _image_scale(side, other) if side == "lhs" else _kernel_scale(side, other)
    return g * scale.astype(g.dtype), other.qvalue.astype(other.dequant_dtype)


def _forward_sum(
    raw: "DotGeneralRaw",
    lhs: QTensor,
    rhs: QTensor,
    window: Window,
    precision: lax.PrecisionLike,
) -> jax.Array:
    lhs, rhs = _inputs("lhs", raw.lhs, lhs), _inputs("rhs", raw.rhs, rhs)
    count = math.prod(rhs.shape[:-1])
    out = _integers(raw, lhs, rhs, window, count, precision)
    out = out if lhs.scale is None else out * _image_scale("lhs", lhs)
    return out if rhs.scale is None else out * _kernel_scale("rhs", rhs)


def _image_gradient(
    raw: "DotGeneralRaw",
    g: jax.Array,
    kernel: jax.Array,
    image: tuple[int, ...],
    window: Window,
    precision: lax.PrecisionLike,
    key: _Key,
) -> jax.Array:
    g_key, kernel_key = split_key(key, 2)
    rank, groups = kernel.ndim - 2, window.groups
    g_q = _quantize(raw.lhs, g, _all_but(g.ndim, 0), g_key)[0]
    kernel_q = _quantize(raw.rhs, kernel, _all_but(kernel.ndim, rank), kernel_key)[0]
    g_q, kernel_q = _inputs("lhs", raw.lhs, g_q), _inputs("rhs", raw.rhs, kernel_q)

    def swapped(x: jax.Array, width: int) -> jax.Array:
        """(spatial..., in, out) to (spatial..., out of a group, in of all groups)."""
        x = x.reshape(*x.shape[:-1], groups, width)
        x = jnp.moveaxis(x, (-1, -2, -3), (-3, -2, -1))
        return x.reshape(*x.shape[:-2], -1)

    values = swapped(jnp.flip(kernel_q.qvalue, range(rank)), kernel.shape[-1] // groups)
    scale = kernel_q.scale
    if scale is not None:
        require_shared("rhs", scale, _all_but(kernel.ndim, rank))
        # The scale of an input feature counts for it in every group.
        scale = jnp.tile(jnp.moveaxis(scale, -2, -1), groups)
    flipped = QTensor(values, scale, kernel_q.dequant_dtype)
    transposed = window.of_image_gradient(image, kernel.shape[:-2], g.shape[1:-1])
    out = _integers(raw, g_q, flipped, transposed, math.prod(values.shape[:-1]), precision)
    out = out if g_q.scale is None else out * _image_scale("lhs", g_q)
    return out if scale is None else out * scale.reshape(-1)


def _kernel_gradient(
    raw: "DotGeneralRaw",
    g: jax.Array,
    image: jax.Array,
    kernel: tuple[int, ...],
    window: Window,
    precision: lax.PrecisionLike,
    key: _Key,
) -> jax.Array:
    g_key, image_key = split_key(key, 2)
    channels = _all_but(g.ndim, g.ndim - 1)
    g_q = _quantize(raw.lhs, g, channels, g_key)[0]
    image_q = _quantize(raw.rhs, image, channels, image_key)[0]
    g_q, image_q = _inputs("lhs", raw.lhs, g_q), _inputs("rhs", raw.rhs, image_q)
    transposed = window.of_kernel_gradient(image.shape[1:-1], kernel[:-2], g.shape[1:-1])
    # Features of the image take the place of examples, and examples that of features.
    as_image = QTensor(jnp.swapaxes(image_q.qvalue, 0, -1), None, image_q.dequant_dtype)
    as_kernel = QTensor(jnp.moveaxis(g_q.qvalue, 0, -2), None, g_q.dequant_dtype)
    count = math.prod(g.shape[:-1])
    out = _integers(
        raw.swapped(), as_image, as_kernel, transposed, count, precision
    )  # (in of a group, spatial..., out)
    out = jnp.moveaxis(out, 0, -2)
    if g_q.scale is not None:
        require_shared("lhs", g_q.scale, channels)
        out = out * g_q.scale.reshape(-1)
    if image_q.scale is not None:
        require_shared("rhs", image_q.scale, channels)
        by_group = jnp.broadcast_to(image_q.scale.reshape(-1), image.shape[-1:])
        by_group = by_group.reshape(window.groups, -1)
        out = out * jnp.repeat(by_group.T, kernel[-1] // window.groups, axis=1)
    return out


def _integers(
    raw: "DotGeneralRaw",
    lhs: QTensor,
    rhs: QTensor,
    window: Window,
    count: int,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """The convolution of the values as they are, in the promoted float dtype."""
    out_dtype = jnp.promote_types(lhs.dequant_dtype, rhs.dequant_dtype)
    in_dtype = raw.dg_in_dtype
    if in_dtype is None and lhs.qvalue.dtype != rhs.qvalue.dtype:
        in_dtype = out_dtype
    image, kernel = lhs.qvalue, rhs.qvalue
    if in_dtype is not None:
        image, kernel = image.astype(in_dtype), kernel.astype(in_dtype)
    check_accumulator(raw, count)
    spatial = "".join(chr(ord("0") + i) for i in range(len(window.strides)))
    return lax.conv_general_dilated(
        image,
        kernel,
        window.strides,
        window.padding,
        lhs_dilation=window.lhs_dilation,
        rhs_dilation=window.rhs_dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=window.groups,
        batch_group_count=window.batch_groups,
        precision=precision,
        preferred_element_type=raw.dg_accumulator_dtype,
    ).astype(out_dtype)


def _inputs(side: str, tensor: "Tensor", q: QTensor) -> QTensor:
    """The operand, dequantized where that is to be done before the sum."""
    if tensor.dequantized_at is DequantMode.THIS_INPUT:
        return QTensor(q.dequant(), None, q.dequant_dtype)
    if q.bias is not None:
        raise ValueError(
            f"`{side}` has a bias, which padding with zeros does not know of: set "
            f"`use_fake_quant`, or calibrate symmetrically"
        )
    if tensor.dequantized_at is DequantMode.OTHER_INPUT and q.scale is not None:
        raise ValueError(
            f"`{side}` has `DequantMode.OTHER_INPUT`, which a convolution does not have: use "
            f"OUTPUT or THIS_INPUT"
        )
    return q


def _image_scale(side: str, q: QTensor) -> jax.Array:
    assert q.scale is not None
    require_shared(side, q.scale, _all_but(q.ndim, 0))
    return q.scale


def _kernel_scale(side: str, q: QTensor) -> jax.Array:
    assert q.scale is not None
    require_shared(side, q.scale, _all_but(q.ndim, q.ndim - 1))
    return q.scale.reshape(-1)


def _all_but(ndim: int, axis: int) -> tuple[int, ...]:
    return tuple(a for a in range(ndim) if a != axis)


def _quantize(
    tensor: "Tensor",
    x: jax.Array,
    shared: tuple[int, ...],
    key: _Key,
    scale: Scale | None = None,
) -> tuple[QTensor, Gradient]:
    quantizer = tensor.quantizer(key)
    if scale is not None and tensor.is_quantized:
        return quantizer.quant_with(jax.tree.map(lax.stop_gradient, scale), x)
    return quantizer.quant(x, calibration_axes=tensor.shared_by(x.ndim, shared, ()))
