"""SmoothQuant: channels in which activations are large hand some of it to the weights.

Xiao et al., arXiv:2211.10438. With one factor f for each channel that is summed over,
X W = (X / f)(f W). The division is folded into the layer that X comes from, so the model computes
what it did, and quantizes smoother activations:

    f = max|X|^alpha / max|W|^(1 - alpha)    for each channel, to the nearest power of two

A power of two changes exponents only: in float the model gives the same bits as before, and that
is checked.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aqt_engine.bundle import Arrays
from aqt_engine.convertible import ModelFactory
from aqt_engine.modes import QuantMode
from aqt_engine.ptq.weights import Inputs, Look, Variables, Weight, Weights, at, names, replaced


class SmoothingError(ValueError):
    """A model cannot be smoothed as described; the message says where, and why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Smoothing:
    """A layer, and the layers that alone read its output: the first shrinks, the others grow.

    `source` is a regular expression that must match the whole path of a module. Its parameters have
    the channels last: a normalization, a dense layer, a convolution, or
    `aqt_engine.flax.ChannelScale`, which is put where no such layer stands. `targets` are the paths
    of the layers with the weights, in which `\\1` stands for the first group of `source`:

        Smoothing(r"layer_(\\d+)/LayerNorm_0", (r"layer_\\1/query", r"layer_\\1/key"))

    Between the two nothing may stand but what scales with its input, such as a relu or a transpose.
    """

    source: str
    targets: tuple[str, ...]


def smooth(
    model: ModelFactory,
    variables: Variables,
    batches: Sequence[Arrays],
    smoothings: Sequence[Smoothing],
    *,
    alpha: float = 0.5,
) -> dict[str, Any]:
    """`variables` in which the described layers are smoothed.

    Args:
      model: gives the linen module for a mode, as `aqt_engine.convert.convert` takes it.
      variables: what was trained.
      batches: typical inputs by the names of the module's arguments, each of shape (rows, ...).
      smoothings: which layers follow which. A source that follows another is smoothed too.
      alpha: how much of the activations' unevenness goes to the weights, from 0 to 1.

    Raises:
      SmoothingError: there are no batches; a description fits no layer; or the model would compute
        something else in float, because the output of a source is read elsewhere too.
    """
    if not batches or not 0 <= alpha <= 1:
        raise SmoothingError(
            f"needs batches and an `alpha` from 0 to 1, got {len(batches)} and {alpha}"
        )
    weights = Weights(model, variables, batches[0])
    groups = [group for smoothing in smoothings for group in _groups(smoothing, weights, variables)]
    read = [weight for _, targets in groups for weight in targets]
    activations = iter(_largest(weights, variables, batches, read))
    smoothed = dict(variables)
    for source, targets in groups:
        seen = [next(activations) for _ in targets]
        factors = _factors(source, seen, alpha)
        for weight in targets:
            smoothed = _multiplied(weights, smoothed, batches[0], weight, factors)
        smoothed = _divided(smoothed, source, factors)
    _require_same(model, variables, smoothed, batches[0], smoothings)
    return smoothed


_Group = tuple[str, list[Weight]]


def _groups(smoothing: Smoothing, weights: Weights, variables: Variables) -> list[_Group]:
    """The sources that a description matches, each with the weights of its targets."""
    leaves = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    layers = dict.fromkeys("/".join(names(path)[:-1]) for path, _ in leaves)
    groups: list[_Group] = []
    for layer in layers:
        match = re.fullmatch(smoothing.source, layer)
        if match is None:
            continue
        targets: list[Weight] = []
        for template in smoothing.targets:
            path = match.expand(template)
            found = [weight for weight in weights if weight.layer == path]
            if not found:
                raise SmoothingError(
                    f"{path!r}, a target of {layer!r}, contracts no parameter that is stored in "
                    f"QuantMode.CONVERT; those that do are "
                    f"{', '.join(sorted({w.layer for w in weights})) or 'none'}"
                )
            targets += found
        groups.append((layer, targets))
    if not groups:
        raise SmoothingError(
            f"the source {smoothing.source!r} matches no layer with parameters; there are "
            f"{', '.join(layers)}"
        )
    return groups


