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
from aqt_engine.ops.axes import Axes, DotAxes
from aqt_engine.qtensor import QTensor, Scale

_Order = tuple[Axes, Axes, Axes]


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
    if COLLECTION not in variables:
        raise MigrationError(
            "the variables hold no collection 'aqt': give what the aqtp model returned in "
            "QuantMode.CONVERT, or convert trained parameters with `aqt_engine.convert.convert`"
        )
    stored = cast(Mapping[str, Any], meta.unbox(variables[COLLECTION]))
    kept = {name: value for name, value in variables.items() if name != COLLECTION}
    expected, orders = _expected(model(QuantMode.CONVERT), kept, example)
    require_same(_layers(stored, ()), set(expected))
    migrated: dict[Path, Any] = {
        path: _leaf("/".join(path), _at(stored, path), target, orders.get(path))
        for path, target in expected.items()
    }
    migrated |= marks(model(QuantMode.CONVERT), kept, example)
    return {**kept, COLLECTION: traverse_util.unflatten_dict(migrated)}


def _expected(
    module: nn.Module, variables: Mapping[str, Any], example: Mapping[str, Any]
) -> tuple[dict[Path, QTensor | Scale], dict[Path, _Order]]:
    """The shapes that our model would store, and by which axes each contraction sorts them."""
    orders: dict[Path, _Order] = {}
    calls: dict[Path, int] = {}
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

    return shapes(module, variables, example, watch), orders


def _layers(node: Mapping[str, Any], path: Path) -> set[Path]:
    """The paths of the mappings that hold a stored tensor in either layout."""
    found: set[Path] = set()
    for name, child in node.items():
        if not isinstance(child, Mapping):
            continue
        child = cast(Mapping[str, Any], child)
        # A layer may be named as a variable is: only what is stored has no layers beneath.
        stored = "frozen" in child or any(_is_array(_unboxed(x)) for x in child.values())
        found |= {(*path, name)} if stored else _layers(child, (*path, name))
    return found


def _at(node: Any, path: Path) -> Mapping[str, Any]:
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
    scale = checked(where, "scale", scale, target.scale)
    bias = checked(where, "bias", bias, target.bias)
    if isinstance(target, Scale):
        assert scale is not None
        return Scale(scale, bias)
    qvalue = checked(where, "values", qvalue, target.qvalue)
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


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _unboxed(x: Any) -> Any:
    """What stands in the dict that is left of a Flax metadata box in a checkpoint."""
    while isinstance(x, Mapping) and set(cast(Mapping[str, Any], x)) == {"value"}:
        x = cast(Mapping[str, Any], x)["value"]
    return x
