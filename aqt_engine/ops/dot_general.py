"""Quantized `dot_general`: one contraction forward, two backward.

Forward, with 8 bits on both sides and s = absmax / 127.5 over the contracted axes:

    q = round(clip(x * (1 / s), -127, 127))        for each side, int8
    out = float(sum(q_lhs * q_rhs)) * s_lhs * s_rhs    the sum in int32, the scales in this order

The integer sum does not depend on its order, and the multiplications are elementwise, so the
result has the same bits eager and compiled, alone and in a batch. Backward, each of the two
contractions is quantized in the same manner by its own configuration. Method: Accurate Quantized
Training, as in Abdolrashidi et al., arXiv:2105.03536.
"""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from aqt_engine.context import Context
from aqt_engine.numerics import IntNumerics
from aqt_engine.ops.axes import DimensionNumbers, DotAxes
from aqt_engine.qtensor import QTensor
from aqt_engine.quantizer import Gradient

if TYPE_CHECKING:
    from aqt_engine.config import DotGeneral, DotGeneralRaw, Tensor

Operand = jax.Array | QTensor
_Key = jax.Array | None


def dot_general(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    config: "DotGeneral",
    context: Context = Context(),
) -> jax.Array:
    """`jax.lax.dot_general`, quantized by `config`: batch, left and right remaining axes in order.

    A side that is a `QTensor` already is contracted as it stands, and then nothing here can be
    differentiated. `precision` applies to float contractions only: integer sums are exact. The
    result has the dtype of `lhs`, or `preferred_element_type` where that is given.

    Bits: every value is the same eager, jitted, and in any batch, for configurations that
    contract integers.

    Raises:
      TypeError: an operand is not float.
      ValueError: a scale varies along a contracted axis, an int32 sum could overflow, or noise is
        drawn without a key.
    """
    for side, operand in (("lhs", lhs), ("rhs", rhs)):
        if not jnp.issubdtype(operand.dtype, jnp.floating):
            raise TypeError(
                f"`{side}` has dtype {operand.dtype}, and only floating-point tensors are "
                f"quantized: cast it, or contract it with `jax.lax.dot_general`"
            )
    axes = DotAxes.parse(dimension_numbers, lhs.ndim, rhs.ndim)
    precision = lax.Precision.DEFAULT if precision is None else precision
    if isinstance(lhs, QTensor) or isinstance(rhs, QTensor):
        out = cast(jax.Array, _contract_stored(config.fwd, axes, precision, lhs, rhs, context.key))
    else:
        out = cast(jax.Array, _dot_general(config, axes, precision, lhs, rhs, context.key))
    return out.astype(lhs.dtype if preferred_element_type is None else preferred_element_type)


def quantize_lhs(
    x: jax.Array, rhs_ndim: int, dimension_numbers: DimensionNumbers, *, config: "DotGeneral"
) -> QTensor:
    """`x` as the forward pass quantizes its left side: what conversion stores."""
    axes = DotAxes.parse(dimension_numbers, x.ndim, rhs_ndim)
    return _quantize(config.fwd.lhs, x, axes.lhs_contracting, None)[0]


def quantize_rhs(
    x: jax.Array, lhs_ndim: int, dimension_numbers: DimensionNumbers, *, config: "DotGeneral"
) -> QTensor:
    """`x` as the forward pass quantizes its right side: what conversion stores."""
    axes = DotAxes.parse(dimension_numbers, lhs_ndim, x.ndim)
    return _quantize(config.fwd.rhs, x, axes.rhs_contracting, None)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _contract_stored(
    raw: "DotGeneralRaw",
    axes: DotAxes,
    precision: lax.PrecisionLike,
    lhs: Operand,
    rhs: Operand,
    key: _Key,
) -> jax.Array:
    lhs_key, rhs_key = _split(_split(key, 3)[0], 2)
    if not isinstance(lhs, QTensor):
        lhs = _quantize(raw.lhs, lhs, axes.lhs_contracting, lhs_key)[0]
    if not isinstance(rhs, QTensor):
        rhs = _quantize(raw.rhs, rhs, axes.rhs_contracting, rhs_key)[0]
    return _contract(raw, lhs, rhs, axes, precision)


