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
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from aqt_engine.context import Context
from aqt_engine.ops.axes import Axes, DimensionNumbers, DotAxes
from aqt_engine.ops.contraction import contract, split_key
from aqt_engine.ops.operand import (
    Given,
    Key,
    Operand,
    as_forward_quantized,
    quantize,
    quantize_apart,
    quantize_forward,
    refuse_gradient,
    require_float,
)
from aqt_engine.qtensor import QTensor, Scale
from aqt_engine.quantizer import Gradient

if TYPE_CHECKING:
    from aqt_engine.config import DotGeneral, DotGeneralRaw


def dot_general(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    config: "DotGeneral",
    context: Context = Context(),
    lhs_scale: Scale | None = None,
    rhs_scale: Scale | None = None,
    tiled: bool = False,
) -> jax.Array:
    """`jax.lax.dot_general`, quantized by `config`: batch, left and right remaining axes in order.

    A side that is a `QTensor` already is contracted as it stands, and then nothing here can be
    differentiated. A side with a scale given is quantized with that, and not calibrated; no
    gradient flows into it. `precision` applies to float contractions only: integer sums are exact.
    The result has the dtype of `lhs`, or `preferred_element_type` where that is given.

    `tiled` is for `aqt_engine.ops.tiled`, which sums the result over tiles.

    With `config.fwd.local_aqt`, a `QTensor` or a given scale has the shards as an axis of its own,
    in front of the contracted axis that is sharded.

    A value that is not finite makes NaN of all that share its scale, and so of every output that
    sums one of those. A group of zeros gives zeros, and so does a sum of no values. An integer sum
    becomes a float of the operands' dtype before it is scaled: in float16, as in AQT, one beyond
    65504 becomes infinite, so prefer bfloat16 or float32.

    Bits: every value is the same eager, jitted, and in any batch, for configurations that contract
    integers without a bias.

    Raises:
      TypeError: an operand is not float.
      ValueError: sizes do not fit, a scale varies along a contracted axis, an int32 sum could
        overflow, or noise is drawn without a key.
    """
    require_float(lhs, rhs)
    sharded = config.fwd.local_aqt is not None
    axes = DotAxes.parse(
        dimension_numbers,
        lhs.ndim - (sharded and isinstance(lhs, QTensor)),
        rhs.ndim - (sharded and isinstance(rhs, QTensor)),
    )
    lhs, rhs, axes = _shard_contraction(config.fwd, lhs, rhs, axes)
    axes.require_fit(lhs.shape, rhs.shape)
    precision = lax.Precision.DEFAULT if precision is None else precision
    stored = isinstance(lhs, QTensor) or isinstance(rhs, QTensor)
    contraction = _contract_stored if stored else _dot_general
    given = Given(context.key, lhs_scale, rhs_scale, tiled)
    out = cast(jax.Array, contraction(config, axes, precision, lhs, rhs, given))
    if sharded:
        out = jnp.sum(out, axis=0)
    return out.astype(lhs.dtype if preferred_element_type is None else preferred_element_type)


def quantize_lhs(
    x: jax.Array,
    rhs_ndim: int,
    dimension_numbers: DimensionNumbers,
    *,
    config: "DotGeneral",
    scale: Scale | None = None,
) -> QTensor:
    """`x` as the forward pass quantizes its left side, with `scale` if given: what is stored."""
    axes = DotAxes.parse(dimension_numbers, x.ndim, rhs_ndim)
    split = _shards(config.fwd, x, axes.lhs_contracting)
    x, contracting, batch = _sharded(split, x, axes.lhs_contracting, axes.lhs_batch)
    return quantize_apart(config.fwd.lhs, x, contracting, batch, None, scale)[0]


def quantize_rhs(
    x: jax.Array,
    lhs_ndim: int,
    dimension_numbers: DimensionNumbers,
    *,
    config: "DotGeneral",
    scale: Scale | None = None,
) -> QTensor:
    """`x` as the forward pass quantizes its right side, with `scale` if given: what is stored."""
    axes = DotAxes.parse(dimension_numbers, lhs_ndim, x.ndim)
    split = _shards(config.fwd, x, axes.rhs_contracting)
    x, contracting, batch = _sharded(split, x, axes.rhs_contracting, axes.rhs_batch)
    return quantize_forward(config.fwd.rhs, x, contracting, batch, None, scale)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _contract_stored(
    config: "DotGeneral",
    axes: DotAxes,
    precision: lax.PrecisionLike,
    lhs: Operand,
    rhs: Operand,
    given: Given,
) -> jax.Array:
    raw, (left, right) = config.fwd, _quantizing(given)
    lhs_key, rhs_key = split_key(split_key(given.key, 3)[0], 2)
    if not isinstance(lhs, QTensor):
        sides = (axes.lhs_contracting, axes.lhs_batch)
        lhs = left(raw.lhs, lhs, *sides, lhs_key, given.lhs_scale)[0]
    if not isinstance(rhs, QTensor):
        sides = (axes.rhs_contracting, axes.rhs_batch)
        rhs = right(raw.rhs, rhs, *sides, rhs_key, given.rhs_scale)[0]
    return contract(raw, lhs, rhs, axes, precision).astype(lhs.dtype)


def _contract_stored_fwd(*args: Any) -> tuple[jax.Array, None]:
    return _contract_stored(*args), None


