"""Parameters that Qwix 0.1 has quantized after training become ours.

Qwix keeps a quantized weight in the place of the parameter: values of the parameter's shape, scales
of the same rank, and a zero point if it is asymmetric. An axis in tiles has a scale for each tile.
The scale of an activation, where it is static, is a parameter beside it: `dot_general0_lhs_scale`.
Either is read as the live objects, or as the nested dict that a checkpoint gives without a target.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta

from aqt_engine.convertible import ModelFactory
from aqt_engine.migration.expected import (
    COLLECTION,
    MigrationError,
    Path,
    checked,
    marks,
    require_same,
    shapes,
)
from aqt_engine.modes import QuantMode
from aqt_engine.ptq.weights import Look, Weights
from aqt_engine.qtensor import QTensor, Scale

_STATIC = re.compile(r"(?:dot_general|einsum|conv_general_dilated)\d+_lhs_(scale|zero_point)")
_Parts = Mapping[str, Any]


def from_qwix(
    variables: Mapping[str, Any],
    model: ModelFactory,
    example: Mapping[str, jax.Array | np.ndarray[Any, Any]],
) -> dict[str, Any]:
    """`variables` with the collection `aqt` as our linen modules store it, to be read in SERVE.

    Args:
      variables: `{"params": ...}` as `qwix.quantize_params` returned the parameters, or what Orbax
        restored of them, and other collections, which are returned as they are.
      model: gives our linen module for a mode, as `aqt_engine.convert.convert` takes it. Its
        parameters have the names that they have in the model that Qwix quantized, and it quantizes
        the same of them, in the same axes and dtypes.
      example: inputs by the names of the module's arguments; the model is run on them to see which
        contraction takes which parameter.

    In place of a quantized parameter stands the float one that it stands for.

    Raises:
      MigrationError: nothing is quantized; the model quantizes other parameters, or other shapes or
        dtypes, than were stored, or it transposes one before it is quantized; or a dtype or a
        static scale has no counterpart.
    """
    params = cast(Mapping[str, Any], meta.unbox(variables["params"]))
    kept: dict[Path, Any] = {}
    quantized: dict[Path, _Parts] = {}
    static: dict[Path, Any] = {}
    for path, leaf in _leaves(params, ()):
        if isinstance(leaf, Mapping):
            quantized[path] = cast(_Parts, leaf)
            kept[path] = _dequantized("/".join(path), cast(_Parts, leaf))
        elif _STATIC.fullmatch(path[-1]):
            static[path] = leaf
        else:
            kept[path] = leaf
    if not quantized:
        raise MigrationError(
            "the parameters hold nothing that Qwix has quantized: give what "
            "`qwix.quantize_params` returned, or convert plain parameters with "
            "`aqt_engine.convert.convert`"
        )
    floats = {**variables, "params": traverse_util.unflatten_dict(kept)}
    expected = shapes(model(QuantMode.CONVERT), floats, example)
    places = _places(Weights(model, floats, example), floats, example, quantized)
    scales = {path: leaf for path, leaf in expected.items() if isinstance(leaf, Scale)}
    activations = _activations(static, set(scales))
    require_same({*places, *activations}, set(expected))
    stored: dict[Path, Any] = {}
    for path, target in expected.items():
        if isinstance(target, QTensor):
            stored[path] = _weight("/".join(places[path]), quantized[places[path]], target)
        else:
            stored[path] = _activation("/".join(path), activations[path], target)
    stored |= marks(model(QuantMode.CONVERT), floats, example)
    return {**floats, COLLECTION: traverse_util.unflatten_dict(stored)}


def _leaves(node: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Arrays, and the parts of quantized ones as a mapping, with their paths."""
    parts = _parts(node)
    if parts is not None:
        yield path, parts
    elif isinstance(node, Mapping) and set(cast(Mapping[str, Any], node)) != {"array"}:
        for name, child in cast(Mapping[str, Any], node).items():
            yield from _leaves(child, (*path, name))
    else:
        # A scale of an activation in its wrapper, or a plain array.
        yield path, _inside(node)


def _inside(node: Any) -> Any:
    """What `WithAux` holds, or what is left of one in a checkpoint."""
    if isinstance(node, Mapping):
        return cast(Mapping[str, Any], node).get("array")
    return node.array if hasattr(node, "how") else node


def _parts(node: Any) -> _Parts | None:
    held = _inside(node)
    held = node if held is None else held
    names = ("qvalue", "scale", "zero_point")
    if isinstance(held, Mapping):
        parts = cast(Mapping[str, Any], held)
        return {name: parts.get(name) for name in names} if "qvalue" in parts else None
    if hasattr(held, "qvalue"):
        return {"qtype": held.qtype, **{name: getattr(held, name) for name in names}}
    return None