def _contract_stored_fwd(*args: Any) -> tuple[jax.Array, None]:
    return _contract_stored(*args), None


def _contract_stored_bwd(*_: Any):
    # Plain differentiation would go through the rounding and give zeros without a word.
    raise TypeError(
        "a contraction with a stored QTensor has no gradient: differentiate the model in "
        "QuantMode.TRAIN"
    )


_contract_stored.defvjp(_contract_stored_fwd, _contract_stored_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _dot_general(
    config: "DotGeneral",
    axes: DotAxes,
    precision: lax.PrecisionLike,
    lhs: jax.Array,
    rhs: jax.Array,
    key: _Key,
) -> jax.Array:
    return _forward(config, axes, precision, lhs, rhs, key)[0]


# What the backward contraction for the *other* side needs of an operand, and its own gradient.
_Residual = tuple[jax.Array | QTensor, Gradient]


def _forward(
    config: "DotGeneral",
    axes: DotAxes,
    precision: lax.PrecisionLike,
    lhs: jax.Array,
    rhs: jax.Array,
    key: _Key,
) -> tuple[jax.Array, tuple[_Residual, _Residual, _Key, _Key]]:
    fwd_key, dlhs_key, drhs_key = _split(key, 3)
    lhs_key, rhs_key = _split(fwd_key, 2)
    lhs_q, lhs_gradient = _quantize(config.fwd.lhs, lhs, axes.lhs_contracting, lhs_key)
    rhs_q, rhs_gradient = _quantize(config.fwd.rhs, rhs, axes.rhs_contracting, rhs_key)
    out = _contract(config.fwd, lhs_q, rhs_q, axes, precision)
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
    axes: DotAxes,
    precision: lax.PrecisionLike,
    residuals: tuple[_Residual, _Residual, _Key, _Key],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, None]:
    (lhs, lhs_gradient), (rhs, rhs_gradient), dlhs_key, drhs_key = residuals
    dlhs_axes, to_lhs = axes.dlhs()
    drhs_axes, to_rhs = axes.drhs()
    g_scaled, other = _as_forward_quantized(g, rhs, axes.rhs_to_output)
    dlhs = _quantize_and_contract(config.dlhs, g_scaled, other, dlhs_axes, precision, dlhs_key)
    g_scaled, other = _as_forward_quantized(g, lhs, axes.lhs_to_output)
    drhs = _quantize_and_contract(config.drhs, g_scaled, other, drhs_axes, precision, drhs_key)
    return (
        lhs_gradient(jnp.transpose(dlhs, to_lhs)).astype(lhs.dtype),
        rhs_gradient(jnp.transpose(drhs, to_rhs)).astype(rhs.dtype),
        None,
    )


_dot_general.defvjp(_forward, _backward)


def _as_forward_quantized(
    g: jax.Array, other: jax.Array | QTensor, to_output: Any
) -> tuple[jax.Array, jax.Array]:
    """The gradient times the other operand's scale, and that operand's integers in float."""
    if not isinstance(other, QTensor):
        return g, other
    if other.scale is None:
        return g, other.qvalue
    scaled = g * to_output(other.scale).astype(g.dtype)
    return scaled, other.qvalue.astype(other.dequant_dtype)


def _quantize_and_contract(
    raw: "DotGeneralRaw",
    lhs: jax.Array,
    rhs: jax.Array,
    axes: DotAxes,
    precision: lax.PrecisionLike,
    key: _Key,
) -> jax.Array:
    lhs_key, rhs_key = _split(key, 2)
    if raw.local_aqt is not None:
        count = raw.local_aqt.contraction_axis_shard_count
        lhs, rhs, axes = _shard_contraction(lhs, rhs, axes, count)
    lhs_q, _ = _quantize(raw.lhs, lhs, axes.lhs_contracting, lhs_key)
    rhs_q, _ = _quantize(raw.rhs, rhs, axes.rhs_contracting, rhs_key)
    out = _contract(raw, lhs_q, rhs_q, axes, precision).astype(
        jnp.promote_types(lhs.dtype, rhs.dtype)
    )
    return out if raw.local_aqt is None else jnp.sum(out, axis=0)


