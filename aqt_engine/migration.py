"""Weights that the original AQT, `aqtp` 0.8 and 0.9, has stored for serving become ours.

`aqtp` writes in QuantMode.CONVERT, in one of two layouts. The one, called `frozen`, holds a whole
quantized tensor whose scale lies as the weight does. The legacy one holds `value` and `scale`, and
that scale lies as the contraction's output does. Either is read as the live objects that a model
returns, or as the nested dict that a checkpoint restored without a target gives. Values and scales
are moved, never computed again: what is served are the very integers that were stored.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta

from aqt_engine.flax.linen import AqtDotGeneral, numbered
from aqt_engine.flax.marks import SEPARATOR
from aqt_engine.modes import QuantMode
from aqt_engine.ops.axes import Axes, DotAxes
from aqt_engine.qtensor import QTensor, Scale

_COLLECTION = "aqt"
# A stored scale or weight: collection path, and the last name is `qlhs` or `qrhs`.
_Path = tuple[str, ...]
_Order = tuple[Axes, Axes, Axes]


class MigrationError(ValueError):
    """What `aqtp` stored cannot be served by a model; the message says which part, and why."""


def from_aqtp(
    variables: Mapping[str, Any],
    model: Callable[[QuantMode], nn.Module],
    example: Mapping[str, jax.Array | np.ndarray[Any, Any]],
) -> dict[str, Any]:
    """`variables` with the collection `aqt` as our linen modules store it, to be read in SERVE.

    Args:
      variables: what the `aqtp` model returned in its QuantMode.CONVERT, or what Orbax restored of
        that: the collections `params`, `aqt` and others. All but `aqt` are returned as they are.
      model: gives our linen module for a mode, as `aqt_engine.convert.convert` takes it. Its
        parameters and its quantized layers have the names that they have in the `aqtp` model.
      example: inputs by the names of the module's arguments. Only shapes and dtypes are looked at:
        the model is traced and nothing is computed.

    Raises:
      MigrationError: there is no collection `aqt`; the model quantizes other layers, or other
        shapes or dtypes, than were stored; or what was stored has several scales, a sparsity mask
        or no values.
    """
    if _COLLECTION not in variables:
        raise MigrationError(
            "the variables hold no collection 'aqt': give what the aqtp model returned in "
            "QuantMode.CONVERT, or convert trained parameters with `aqt_engine.convert.convert`"
        )
    stored = cast(Mapping[str, Any], meta.unbox(variables[_COLLECTION]))
    kept = {name: value for name, value in variables.items() if name != _COLLECTION}
    expected, orders = _expected(model(QuantMode.CONVERT), kept, example)
    _require_same_layers(stored, set(expected))
    migrated: dict[_Path, Any] = {
        path: _leaf("/".join(path), _at(stored, path), target, orders.get(path))
        for path, target in expected.items()
    }
    migrated |= _marks(model(QuantMode.CONVERT), kept, example)
    return {**kept, _COLLECTION: traverse_util.unflatten_dict(migrated)}


def _expected(
    module: nn.Module, variables: Mapping[str, Any], example: Mapping[str, Any]
) -> tuple[dict[_Path, QTensor | Scale], dict[_Path, _Order]]:
    """The shapes that our model would store, and by which axes each contraction sorts them."""
    orders: dict[_Path, _Order] = {}
    calls: dict[_Path, int] = {}
    signature = inspect.signature(AqtDotGeneral.__call__)

    def watch(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        called = context.module
        # A convolution is a module of a kind of its own, and was never stored in the legacy layout.
        if type(called) is AqtDotGeneral and context.method_name == "__call__":
            given = signature.bind(called, *args, **kwargs).arguments
            axes = DotAxes.parse(given["dimension_numbers"], given["lhs"].ndim, given["rhs"].ndim)
            call = calls.get(called.path, 0)
            calls[called.path] = call + 1
            orders[*called.path, numbered(called.lhs_var_name, call)] = (
                axes.lhs_batch,
                axes.lhs_remaining,
                axes.lhs_contracting,
            )
            orders[*called.path, numbered(called.rhs_var_name, call)] = (
                axes.rhs_batch,
                axes.rhs_remaining,
                axes.rhs_contracting,
            )
        return next_method(*args, **kwargs)

    def convert(variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> Any:
        with nn.intercept_methods(watch):
            return module.apply(variables, inputs, method=_call, mutable=True)[1]

    shapes = meta.unbox(jax.eval_shape(convert, variables, dict(example)).get(_COLLECTION, {}))
    leaves = _flat(shapes)
    return {path: leaf for path, leaf in leaves.items() if _is_stored(leaf)}, orders


def _marks(
    module: nn.Module, variables: Mapping[str, Any], example: Mapping[str, Any]
) -> dict[_Path, jax.Array]:
    """The marks that our model would store, since it is its configuration that will serve."""
    names: list[_Path] = []

    # They depend on nothing: compiled, nothing else is computed.
    @jax.jit
    def marks(variables: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> list[jax.Array]:
        stored = module.apply(variables, inputs, method=_call, mutable=True)[1]
        leaves = _flat(meta.unbox(stored.get(_COLLECTION, {})))
        found = {path: leaf for path, leaf in leaves.items() if SEPARATOR in path[-1]}
        names.extend(found)
        return list(found.values())

    return dict(zip(names, marks(variables, dict(example)), strict=True))


def _flat(collection: Mapping[str, Any]) -> dict[_Path, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(collection, is_leaf=_is_stored)[0]
    return {tuple(str(key.key) for key in path): leaf for path, leaf in leaves}


def _call(module: nn.Module, inputs: Mapping[str, jax.Array]) -> Any:
    return module(**inputs)


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, QTensor | Scale)


def _require_same_layers(stored: Mapping[str, Any], expected: set[_Path]) -> None:
    """Refuses layers that only one of the two quantizes."""
    found = _layers(stored, ())
    only_stored = sorted("/".join(path) for path in found - expected)
    only_expected = sorted("/".join(path) for path in expected - found)
    if only_stored or only_expected:
        raise MigrationError(
            f"the model does not quantize what was stored: only stored are "
            f"{', '.join(only_stored) or 'none'}, and only the model has "
            f"{', '.join(only_expected) or 'none'}; give each side of each layer the mode that it "
            f"had in the aqtp model"
        )


def _layers(node: Mapping[str, Any], path: _Path) -> set[_Path]:
    """The paths of the mappings that hold a stored tensor in either layout."""
    found: set[_Path] = set()
    for name, child in node.items():
        if not isinstance(child, Mapping):
            continue
        child = cast(Mapping[str, Any], child)
        # A layer may be named as a variable is: only what is stored has no layers beneath.
        stored = "frozen" in child or any(_is_array(_unboxed(x)) for x in child.values())
        found |= {(*path, name)} if stored else _layers(child, (*path, name))
    return found


def _at(node: Any, path: _Path) -> Mapping[str, Any]:
    for name in path:
        node = node[name]
    return node


def _leaf(
    where: str, stored: Mapping[str, Any], target: QTensor | Scale, order: _Order | None
) -> QTensor | Scale:
    """What was stored at the path `where`, in the form of `target`."""
    if "frozen" in stored:
        qvalue, scale, bias = _frozen(where, stored["frozen"])
    else:
        qvalue, bias = _unboxed(stored.get("value")), None
        scale = _as_weight(where, _unboxed(stored.get("scale")), target.scale, order)
    scale = _checked(where, "scale", scale, target.scale)
    bias = _checked(where, "bias", bias, target.bias)
    if isinstance(target, Scale):
        assert scale is not None
        return Scale(scale, bias)
    qvalue = _checked(where, "values", qvalue, target.qvalue)
    assert qvalue is not None
    return QTensor(qvalue, scale, target.dequant_dtype, bias)


def _frozen(where: str, tensor: Any) -> tuple[Any, Any, Any]:
    """Values, scale and bias of a live quantized tensor or of the dict that was restored of one."""

    def part(name: str) -> Any:
        held = tensor.get(name) if isinstance(tensor, Mapping) else getattr(tensor, name, None)
        return _unboxed(held)

    def only(name: str) -> Any:
        held = part(name)
        # A list, or the dict by position that Flax's state dicts make of one.
        items = list(held.values()) if isinstance(held, Mapping) else list(held or ())
        if len(items) > 1:
            raise MigrationError(
                f"{where} was stored with {len(items)} tensors as its {name}, and one can be "
                f"served: quantize this layer with a single {name} and convert it again"
            )
        return _unboxed(items[0]) if items else None

    if part("sparsity_mask") is not None:
        raise MigrationError(
            f"{where} was stored with a sparsity mask, which cannot be served: multiply the "
            f"weight with its mask and convert it again without one"
        )
    return part("qvalue"), only("scale"), only("bias")


def _as_weight(where: str, scale: Any, target: Any, order: _Order | None) -> Any:
    """A legacy scale, which lies as the output does, laid out as the weight."""
    if scale is None or target is None:
        return scale
    axes = () if order is None else sum(order, ())
    if order is None or sorted(axes) != list(range(target.ndim)):
        raise MigrationError(
            f"{where} was stored in the legacy layout, which has no place for a layer that is "
            f"tiled, scanned or a convolution: store it with `use_legacy_freezer=False`"
        )
    ordered = tuple(target.shape[a] for a in axes)
    # The other side's axes have size 1 there, and so do ours that share a scale.
    if any(target.shape[a] != 1 for a in order[2]) or _wide(scale.shape) != _wide(ordered):
        raise MigrationError(
            f"{where} was stored with a scale of shape {tuple(scale.shape)} in the layout of the "
            f"output, and the model's has shape {tuple(target.shape)} in that of the weight: use "
            f"the configuration and the contraction that the model was stored with"
        )
    return jnp.asarray(scale).reshape(ordered).transpose(np.argsort(axes))


def _wide(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _checked(where: str, part: str, array: Any, target: Any) -> jax.Array | None:
    """`array`, which has the shape and dtype of `target`, or is None where that is None."""
    if array is None and target is None:
        return None
    if array is None or target is None or not _fits(array, target):
        raise MigrationError(
            f"{where} was stored with {part} {_described(array)} and the model has "
            f"{_described(target)}: use the configuration and the tiles that it was stored with"
        )
    return jnp.asarray(array)


def _fits(array: Any, target: Any) -> bool:
    return tuple(array.shape) == tuple(target.shape) and array.dtype == target.dtype


def _described(array: Any) -> str:
    return "absent" if array is None else f"of {array.dtype}{list(array.shape)}"


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _unboxed(x: Any) -> Any:
    """What stands in the dict that is left of a Flax metadata box in a checkpoint."""
    while isinstance(x, Mapping) and set(cast(Mapping[str, Any], x)) == {"value"}:
        x = cast(Mapping[str, Any], x)["value"]
    return x
