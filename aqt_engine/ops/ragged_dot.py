"""Quantized `ragged_dot`: rows in groups, each group with a matrix of its own.

The experts of a mixture are such groups: of the rows of `lhs`, sorted by group, the first
`group_sizes[0]` are multiplied by `rhs[0]`, the next by `rhs[1]`, and so on. A row on the left has
one scale, and a column of a group's matrix on the right has one:

    out[i] = float(sum(q_lhs[i] * q_rhs[group of i])) * s_lhs[i] * s_rhs[group of i]

with the sum in int32. Backward, `dlhs` sums over the columns of the output, with a scale for a row
of the gradient and for a row of a group's matrix; `drhs` sums over the rows of each group, with
scales for a group's own columns on both sides. Gradients pass straight through the rounding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.custom_batching
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from aqt_engine.context import Context
from aqt_engine.ops.axes import Axes
from aqt_engine.ops.contraction import accumulator_limit, check_accumulator, split_key
from aqt_engine.ops.operand import (
    Given,
    Key,
    Operand,
    as_forward_quantized,
    quantize,
    quantize_forward,
    refuse_gradient,
    require_float,
    require_shared,
    require_taken_out,
)
from aqt_engine.ops.rescaling import Side, operands, rescaled
from aqt_engine.qtensor import QTensor, Scale
from aqt_engine.quantizer import Gradient

if TYPE_CHECKING:
    from aqt_engine.config import DotGeneral, DotGeneralRaw, Tensor


def ragged_dot(
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    config: "DotGeneral",
    context: Context = Context(),
    lhs_scale: Scale | None = None,
    rhs_scale: Scale | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot`, quantized by `config`: (m, k) and (g, k, n) to (m, n).

    `group_sizes` are g integers. Rows beyond their sum give zeros and receive zero gradients, and
    so does the matrix of an empty group. A side that is a `QTensor` already, or has a scale given,
    is taken as in `aqt_engine.ops.dot_general`. In `drhs`, a calibration sees each group with zeros
    in the place of the rows of others. `precision` applies to float sums only. The result has the
    dtype of `lhs`, or `preferred_element_type` where that is given.

    Bits: as in `dot_general`, and a row does not depend on the groups of others, for configurations
    that multiply integers without a bias. In float, XLA:CPU multiplies each row by every group's
    matrix with zeros in place of the row, so that one that is not finite spoils all rows there.

    Raises:
      TypeError: an operand is not float, or `group_sizes` are not integers.
      ValueError: shapes do not fit; a scale varies along what is summed, an int32 sum could
        overflow, noise is drawn without a key, or `local_aqt` or `DequantMode.OTHER_INPUT` is
        configured.
    """
    require_float(lhs, rhs)
    if any(c.local_aqt is not None for c in (config.fwd, config.dlhs, config.drhs)):
        raise ValueError("`local_aqt` splits a contracted axis, and a ragged sum splits none")
    group_sizes = jnp.asarray(group_sizes)
    _check_shapes(lhs, rhs, group_sizes)
    precision = lax.Precision.DEFAULT if precision is None else precision
    stored = isinstance(lhs, QTensor) or isinstance(rhs, QTensor)
    contraction = _ragged_dot_stored if stored else _ragged_dot
    given = Given(context.key, lhs_scale, rhs_scale)
    out = cast(jax.Array, contraction(config, precision, lhs, rhs, group_sizes, given))
    return out.astype(lhs.dtype if preferred_element_type is None else preferred_element_type)


def quantize_rhs(x: jax.Array, *, config: "DotGeneral") -> QTensor:
    """`x` as the forward pass quantizes its right side: what is stored."""
    return quantize_forward(config.fwd.rhs, x, (1,), (0,), None)[0]