_contract_stored.defvjp(_contract_stored_fwd, refuse_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _dot_general(
    config: "DotGeneral",
    axes: DotAxes,
    precision: lax.PrecisionLike,
    lhs: jax.Array,
    rhs: jax.Array,
    given: Given,
) -> jax.Array:
    return _forward(config, axes, precision, lhs, rhs, given)[0]


def _quantizing(given: Given) -> Sequence[Callable[..., tuple[QTensor, Gradient]]]:
    """What quantizes the left side, and the right one."""
    # AQT compiles a float sum over tiles together with the scales.
    return (quantize, quantize) if given.tiled else (quantize_apart, quantize_forward)


# What the backward contraction for the *other* side needs of an operand, and its own gradient.
_Residual = tuple[jax.Array | QTensor, Gradient]


def _forward(
    config: "DotGeneral",
    axes: DotAxes,
    precision: lax.PrecisionLike,
    lhs: jax.Array,
    rhs: jax.Array,
    given: Given,
) -> tuple[jax.Array, tuple[_Residual, _Residual, Key, Key]]:
    left, right = _quantizing(given)
    fwd_key, dlhs_key, drhs_key = split_key(given.key, 3)
    lhs_key, rhs_key = split_key(fwd_key, 2)
    sides = (axes.lhs_contracting, axes.lhs_batch)
    lhs_q, lhs_gradient = left(config.fwd.lhs, lhs, *sides, lhs_key, given.lhs_scale)
    sides = (axes.rhs_contracting, axes.rhs_batch)
    rhs_q, rhs_gradient = right(config.fwd.rhs, rhs, *sides, rhs_key, given.rhs_scale)
    out = contract(config.fwd, lhs_q, rhs_q, axes, precision)
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
    residuals: tuple[_Residual, _Residual, Key, Key],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, None]:
    (lhs, lhs_gradient), (rhs, rhs_gradient), dlhs_key, drhs_key = residuals
    dlhs_axes, to_lhs = axes.dlhs()
    drhs_axes, to_rhs = axes.drhs()
    g_scaled, other = as_forward_quantized(g, rhs, axes.rhs_contracting, axes.rhs_to_output)
    dlhs = _quantize_and_contract(config.dlhs, g_scaled, other, dlhs_axes, precision, dlhs_key)
    g_scaled, other = as_forward_quantized(g, lhs, axes.lhs_contracting, axes.lhs_to_output)
    drhs = _quantize_and_contract(config.drhs, g_scaled, other, drhs_axes, precision, drhs_key)
    return (
        lhs_gradient(jnp.transpose(dlhs, to_lhs)).astype(lhs.dtype),
        rhs_gradient(jnp.transpose(drhs, to_rhs)).astype(rhs.dtype),
        None,
    )


_dot_general.defvjp(_forward, _backward)


def _quantize_and_contract(
    raw: "DotGeneralRaw",
    lhs: jax.Array,
    rhs: jax.Array,
    axes: DotAxes,
    precision: lax.PrecisionLike,
    key: Key,
) -> jax.Array:
    lhs_key, rhs_key = split_key(key, 2)
    lhs, rhs, axes = _shard_contraction(raw, lhs, rhs, axes)
    lhs_q, _ = quantize(raw.lhs, lhs, axes.lhs_contracting, axes.lhs_batch, lhs_key)
    rhs_q, _ = quantize(raw.rhs, rhs, axes.rhs_contracting, axes.rhs_batch, rhs_key)
    out = contract(raw, lhs_q, rhs_q, axes, precision).astype(
        jnp.promote_types(lhs.dtype, rhs.dtype)
    )
    return out if raw.local_aqt is None else jnp.sum(out, axis=0)


def _shard_contraction(
    raw: "DotGeneralRaw", lhs: Operand, rhs: Operand, axes: DotAxes
) -> tuple[Any, Any, DotAxes]:
    """Splits a contracted axis into shards, which become the first batch axis."""
    if raw.local_aqt is None:
        return lhs, rhs, axes
    # What is stored was split before it was quantized, and no longer says along which axis.
    whole, contracting = (lhs, axes.lhs_contracting)
    if isinstance(lhs, QTensor):
        whole, contracting = (rhs, axes.rhs_contracting)
    if isinstance(whole, QTensor):
        raise ValueError("`fwd.local_aqt` takes a stored operand on one side only, and got two")
    split = _shards(raw, whole, contracting)
    lhs, lhs_contracting, lhs_batch = _sharded(split, lhs, axes.lhs_contracting, axes.lhs_batch)
    rhs, rhs_contracting, rhs_batch = _sharded(split, rhs, axes.rhs_contracting, axes.rhs_batch)
    numbers = ((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))
    return lhs, rhs, DotAxes.parse(numbers, lhs.ndim, rhs.ndim)


def _shards(raw: "DotGeneralRaw", x: jax.Array, contracting: Axes) -> tuple[int, int] | None:
    """Which of the contracted axes is split, and into how many shards; None if none is."""
    if raw.local_aqt is None:
        return None
    if not contracting:
        raise ValueError("`local_aqt` splits a contracted axis, and this contraction has none")
    return raw.local_aqt.shards([x.shape[a] for a in contracting])


def _sharded(
    split: tuple[int, int] | None, x: Any, contracting: Axes, batch: Axes
) -> tuple[Any, Axes, Axes]:
    """An operand with its shards in an axis of their own, and its axes then."""
    if split is None:
        return x, contracting, batch
    index, count = split
    axis = contracting[index]
    if not isinstance(x, QTensor):
        x = x.reshape(*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])

    def shifted(kind: Axes) -> Axes:
        return tuple(a + (a >= axis) for a in kind)

    return x, shifted(contracting), (axis, *shifted(batch))
