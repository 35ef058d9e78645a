"""GPTQ: weights rounded one after the other, each making up for the errors of those before.

Frantar et al., arXiv:2210.17323. With inputs X of calibration and H = X^T X, the weights that are
summed over are rounded in order; the error of one is spread over those that are still to come, as
the Cholesky factor of the inverse of H says is best for |X W - X Q|^2.

What comes out are float parameters, which quantized by the unchanged configuration give GPTQ's
integers: each is its integer times the scale. The scale itself is calibrated from the parameters,
by their largest magnitude. So the value that has it stays as it is, in the last bucket, where
rounding to nearest puts it too, and the scale stays what it was. Training, conversion and serving
know nothing of all this, and agree in every bit as ever.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_engine.bundle import Arrays
from aqt_engine.calibration import ConstantCalibration
from aqt_engine.config import Tensor
from aqt_engine.convertible import ModelFactory
from aqt_engine.ptq.weights import Variables, Weight, Weights, replaced
from aqt_engine.qtensor import QTensor, Scale


class GptqError(ValueError):
    """A weight cannot be rounded by GPTQ; the message says which, and why."""


def gptq(
    model: ModelFactory,
    variables: Variables,
    batches: Sequence[Arrays],
    *,
    damping: float = 0.01,
    act_order: bool = False,
    block_size: int = 128,
) -> dict[str, Any]:
    """`variables` with the parameters that GPTQ rounds each quantized weight to.

    Weights are those parameters that the model contracts, in a dense layer, an einsum or a
    convolution, and stores quantized in CONVERT; others stay as they are. Each is rounded for the
    inputs that it gets when all before it have been rounded, so `batches` are run once for each.

    Args:
      model: gives the linen module for a mode, as `aqt_engine.convert.convert` takes it.
      variables: what was trained. Static activations are calibrated beforehand.
      batches: typical inputs by the names of the module's arguments, each of shape (rows, ...).
      damping: this part of the mean of H's diagonal is added to the diagonal.
      act_order: rounds inputs of large second moment first, rather than in their order.
      block_size: after so many, what is still to come is corrected; changes speed only.

    Raises:
      GptqError: there are no batches or no weights; a weight is contracted in two ways; or its
        calibration takes another scale for its rounded values, or cannot tell them.
    """
    if not batches:
        raise GptqError("`batches` is empty: give typical inputs, some hundred rows of them")
    weights = Weights(model, variables, batches[0])
    shared: dict[tuple[str, ...], list[Weight]] = {}
    for weight in weights:
        shared.setdefault(weight.parameter, []).append(weight)
    if not shared:
        raise GptqError(
            "the model contracts no parameter that is stored in QuantMode.CONVERT: pass the mode "
            "that the factory is given to the side of each contraction that is the weight"
        )
    tiled = ["/".join(weight.parameter) for weight in weights if weight.tiled]
    if tiled:
        raise GptqError(
            f"{', '.join(tiled)} is quantized in tiles by `tiling`, which GPTQ does not know: tile "
            f"a contracted axis with `LocalAqt`, or round it to nearest"
        )
    rounded = dict(variables)
    for sites in shared.values():
        first = sites[0]
        operand, hessian = _observed(weights, rounded, batches, sites)
        new = _rounded(first, operand, hessian, damping, act_order, block_size)
        back = jax.jit(functools.partial(weights.back, weight=first))
        parameter = back(rounded, dict(batches[0]), operand=new)
        rounded = replaced(rounded, first.parameter, parameter)
    return rounded


def _observed(
    weights: Weights, variables: Variables, batches: Sequence[Arrays], sites: Sequence[Weight]
) -> tuple[jax.Array, np.ndarray[Any, Any]]:
    """The weight, and the sum over all inputs of X^T X, (B, K, K)."""
    form = sites[0].form
    _require_one_way(sites, all((w.form, w.tensor) == (form, sites[0].tensor) for w in sites))

    def moments(weight: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = form.inputs(other.astype(jnp.float32))
        return weight, jnp.einsum("bmk,bml->bkl", x, x, precision=jax.lax.Precision.HIGHEST)

    @jax.jit
    def observe(variables: Variables, inputs: Arrays) -> tuple[list[jax.Array], jax.Array]:
        looked = weights.look(variables, inputs, [(site, moments) for site in sites])
        return [w for w, _ in looked], functools.reduce(jnp.add, [h for _, h in looked])

    (operand, *others), first = observe(variables, dict(batches[0]))
    _require_one_way(sites, all(bool(jnp.array_equal(operand, other)) for other in others))
    hessian = np.asarray(first, np.float64)
    for batch in batches[1:]:
        hessian = hessian + np.asarray(observe(variables, dict(batch))[1], np.float64)
    return operand, hessian


def _require_one_way(sites: Sequence[Weight], same: bool) -> None:
    if not same:
        raise GptqError(
            f"{'/'.join(sites[0].parameter)} is contracted in several ways, and cannot be rounded "
            f"for all of them: give each contraction a parameter of its own"
        )


def _rounded(
    weight: Weight,
    operand: jax.Array,
    hessian: np.ndarray[Any, Any],
    damping: float,
    act_order: bool,
    block_size: int,
) -> jax.Array:
    """The operand whose values are GPTQ's integers times their scales."""
    nearest = weight.quantize(operand)
    form, tensor = weight.form, weight.tensor

    def as_matrix(part: jax.Array | None) -> jax.Array | None:
        # With `local_aqt` a stored tensor has its shards in an axis of their own.
        if part is None:
            return None
        return form.matrix(jnp.broadcast_to(part, nearest.shape).reshape(operand.shape))

    scale, bias = as_matrix(nearest.scale), as_matrix(nearest.bias)
    assert scale is not None
    pinned = form.matrix(_pinned(tensor, operand, nearest))
    matrix = form.matrix(operand)
    order = _orders(hessian, act_order)
    factor = np.stack([_factor(h[o][:, o], damping) for h, o in zip(hessian, order, strict=True)])

    def ordered(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else jnp.take_along_axis(x, order[..., None], axis=1)

    sweep = jax.vmap(functools.partial(_sweep, tensor, min(block_size, matrix.shape[1])))
    found = jax.jit(sweep)(
        ordered(matrix),
        jnp.asarray(factor, jnp.float32),
        ordered(scale),
        ordered(bias),
        ordered(pinned),
    )
    unordered = jnp.take_along_axis(found, np.argsort(order, axis=1)[..., None], axis=1)
    wanted = form.weight(unordered).reshape(nearest.shape)
    values = QTensor(wanted, nearest.scale, nearest.dequant_dtype, nearest.bias).dequant()
    kept = _pinned(tensor, operand, nearest)
    new = jnp.where(kept, operand, values.reshape(operand.shape))
    _require_same(weight, weight.quantize(new), wanted, nearest)
    return new


def _pinned(tensor: Tensor, operand: jax.Array, nearest: QTensor) -> jax.Array:
    """Where the values stand that the scale, and a zero point, are calibrated from."""
    assert nearest.scale is not None
    axes = tuple(a for a, size in enumerate(nearest.scale.shape) if size == 1)
    x = operand.reshape(nearest.shape)
    low, high = (f(x, axis=axes, keepdims=True) for f in (jnp.min, jnp.max))
    extremes = (x == low) | (x == high)
    if isinstance(tensor.calibration, ConstantCalibration):
        extremes = jnp.zeros_like(extremes)
    elif not tensor.calibration.has_zero_point:
        extremes &= jnp.abs(x) == jnp.maximum(jnp.abs(low), jnp.abs(high))
    return extremes.reshape(operand.shape)


def _orders(hessian: np.ndarray[Any, Any], act_order: bool) -> np.ndarray[Any, Any]:
    diagonals = np.diagonal(hessian, axis1=1, axis2=2)
    if act_order:
        return np.argsort(-diagonals, axis=1, kind="stable")
    return np.broadcast_to(np.arange(hessian.shape[1]), diagonals.shape)


def _factor(hessian: np.ndarray[Any, Any], damping: float) -> np.ndarray[Any, Any]:
    """The upper Cholesky factor of the inverse of the damped H."""
    diagonal = np.diagonal(hessian)
    # Inputs that were never seen are rounded to nearest, and disturb nothing.
    own = np.where(diagonal == 0, 1, damping * diagonal.mean())
    inverse = np.linalg.inv(hessian + np.diag(own))
    return np.linalg.cholesky((inverse + inverse.T) / 2).T


def _sweep(
    tensor: Tensor,
    block: int,
    matrix: jax.Array,
    factor: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    pinned: jax.Array,
) -> jax.Array:
    """The buckets of (K, N) weights, rounded row after row."""
    rows, columns = matrix.shape
    padding = -rows % block
    quantizer = tensor.quantizer(None)

    def padded(x: jax.Array, value: float) -> jax.Array:
        return jnp.pad(x, ((0, padding), (0, 0)), constant_values=value)

    original, scales = padded(matrix, 0), padded(scale, 1)
    biases = None if bias is None else padded(bias, 0)
    pins = padded(pinned, False)
    upper = jnp.pad(factor, ((0, padding), (0, padding)))
    upper = upper + jnp.diag((jnp.arange(rows + padding) >= rows).astype(upper.dtype))
    places = jnp.arange(rows + padding)

    def round_row(i: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jnp.where(pins[i], original[i], row.astype(original.dtype))
        q = quantizer.quant_with(Scale(scales[i], None if biases is None else biases[i]), x)[0]
        return q.qvalue, q.dequant().astype(jnp.float32)

    def round_block(b: jax.Array, state: tuple[jax.Array, jax.Array]):
        left, buckets = state
        start = b * block
        factors = jax.lax.dynamic_slice_in_dim(upper, start, block)

        def step(i: jax.Array, inner: tuple[jax.Array, jax.Array, jax.Array]):
            mine, errors, found = inner
            own = jax.lax.dynamic_slice_in_dim(factors[i], start, block)
            bucket, value = round_row(start + i, mine[i])
            error = (mine[i] - value) / own[i]
            mine = mine - own[:, None] * error
            return mine, errors.at[i].set(error), found.at[i].set(bucket)

        mine = jax.lax.dynamic_slice_in_dim(left, start, block)
        empty = jnp.zeros((block, columns), buckets.dtype)
        _, errors, found = jax.lax.fori_loop(0, block, step, (mine, jnp.zeros_like(mine), empty))
        later = jnp.where(places >= start + block, factors, 0)
        left = left - jnp.matmul(later.T, errors, precision=jax.lax.Precision.HIGHEST)
        return left, jax.lax.dynamic_update_slice_in_dim(buckets, found, start, 0)

    kind = jax.eval_shape(round_row, jnp.int32(0), original[0])[0].dtype
    state = (original.astype(jnp.float32), jnp.zeros(original.shape, kind))
    return jax.lax.fori_loop(0, (rows + padding) // block, round_block, state)[1][:rows]


def _require_same(weight: Weight, found: QTensor, wanted: jax.Array, nearest: QTensor) -> None:
    """Refuses values which, quantized as ever, give other integers or another scale."""
    pairs = [(found.qvalue, wanted), (found.scale, nearest.scale), (found.bias, nearest.bias)]
    same = [a is None or bool(jnp.all(a == b)) for a, b in pairs]
    if not all(same[1:]):
        raise GptqError(
            f"{'/'.join(weight.parameter)} has {type(weight.tensor.calibration).__name__}, whose "
            f"scale is not that of the largest magnitude, and would be another for the rounded "
            f"weight: calibrate it with AbsMaxCalibration or ConstantCalibration"
        )
    if not same[0]:
        raise GptqError(
            f"{'/'.join(weight.parameter)} is quantized in {found.dtype}, which cannot tell the "
            f"values of its buckets apart: round it in float32, or to fewer bits"
        )