def _largest(
    weights: Weights, variables: Variables, batches: Sequence[Arrays], read: Sequence[Weight]
) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """For each contraction the largest magnitudes by channel: of the activation, and the weight."""

    def look(form: Any) -> Look:
        def magnitudes(weight: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
            channels = form.channel_axes
            sizes = tuple(other.shape[axis] for axis in channels)
            kept = tuple(a for a in range(other.ndim) if a not in channels)
            activation = jnp.max(jnp.abs(other), axis=kept)
            # Which channel each value of the weight belongs to, whatever its layout.
            ids = jnp.arange(activation.size, dtype=jnp.int32).reshape(sizes)
            belongs = jnp.broadcast_to(form.channels(ids), weight.shape).reshape(-1)
            flat = jnp.abs(weight).astype(jnp.float32).reshape(-1)
            largest = jax.ops.segment_max(flat, belongs, activation.size)
            return activation.astype(jnp.float32), largest.reshape(sizes)

        return magnitudes

    looks = [(weight, look(weight.form)) for weight in read]

    @jax.jit
    def observe(variables: Variables, inputs: Inputs) -> list[Any]:
        return weights.look(variables, inputs, looks)

    seen = [jax.tree.map(np.asarray, observe(variables, dict(batch))) for batch in batches]
    return [
        (np.maximum.reduce([batch[i][0] for batch in seen]), seen[0][i][1])
        for i in range(len(read))
    ]


def _factors(
    source: str,
    seen: Sequence[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]],
    alpha: float,
) -> np.ndarray[Any, Any]:
    """One power of two for each channel; 1 where nothing flows."""
    shapes = {activation.shape for activation, _ in seen}
    if len(shapes) > 1:
        raise SmoothingError(
            f"the targets of {source!r} sum over channels {sorted(shapes)}: a source has one "
            f"factor for each channel, so all its targets must have the same"
        )
    activation = np.maximum.reduce([a for a, _ in seen]).astype(np.float64)
    weight = np.maximum.reduce([w for _, w in seen]).astype(np.float64)
    flows = (activation > 0) & (weight > 0)
    a, w = (np.log2(np.where(flows, x, 1)) for x in (activation, weight))
    return np.exp2(np.round(alpha * a - (1 - alpha) * w)).astype(np.float32)


def _multiplied(
    weights: Weights,
    variables: dict[str, Any],
    inputs: Inputs,
    weight: Weight,
    factors: np.ndarray[Any, Any],
) -> dict[str, Any]:
    @jax.jit
    def by_parameter(variables: Variables, inputs: Inputs) -> jax.Array:
        operand = weights.operand(variables, inputs, weight)
        by_value = jnp.broadcast_to(weight.form.channels(jnp.asarray(factors)), operand.shape)
        return weights.back(variables, inputs, weight, by_value.astype(operand.dtype))

    parameter = at(variables["params"], weight.parameter)
    grown = parameter * by_parameter(variables, dict(inputs)).astype(parameter.dtype)
    return replaced(variables, weight.parameter, grown)


def _divided(
    variables: dict[str, Any], source: str, factors: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """The parameters of the layer `source`, of which all have the channels last."""
    prefix = tuple(source.split("/")) if source else ()
    leaves = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    for keys, leaf in leaves:
        path = names(keys)
        if path[:-1] != prefix:
            continue
        if leaf.shape[leaf.ndim - factors.ndim :] != factors.shape:
            raise SmoothingError(
                f"{'/'.join(path)} has shape {leaf.shape}, and the layers that follow sum over "
                f"channels {factors.shape}: a source has its channels last"
            )
        divided = leaf / jnp.asarray(factors).astype(leaf.dtype)
        variables = replaced(variables, path, divided)
    return variables


def _require_same(
    model: ModelFactory,
    variables: Variables,
    smoothed: Variables,
    inputs: Arrays,
    smoothings: Sequence[Smoothing],
) -> None:
    """Refuses a model that, with its contractions in float, answers with other bits than before."""
    forward = jax.jit(_in_float(model(QuantMode.TRAIN)))
    before, after = (forward(v, dict(inputs)) for v in (variables, smoothed))
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    if not all(bool(jnp.array_equal(a, b, equal_nan=True)) for a, b in pairs):
        described = ", ".join(f"{s.source} -> {' '.join(s.targets)}" for s in smoothings)
        raise SmoothingError(
            f"in float the smoothed model answers something else ({described}): is the output of a "
            f"source read by another layer too, a residual perhaps, or is there something between "
            f"source and target that does not scale with its input, such as a gelu?"
        )


def _in_float(module: nn.Module) -> Callable[[Variables, Inputs], Any]:
    def without(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "configuration":
            return None
        return next_method(*args, **kwargs)

    def forward(variables: Variables, inputs: Inputs) -> Any:
        with nn.intercept_methods(without):
            return module.apply(variables, inputs, method=_call, mutable=True)[0]

    return forward


def _call(module: nn.Module, inputs: Inputs) -> Any:
    return module(**inputs)
