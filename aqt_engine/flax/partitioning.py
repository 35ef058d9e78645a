"""Stored weights with the partition metadata of the parameters that they were made of."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from flax.linen import Partitioned

from aqt_engine.convertible import ModelFactory
from aqt_engine.ptq.weights import Weights, names
from aqt_engine.qtensor import QTensor


def partitioned(
    model: ModelFactory,
    variables: Mapping[str, Any],
    stored: Mapping[str, Any],
    inputs: Mapping[str, Any],
) -> dict[str, Any]:
    """`stored` with its values and scales boxed as the parameters in `variables` are.

    Each is boxed in `nn.Partitioned`, or a class of it, where the parameter is and is contracted as
    it stands. Axes that share a scale have no name there, so that it is replicated along them.

    Args:
      model: gives the linen module for a mode.
      variables: what was trained, with boxes: `nn.with_partitioning`, logical partitioning.
      stored: the collection that `model(QuantMode.CONVERT)` has filled.
      inputs: by the names of the module's arguments.
    """
    boxes = {
        names(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(variables["params"], is_leaf=_boxed)[
            0
        ]
        if isinstance(leaf, Partitioned)
    }
    weights = Weights(model, variables, inputs)
    # Dicts of our own, to put boxes in.
    leaves, tree = jax.tree.flatten(dict(stored), is_leaf=_is_qtensor)
    boxed = jax.tree.unflatten(tree, leaves)
    for weight in weights:
        box = boxes.get(weight.parameter)
        if box is None:
            continue
        operand = weights.operand(variables, inputs, weight)
        node = boxed
        for name in weight.site.path:
            node = node[name]
        q = meta.unbox(node[weight.stored])
        if q.shape == box.value.shape and bool(jnp.array_equal(operand, box.value)):
            node[weight.stored] = _in_box(q, box)
    return boxed


def _in_box(q: QTensor, box: Any) -> QTensor:
    def scaled(part: jax.Array | None) -> Any:
        if part is None:
            return None
        kept = tuple(
            name if size == whole else None
            for name, size, whole in zip(box.names, part.shape, q.shape, strict=True)
        )
        return box.replace(value=part, names=kept)

    return QTensor(box.replace(value=q.qvalue), scaled(q.scale), q.dequant_dtype, scaled(q.bias))


def _boxed(x: Any) -> bool:
    return isinstance(x, meta.AxisMetadata)


def _is_qtensor(x: Any) -> bool:
    return isinstance(x, QTensor)