def _check_shapes(lhs: Operand, rhs: Operand, group_sizes: jax.Array) -> None:
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"`group_sizes` must be integers, got dtype {group_sizes.dtype}")
    if lhs.ndim != 2 or rhs.ndim != 3 or group_sizes.ndim != 1:
        raise ValueError(
            f"`lhs` must be of shape (m, k), `rhs` (g, k, n) and `group_sizes` (g,), got "
            f"{lhs.shape}, {rhs.shape} and {group_sizes.shape}"
        )
    if lhs.shape[1] != rhs.shape[1] or rhs.shape[0] != group_sizes.shape[0]:
        raise ValueError(
            f"`lhs` {lhs.shape}, `rhs` {rhs.shape} and `group_sizes` {group_sizes.shape} do not "
            f"agree in their numbers of columns or of groups: shapes must be (m, k), (g, k, n), "
            f"(g,)"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Groups:
    """Which group each row is in. `rows` has the last group for rows that are in none."""

    sizes: jax.Array
    rows: jax.Array
    is_in_one: jax.Array

    @staticmethod
    def of(sizes: jax.Array, row_count: int) -> "_Groups":
        ends = jnp.cumsum(sizes)
        rows = jnp.searchsorted(ends, jnp.arange(row_count), side="right")
        last = sizes.shape[0] - 1
        return _Groups(sizes, jnp.minimum(rows, last), rows[:, None] <= last)

    def by_row(self, per_group: jax.Array, summed: int) -> jax.Array:
        """(g, 1, n) or (g, n, 1), as axis `summed` has the 1, to (m, n); a 1 for g stays 1."""
        kept = jnp.squeeze(per_group, summed)
        return kept if kept.shape[0] == 1 else kept[self.rows]

    def row_by_row(self, scale: jax.Array) -> jax.Array:
        """A scale of `apart`, (g, m, n) with any of them 1, to that of each row: (m, n)."""
        count, rows = scale.shape[:2]
        group = self.rows if count > 1 else 0
        row = jnp.arange(self.rows.shape[0]) if rows > 1 else 0
        return jnp.atleast_2d(scale[group, row])

    def apart(self, x: jax.Array) -> jax.Array:
        """(m, n) to (g, m, n), with zeros in the place of rows of other groups."""
        groups = jnp.arange(self.sizes.shape[0])[:, None, None]
        return jnp.where((groups == self.rows[:, None]) & self.is_in_one, x, 0)

    def between(self, start: int, stop: int) -> jax.Array:
        """The sizes of the groups within these rows."""
        ends = jnp.clip(jnp.cumsum(self.sizes), start, stop)
        return jnp.diff(ends, prepend=start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ragged_dot_stored(
    config: "DotGeneral",
    precision: lax.PrecisionLike,
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    given: Given,
) -> jax.Array:
    return _forward(config, precision, lhs, rhs, group_sizes, given)[0]


def _stored_fwd(*args: Any) -> tuple[jax.Array, None]:
    return _ragged_dot_stored(*args), None


_ragged_dot_stored.defvjp(_stored_fwd, refuse_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ragged_dot(
    config: "DotGeneral",
    precision: lax.PrecisionLike,
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    given: Given,
) -> jax.Array:
    return _forward(config, precision, lhs, rhs, group_sizes, given)[0]


# What the backward contraction for the *other* side needs of an operand, and its own gradient.
_Residual = tuple[Operand, Gradient | None]


def _forward(
    config: "DotGeneral",
    precision: lax.PrecisionLike,
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    given: Given,
) -> tuple[jax.Array, tuple[_Residual, _Residual, jax.Array, Key, Key]]:
    fwd_key, dlhs_key, drhs_key = split_key(given.key, 3)
    lhs_key, rhs_key = split_key(fwd_key, 2)
    groups = _Groups.of(group_sizes, lhs.shape[0])
    lhs_q, lhs_gradient = _forward_quantized(config.fwd.lhs, lhs, (), lhs_key, given.lhs_scale)
    rhs_q, rhs_gradient = _forward_quantized(config.fwd.rhs, rhs, (0,), rhs_key, given.rhs_scale)
    out = _sum_by_row(config.fwd, lhs_q, rhs_q, 1, groups, precision)
    lhs_kept = lhs_q if config.drhs.rhs.use_fwd_quant else lhs
    rhs_kept = rhs_q if config.dlhs.rhs.use_fwd_quant else rhs
    return out.astype(lhs.dtype), (
        (lhs_kept, lhs_gradient),
        (rhs_kept, rhs_gradient),
        group_sizes,
        dlhs_key,
        drhs_key,
    )


def _backward(
    config: "DotGeneral",
    precision: lax.PrecisionLike,
    residuals: tuple[_Residual, _Residual, jax.Array, Key, Key],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, None, None]:
    (lhs, lhs_gradient), (rhs, rhs_gradient), group_sizes, dlhs_key, drhs_key = residuals
    assert lhs_gradient is not None
    assert rhs_gradient is not None
    groups = _Groups.of(group_sizes, g.shape[0])
    g_key, rhs_key = split_key(dlhs_key, 2)
    g_scaled, other = as_forward_quantized(g, rhs, (1,), functools.partial(groups.by_row, summed=1))
    g_q, _ = quantize(config.dlhs.lhs, g_scaled, (1,), (), g_key)
    rhs_q, _ = quantize(config.dlhs.rhs, other, (2,), (0,), rhs_key)
    dlhs = _sum_by_row(config.dlhs, g_q, rhs_q, 2, groups, precision)
    g_scaled, other = as_forward_quantized(g, lhs, (1,), lambda scale: scale)
    drhs = _sum_by_group(config.drhs, g_scaled, other, groups, precision, drhs_key)
    return (
        lhs_gradient(dlhs).astype(lhs.dtype),
        rhs_gradient(drhs).astype(rhs.dtype),
        None,
        None,
    )


_ragged_dot.defvjp(_forward, _backward)


def _sum_by_row(
    raw: "DotGeneralRaw",
    lhs: QTensor,
    rhs: QTensor,
    summed: int,
    groups: _Groups,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """(m, k) with (g, k, n), or (g, n, k) where `summed` is 2: (m, n), in the promoted dtype."""
    raw, lhs, rhs = operands(raw, lhs, rhs)
    require_taken_out("lhs", lhs, (1,))
    require_taken_out("rhs", rhs, (summed,))
    count = lhs.shape[1]
    check_accumulator(raw, count)
    numbers = lax.RaggedDotDimensionNumbers((((1,), (summed,)), ((), ())), [0], [0])
    product = _ragged_product(numbers, precision, raw.dg_accumulator_dtype)
    out = product(lhs.qvalue, rhs.qvalue, groups.sizes)

    def by_row(per_group: jax.Array | None) -> jax.Array | None:
        return None if per_group is None else groups.by_row(per_group, summed)

    def total(values: jax.Array, axis: int) -> jax.Array:
        return jnp.sum(values, axis, keepdims=True, dtype=out.dtype)

    out = rescaled(
        out,
        Side(
            scale=lhs.scale,
            bias=lhs.bias,
            total=lambda: total(lhs.qvalue, 1),
            whole=raw.lhs.calibration.has_zero_point,
        ),
        Side(
            scale=by_row(rhs.scale),
            bias=by_row(rhs.bias),
            total=lambda: groups.by_row(total(rhs.qvalue, summed), summed),
            whole=raw.rhs.calibration.has_zero_point,
        ),
        lambda: count,
        jnp.promote_types(lhs.dequant_dtype, rhs.dequant_dtype),
    )
    return jnp.where(groups.is_in_one, out, 0)


def _sum_by_group(
    raw: "DotGeneralRaw",
    g: jax.Array,
    lhs: jax.Array,
    groups: _Groups,
    precision: lax.PrecisionLike,
    key: Key,
) -> jax.Array:
    """The gradient (m, n) under the left operand (m, k): (g, k, n), in the promoted dtype.

    Where the accumulator could overflow, it is a float sum over parts of the rows.
    """
    g_key, lhs_key = split_key(key, 2)
    left, left_by_group = _quantized_by_group(raw.lhs, g, groups, g_key)
    right, right_by_group = _quantized_by_group(raw.rhs, lhs, groups, lhs_key)
    raw, left, right = operands(raw, left, right)
    left_scale, left_bias = _taken_out("lhs", left, left_by_group)
    right_scale, right_bias = _taken_out("rhs", right, right_by_group)
    limit = accumulator_limit(raw)
    rows = g.shape[0]
    size = max(1, rows if limit is None else min(rows, limit))
    numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    product = _ragged_product(numbers, precision, raw.dg_accumulator_dtype)

    def part(start: int) -> jax.Array:
        stop = min(start + size, rows)
        left_rows, right_rows = left.qvalue[start:stop], right.qvalue[start:stop]
        sizes = groups.between(start, stop)

        def total(x: jax.Array) -> jax.Array:
            return product(x, jnp.ones((x.shape[0], 1), x.dtype), sizes)

        return rescaled(
            product(left_rows, right_rows, sizes),
            Side(
                scale=_swapped(left_scale),
                bias=_swapped(left_bias),
                total=lambda: total(left_rows),
                whole=raw.lhs.calibration.has_zero_point,
            ),
            Side(
                scale=right_scale,
                bias=right_bias,
                total=lambda: jnp.swapaxes(total(right_rows), 1, 2),
                whole=raw.rhs.calibration.has_zero_point,
            ),
            lambda: sizes[:, None, None],
            jnp.promote_types(left.dequant_dtype, right.dequant_dtype),
        )

    out = sum((part(start) for start in range(size, rows, size)), start=part(0))
    return jnp.swapaxes(out, 1, 2)


def _ragged_product(
    numbers: lax.RaggedDotDimensionNumbers,
    precision: lax.PrecisionLike,
    dtype: DTypeLike | None,
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    # JAX maps a ragged sum over a batch in a few cases only; one after the other does in all.
    @jax.custom_batching.sequential_vmap
    def product(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
        return lax.ragged_dot_general(
            lhs, rhs, sizes, numbers, precision=precision, preferred_element_type=dtype
        )

    return product


def _forward_quantized(
    tensor: "Tensor", x: Operand, batch: Axes, key: Key, scale: Scale | None
) -> tuple[QTensor, Gradient | None]:
    """An operand that is summed over its axis 1; what is a `QTensor` already has no gradient."""
    if isinstance(x, QTensor):
        return x, None
    return quantize_forward(tensor, x, (1,), batch, key, scale)


def _quantized_by_group(
    tensor: "Tensor", x: jax.Array, groups: _Groups, key: Key
) -> tuple[QTensor, Scale | None]:
    """Rows (m, n), each quantized by the scale of its group, and those scales: (g, 1, n)."""
    quantizer = tensor.quantizer(key)
    if not tensor.is_quantized:
        return quantizer.quant(x)[0], None
    apart = groups.apart(x)
    scale = quantizer.calibrate(apart, tensor.shared_by(apart.ndim, (1,), (0,)))
    return quantizer.quant_with(jax.tree.map(groups.row_by_row, scale), x)[0], scale


def _taken_out(
    side: str, q: QTensor, by_group: Scale | None
) -> tuple[jax.Array | None, jax.Array | None]:
    """The scale and bias that a sum over the rows of a group leaves out of it."""
    if by_group is None or q.scale is None:
        return None, None
    require_shared(side, by_group.scale, (1,))
    return by_group.scale, by_group.bias


def _swapped(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else jnp.swapaxes(x, 1, 2)
