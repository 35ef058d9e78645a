"""What surrounds a sum of products of quantized values: dtypes before it, scales after it.

It is the formula of `aqt_engine.ops.contraction`, for sums over windows and over ragged groups,
whose scales and totals reach the output by ways of their own.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from aqt_engine.modes import DequantMode
from aqt_engine.qtensor import QTensor

if TYPE_CHECKING:
    from aqt_engine.config import DotGeneralRaw, Tensor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one side of a sum adds to its result, everything laid out over the output.

    `total` gives the sum of the side's own quantized values over what each output sums. `whole`
    says that the bias is a whole number of scales.
    """

    scale: jax.Array | None
    bias: jax.Array | None
    total: Callable[[], jax.Array]
    whole: bool


def operands(
    raw: "DotGeneralRaw", lhs: QTensor, rhs: QTensor
) -> tuple["DotGeneralRaw", QTensor, QTensor]:
    """The operands in the dtype that they are multiplied in, and `raw` with its accumulator.

    Raises:
      ValueError: a scale is to be multiplied into the other operand.
    """
    lhs, rhs = _dequantized_before(raw.lhs, lhs), _dequantized_before(raw.rhs, rhs)
    dtype = raw.dg_in_dtype
    if dtype is None and lhs.qvalue.dtype != rhs.qvalue.dtype:
        dtype = jnp.promote_types(lhs.dequant_dtype, rhs.dequant_dtype)
    if dtype is not None:
        lhs = dataclasses.replace(lhs, qvalue=lhs.qvalue.astype(dtype))
        rhs = dataclasses.replace(rhs, qvalue=rhs.qvalue.astype(dtype))
    if raw.dg_accumulator_dtype is None and jnp.issubdtype(lhs.qvalue.dtype, jnp.integer):
        # Left to itself, XLA sums integers in their own dtype, which wraps.
        raw = dataclasses.replace(raw, dg_accumulator_dtype=jnp.int32)
    return raw, lhs, rhs


def rescaled(
    out: jax.Array, lhs: Side, rhs: Side, count: Callable[[], jax.Array | int], dtype: np.dtype
) -> jax.Array:
    """The sum in `dtype`, times the left scale, then the right, without what biases added.

    `count` gives how many products each output sums.
    """
    lhs_bias, rhs_bias = lhs.bias, rhs.bias
    if jnp.issubdtype(out.dtype, jnp.integer):
        lhs_zero, rhs_zero = _zero_point(lhs), _zero_point(rhs)
        if rhs_zero is not None:
            out, rhs_bias = out - lhs.total() * rhs_zero, None
        if lhs_zero is not None:
            out, lhs_bias = out - lhs_zero * rhs.total(), None
        if lhs_zero is not None and rhs_zero is not None:
            out = out + lhs_zero * rhs_zero * count()
    out = out.astype(dtype)
    for side in (lhs, rhs):
        if side.scale is not None:
            out = out * side.scale
    if rhs_bias is not None:
        out = out - _scaled_total(lhs, dtype) * rhs_bias
    if lhs_bias is not None:
        out = out - lhs_bias * _scaled_total(rhs, dtype)
    if lhs_bias is not None and rhs_bias is not None:
        out = out + lhs_bias * rhs_bias * jnp.asarray(count(), dtype)
    return out


def _dequantized_before(tensor: "Tensor", q: QTensor) -> QTensor:
    match tensor.dequantized_at:
        case DequantMode.OUTPUT:
            return q
        case DequantMode.THIS_INPUT:
            return QTensor(q.dequant(), None, q.dequant_dtype)
        case DequantMode.OTHER_INPUT:
            if q.scale is None:
                return q
            raise ValueError(
                "`DequantMode.OTHER_INPUT` multiplies a scale into the other operand, which only "
                "`dot_general` and `einsum` can do: use `DequantMode.OUTPUT` or THIS_INPUT"
            )


def _zero_point(side: Side) -> jax.Array | None:
    if side.bias is None or side.scale is None or not side.whole:
        return None
    return jnp.round(side.bias / side.scale).astype(jnp.int32)


def _scaled_total(side: Side, dtype: np.dtype) -> jax.Array:
    total = side.total().astype(dtype)
    return total if side.scale is None else total * side.scale