def _dequantized(where: str, parts: _Parts) -> jax.Array:
    """The float weight that Qwix means."""
    qvalue, scale, zero = parts["qvalue"], parts["scale"], parts["zero_point"]
    dtype = jnp.dtype(qvalue.dtype)
    # Of a checkpoint only the dtype is left: what is not a number but an index is unsigned.
    if dtype.name.startswith("uint") or str(parts.get("qtype")) == "nf4":
        raise MigrationError(
            f"{where} was stored as nf4, whose values are places in a table and no numbers: "
            f"quantize this layer with int4 or int8 and store it again"
        )

    def spread(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        for axis, (size, whole) in enumerate(zip(x.shape, qvalue.shape, strict=True)):
            x = jnp.repeat(x, whole // size, axis)
        return x

    value = jnp.asarray(qvalue).astype(scale.dtype)
    return (value if zero is None else value - spread(zero).astype(scale.dtype)) * spread(scale)


def _places(
    weights: Weights,
    variables: Mapping[str, Any],
    example: Mapping[str, Any],
    quantized: Mapping[Path, _Parts],
) -> dict[Path, Path]:
    """Where our model stores each quantized parameter: from the place to the parameter's path."""
    params = cast(Mapping[Path, jax.Array], traverse_util.flatten_dict(dict(variables["params"])))
    found = [weight for weight in weights if weight.parameter in quantized]

    @jax.jit
    def as_it_stands(variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[jax.Array]:
        def against(parameter: jax.Array) -> Look:
            return lambda operand, _: _equal(operand, parameter)

        looks = [(weight, against(params[weight.parameter])) for weight in found]
        return weights.look(variables, inputs, looks)

    places: dict[Path, Path] = {}
    for weight, same in zip(found, as_it_stands(variables, dict(example)), strict=True):
        if not bool(same):
            raise MigrationError(
                f"{'/'.join(weight.parameter)} is transposed, reshaped or cast before the model "
                f"quantizes it, and was stored as it stands: contract it as it stands, with its "
                f"axes named in the contraction"
            )
        places[*weight.site.path, weight.stored] = weight.parameter
    left = quantized.keys() - set(places.values())
    if left:
        raise MigrationError(
            f"only Qwix quantizes {', '.join(sorted('/'.join(path) for path in left))}: give the "
            f"contractions of the model that take them a configuration, and the mode"
        )
    return places


def _equal(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.all(a == b) if a.shape == b.shape else jnp.asarray(False)


def _activations(static: Mapping[Path, Any], expected: set[Path]) -> dict[Path, dict[str, Any]]:
    """The static scales, and zero points, of activations by where our model stores them."""
    found: dict[Path, dict[str, Any]] = {}
    for path, value in static.items():
        kind = cast(re.Match[str], _STATIC.fullmatch(path[-1]))[1]
        # Theirs lies beside the parameter, ours in the module that contracts with it.
        ours = [place for place in expected if place[:-2] == path[:-1]]
        if len(ours) != 1:
            raise MigrationError(
                f"{'/'.join(path)} is the static scale of an activation, and the model has "
                f"{len(ours)} in that layer: give it one contraction whose `fwd.lhs` has a static "
                f"calibration"
            )
        found.setdefault(ours[0], {})[kind] = value
    return found


def _weight(where: str, parts: _Parts, target: QTensor) -> QTensor:
    scale, zero = parts["scale"], parts["zero_point"]
    shape = tuple(target.qvalue.shape)
    qvalue = jnp.asarray(parts["qvalue"])
    if len(shape) == qvalue.ndim + 1:
        # In tiles: ours has them in an axis of their own, in front of what is left of theirs.
        axis = next(a for a, (n, m) in enumerate(zip(shape, qvalue.shape, strict=False)) if n != m)
        if scale.shape[axis] == shape[axis] and qvalue.size == np.prod(shape):
            qvalue = qvalue.reshape(shape)
            scale, zero = (
                None if x is None else jnp.expand_dims(x, axis + 1) for x in (scale, zero)
            )
    bias = None if zero is None else _bias(zero, scale)
    checked(where, "values", qvalue, target.qvalue)
    scale = checked(where, "scale", scale, target.scale)
    return QTensor(qvalue, scale, target.dequant_dtype, checked(where, "bias", bias, target.bias))


def _activation(where: str, parts: Mapping[str, Any], target: Scale) -> Scale:
    scale = checked(where, "scale", parts.get("scale"), target.scale)
    assert scale is not None
    zero = parts.get("zero_point")
    bias = None if zero is None else _bias(zero, scale)
    return Scale(scale, checked(where, "bias", bias, target.bias))


def _bias(zero_point: Any, scale: Any) -> jax.Array:
    """q = x / scale + zero point, and ours is q = (x + bias) / scale."""
    return jnp.asarray(zero_point).astype(scale.dtype) * scale
