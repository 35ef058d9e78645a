"""One contraction of two quantized operands: what all quantized ops come down to.

With scales s and biases b, an operand is x = q * s - b, and sum(x_l * x_r) over n values is

    sum(q_l * q_r) * s_l * s_r - sum(q_l) * s_l * b_r - b_l * (sum(q_r) * s_r) + b_l * b_r * n

Without biases only the first term is there. Where biases are zero points, b = z * s, and the sum is
an integer one, it is corrected in integers instead, so that its bits depend on no rounding:

    (sum(q_l * q_r) - sum(q_l) * z_r - z_l * sum(q_r) + z_l * z_r * n) * s_l * s_r
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from aqt_engine.materialization import materialized_on_cpu
from aqt_engine.modes import DequantMode
from aqt_engine.numerics import IntNumerics
from aqt_engine.ops.axes import Axes, DotAxes
from aqt_engine.ops.operand import require_shared
from aqt_engine.qtensor import QTensor

if TYPE_CHECKING:
    from aqt_engine.config import DotGeneralRaw, Tensor


def contract(
    raw: "DotGeneralRaw",
    lhs: QTensor,
    rhs: QTensor,
    axes: DotAxes,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """The contraction, in the promoted float dtype of the operands and their scales.

    Raises:
      ValueError: a scale or bias varies along axes where it cannot be taken out of the sum, or an
        integer accumulator could overflow.
    """
    lhs, rhs = _input_scaled(raw, lhs, rhs, axes)
    out_dtype = jnp.promote_types(lhs.dequant_dtype, rhs.dequant_dtype)
    lhs_value, rhs_value = lhs.qvalue, rhs.qvalue
    in_dtype = raw.dg_in_dtype
    if in_dtype is None and lhs_value.dtype != rhs_value.dtype:
        in_dtype = out_dtype
    if in_dtype is not None:
        lhs_value, rhs_value = lhs_value.astype(in_dtype), rhs_value.astype(in_dtype)
    count = math.prod(lhs_value.shape[a] for a in axes.lhs_contracting)
    check_accumulator(raw, count)
    integers = jnp.issubdtype(lhs_value.dtype, jnp.integer)
    summed = axes
    if integers:
        lhs_value, rhs_value, summed = _in_a_fast_layout(lhs_value, rhs_value, axes)
        lhs_value = materialized_on_cpu(lhs_value)
    out = lax.dot_general(
        lhs_value,
        rhs_value,
        summed.dimension_numbers,
        precision=precision,
        preferred_element_type=raw.dg_accumulator_dtype,
    )
    if integers:
        out = materialized_on_cpu(out)
    if jnp.issubdtype(out.dtype, jnp.integer):
        out, lhs, rhs = _zero_points_corrected(raw, out, lhs, rhs, axes, count)
    out = out.astype(out_dtype)
    for side, q, contracting, to_output in (
        ("lhs", lhs, axes.lhs_contracting, axes.lhs_to_output),
        ("rhs", rhs, axes.rhs_contracting, axes.rhs_to_output),
    ):
        if q.scale is not None:
            require_shared(side, q.scale, contracting)
            out = out * to_output(q.scale)
    return _biases_corrected(out, lhs, rhs, axes, count)


def accumulator_limit(raw: "DotGeneralRaw") -> int | None:
    """How many products an integer accumulator holds at these bits; None where it is float."""
    dtype = raw.dg_accumulator_dtype
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        return None
    # Without its zero point, a value reaches as far as the whole range.
    bounds = [
        2 * n.quant_bound() if t.calibration.has_zero_point else n.clip_bound()
        for t in (raw.lhs, raw.rhs)
        if isinstance(n := t.numerics, IntNumerics)
    ]
    # One side may be a weight that another library stored, and reach one further: Qwix has -128.
    return int(jnp.iinfo(dtype).max // (math.prod(bounds) + max(bounds, default=0)))


def check_accumulator(raw: "DotGeneralRaw", count: int) -> None:
    """Refuses a sum of `count` products that could overflow an integer accumulator.

    Raises:
      ValueError: it could.
    """
    limit = accumulator_limit(raw)
    if limit is not None and count > limit:
        raise ValueError(
            f"a contraction of {count} values could overflow its "
            f"{np.dtype(raw.dg_accumulator_dtype).name} accumulator, which holds {limit} at these "
            f"bits: split the contraction"
        )


def split_key(key: jax.Array | None, count: int) -> Sequence[jax.Array | None]:
    """`count` keys of `key`, in AQT's order; Nones where there is none."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def _in_a_fast_layout(
    lhs: jax.Array, rhs: jax.Array, axes: DotAxes
) -> tuple[jax.Array, jax.Array, DotAxes]:
    """The same contraction, with a contracted axis that is not the left's last in two parts.

    XLA:CPU sums int8 fast where the left is contracted along its last axis. Elsewhere it sums
    int32, slower than float; and a transposition before it, it folds back into the contraction. Two
    contracted axes it has to merge, and to do so it moves them to the end itself.
    """
    if len(axes.lhs_contracting) != 1:
        return lhs, rhs, axes
    (left,), (right,) = axes.lhs_contracting, axes.rhs_contracting
    size = lhs.shape[left]
    if left == lhs.ndim - 1 or size % 2 or size == 0:
        return lhs, rhs, axes

    def halved(x: jax.Array, axis: int) -> jax.Array:
        return x.reshape(*x.shape[:axis], size // 2, 2, *x.shape[axis + 1 :])

    def moved(batch: Axes, axis: int) -> Axes:
        return tuple(a + (a > axis) for a in batch)

    contracting = ((left, left + 1), (right, right + 1))
    batch = (moved(axes.lhs_batch, left), moved(axes.rhs_batch, right))
    parsed = DotAxes.parse((contracting, batch), lhs.ndim + 1, rhs.ndim + 1)
    return halved(lhs, left), halved(rhs, right), parsed


def _input_scaled(
    raw: "DotGeneralRaw", lhs: QTensor, rhs: QTensor, axes: DotAxes
) -> tuple[QTensor, QTensor]:
    """The operands with those scales multiplied in that belong to an input."""
    lhs_at, rhs_at = _into_this(raw.lhs, lhs), _into_this(raw.rhs, rhs)
    if _into_other(raw.lhs, lhs_at):
        lhs_at, rhs_at = _moved("lhs", lhs_at, rhs_at, axes.lhs_remaining, axes.lhs_to_rhs)
    elif _into_other(raw.rhs, rhs_at):
        rhs_at, lhs_at = _moved("rhs", rhs_at, lhs_at, axes.rhs_remaining, axes.rhs_to_lhs)
    return lhs_at, rhs_at


def _into_this(tensor: "Tensor", q: QTensor) -> QTensor:
    if tensor.dequantized_at is not DequantMode.THIS_INPUT:
        return q
    return QTensor(q.dequant(), None, q.dequant_dtype)


def _into_other(tensor: "Tensor", q: QTensor) -> bool:
    return tensor.dequantized_at is DequantMode.OTHER_INPUT and q.scale is not None


def _moved(
    side: str,
    q: QTensor,
    other: QTensor,
    remaining: Axes,
    to_other: Callable[[jax.Array], jax.Array],
) -> tuple[QTensor, QTensor]:
    scale = q.scale
    if scale is None or q.bias is not None or any(scale.shape[a] != 1 for a in remaining):
        raise ValueError(
            f"the scale of `{side}` is to be multiplied into the other side, and has a bias or "
            f"varies along the remaining axes {remaining}: share it along those, or use "
            f"`DequantMode.THIS_INPUT`"
        )
    scaled = (other.qvalue * to_other(scale)).astype(other.dequant_dtype)
    return (
        QTensor(q.qvalue, None, q.dequant_dtype),
        QTensor(scaled, other.scale, other.dequant_dtype, other.bias),
    )


def _zero_points_corrected(
    raw: "DotGeneralRaw", out: jax.Array, lhs: QTensor, rhs: QTensor, axes: DotAxes, count: int
) -> tuple[jax.Array, QTensor, QTensor]:
    """The integer sum without what zero points added to it, and operands without those biases."""
    lhs_zero = _zero_point("lhs", raw.lhs, lhs, axes.lhs_contracting)
    rhs_zero = _zero_point("rhs", raw.rhs, rhs, axes.rhs_contracting)
    if rhs_zero is not None:
        total = jnp.sum(lhs.qvalue, axis=axes.lhs_contracting, keepdims=True, dtype=out.dtype)
        out = out - axes.lhs_to_output(total) * axes.rhs_to_output(rhs_zero)
        rhs = dataclasses.replace(rhs, bias=None)
    if lhs_zero is not None:
        total = jnp.sum(rhs.qvalue, axis=axes.rhs_contracting, keepdims=True, dtype=out.dtype)
        out = out - axes.lhs_to_output(lhs_zero) * axes.rhs_to_output(total)
        lhs = dataclasses.replace(lhs, bias=None)
    if lhs_zero is not None and rhs_zero is not None:
        out = out + axes.lhs_to_output(lhs_zero) * axes.rhs_to_output(rhs_zero) * count
    return out, lhs, rhs


def _zero_point(side: str, tensor: "Tensor", q: QTensor, contracting: Axes) -> jax.Array | None:
    if q.bias is None or q.scale is None or not tensor.calibration.has_zero_point:
        return None
    require_shared(side, q.bias, contracting)
    return jnp.round(q.bias / q.scale).astype(jnp.int32)


def _biases_corrected(
    out: jax.Array, lhs: QTensor, rhs: QTensor, axes: DotAxes, count: int
) -> jax.Array:
    lhs_bias = _bias("lhs", lhs, axes.lhs_contracting, axes.lhs_to_output)
    rhs_bias = _bias("rhs", rhs, axes.rhs_contracting, axes.rhs_to_output)
    if rhs_bias is not None:
        out = out - axes.lhs_to_output(_total(lhs, axes.lhs_contracting, out.dtype)) * rhs_bias
    if lhs_bias is not None:
        out = out - lhs_bias * axes.rhs_to_output(_total(rhs, axes.rhs_contracting, out.dtype))
    if lhs_bias is not None and rhs_bias is not None:
        out = out + lhs_bias * rhs_bias * count
    return out


def _bias(
    side: str, q: QTensor, contracting: Axes, to_output: Callable[[jax.Array], jax.Array]
) -> jax.Array | None:
    if q.bias is None:
        return None
    require_shared(side, q.bias, contracting)
    return to_output(q.bias)


def _total(q: QTensor, contracting: Axes, dtype: np.dtype) -> jax.Array:
    """sum(q) * s over the contracted axes, which are kept with size 1."""
    integers = jnp.issubdtype(q.qvalue.dtype, jnp.integer)
    total = jnp.sum(
        q.qvalue, axis=contracting, keepdims=True, dtype=jnp.int32 if integers else dtype
    ).astype(dtype)
    return total if q.scale is None else total * q.scale