def _shard_contraction(
    lhs: jax.Array, rhs: jax.Array, axes: DotAxes, count: int
) -> tuple[jax.Array, jax.Array, DotAxes]:
    """Splits the first contracted axis into `count` shards, which become the first batch axis."""

    def split(x: jax.Array, axis: int) -> jax.Array:
        size, rest = divmod(x.shape[axis], count)
        if rest:
            raise ValueError(
                f"a contracted axis of {x.shape[axis]} cannot be split into "
                f"`contraction_axis_shard_count={count}` equal shards"
            )
        return x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])

    def shift(kind: Sequence[int], axis: int) -> tuple[int, ...]:
        return tuple(a + (a >= axis) for a in kind)

    if not axes.lhs_contracting:
        raise ValueError("`local_aqt` splits a contracted axis, and this contraction has none")
    left, right = axes.lhs_contracting[0], axes.rhs_contracting[0]
    lhs_batch = (left, *shift(axes.lhs_batch, left))
    rhs_batch = (right, *shift(axes.rhs_batch, right))
    contracting = (shift(axes.lhs_contracting, left), shift(axes.rhs_contracting, right))
    lhs, rhs = split(lhs, left), split(rhs, right)
    return lhs, rhs, DotAxes.parse((contracting, (lhs_batch, rhs_batch)), lhs.ndim, rhs.ndim)


def _quantize(
    tensor: "Tensor", x: jax.Array, contracting: tuple[int, ...], key: _Key
) -> tuple[QTensor, Gradient]:
    return tensor.quantizer(key).quant(x, calibration_axes=contracting)


def _contract(
    raw: "DotGeneralRaw",
    lhs: QTensor,
    rhs: QTensor,
    axes: DotAxes,
    precision: lax.PrecisionLike,
) -> jax.Array:
    lhs_value, lhs_scale = _contraction_operand(raw.lhs, lhs)
    rhs_value, rhs_scale = _contraction_operand(raw.rhs, rhs)
    out_dtype = jnp.promote_types(lhs.dequant_dtype, rhs.dequant_dtype)
    in_dtype = raw.dg_in_dtype
    if in_dtype is None and lhs_value.dtype != rhs_value.dtype:
        in_dtype = out_dtype
    if in_dtype is not None:
        lhs_value, rhs_value = lhs_value.astype(in_dtype), rhs_value.astype(in_dtype)
    _check_accumulator(raw, math.prod(lhs_value.shape[a] for a in axes.lhs_contracting))
    out = lax.dot_general(
        lhs_value,
        rhs_value,
        axes.dimension_numbers,
        precision=precision,
        preferred_element_type=raw.dg_accumulator_dtype,
    ).astype(out_dtype)
    for side, scale, contracting, to_output in (
        ("lhs", lhs_scale, axes.lhs_contracting, axes.lhs_to_output),
        ("rhs", rhs_scale, axes.rhs_contracting, axes.rhs_to_output),
    ):
        if scale is None:
            continue
        if any(scale.shape[a] != 1 for a in contracting):
            raise ValueError(
                f"the scale of `{side}`, of shape {scale.shape}, varies along contracted axes "
                f"{contracting}: add them to `calib_shared_axes`, or set `use_fake_quant`"
            )
        out = out * to_output(scale)
    return out


def _contraction_operand(tensor: "Tensor", q: QTensor) -> tuple[jax.Array, jax.Array | None]:
    if tensor.use_fake_quant:
        return q.dequant(), None
    return q.qvalue, q.scale


def _check_accumulator(raw: "DotGeneralRaw", contracted: int) -> None:
    dtype = raw.dg_accumulator_dtype
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        return
    numerics = (raw.lhs.numerics, raw.rhs.numerics)
    bounds = [n.clip_bound() for n in numerics if isinstance(n, IntNumerics)]
    limit = int(jnp.iinfo(dtype).max // math.prod(bounds))
    if contracted > limit:
        raise ValueError(
            f"a contraction of {contracted} values could overflow its {np.dtype(dtype).name} "
            f"accumulator, which holds {limit} at these bits: split the contraction"
        )


def _split(key: _Key, count: int) -> Sequence[_Key]:
    """`count` keys of `key`, in AQT's order; Nones where there is none."""
    return [None] * count if key is None else list(jax.random.split(key, count))
