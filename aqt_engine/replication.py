"""A graph over several devices, told what of it is whole on each: `layout` says why."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax import export
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy, stablehlo
from jax.interpreters import mlir

from aqt_engine.layout import COPIES, SHARDS, Layout

_CONTRACTIONS = ("stablehlo.dot_general", "stablehlo.convolution")


def replicating(graph: export.Exported, layout: Layout) -> export.Exported:
    """`graph`, with all but its integer contractions computed whole on each device of `layout`."""
    context = mlir.make_ir_context()
    with context, ir.Location.unknown():
        module = stablehlo.deserialize_portable_artifact(context, graph.mlir_module_serialized)
        axes = ((COPIES, layout.copies), (SHARDS, layout.shards))
        mesh = sdy.MeshAttr.get([sdy.MeshAxisAttr.get(*axis) for axis in axes])

        def whole(value: Any) -> Any:
            dims = [sdy.DimensionShardingAttr.get([], is_closed=True)] * value.type.rank
            return sdy.ShardingConstraintOp(value, sdy.TensorShardingAttr.get(mesh, dims)).result

        _visit(module.operation, lambda operation: _constrain(operation, whole))
        version = stablehlo.get_current_version()
        changed = stablehlo.serialize_portable_artifact(module, version, allow_other_dialects=True)
    return dataclasses.replace(graph, mlir_module_serialized=changed)


def _visit(operation: Any, visit: Callable[[Any], None]) -> None:
    for region in operation.regions:
        for block in region.blocks:
            for inner in list(block.operations):
                visit(inner.operation)
                _visit(inner.operation, visit)


def _constrain(operation: Any, whole: Callable[[Any], Any]) -> None:
    """Puts `whole` around an integer contraction, and before what turns integers into floats."""
    contracts = operation.name in _CONTRACTIONS and _is_integer(operation.results[0])
    converts = operation.name == "stablehlo.convert" and _is_integer(operation.operands[0])
    if contracts or (converts and not _is_integer(operation.results[0])):
        with ir.InsertionPoint(operation):
            for i, operand in enumerate(operation.operands):
                if converts or _is_computed(operand):
                    operation.operands[i] = whole(operand)
    if contracts:
        result = operation.results[0]
        uses = [(use.owner, use.operand_number) for use in result.uses]
        with ir.InsertionPoint.after(operation):
            kept = whole(result)
        for owner, i in uses:
            owner.operands[i] = kept


def _is_computed(value: Any) -> bool:
    """Whether integers were made of floats here: activations were, and weights were not."""
    made = value.owner
    if isinstance(made, ir.Block):
        return False
    # A choice by platform gives what one of its branches gives.
    ends = [list(region.blocks[0].operations)[-1] for region in made.regions if len(region.blocks)]
    given = [operand for op in (made, *ends) for operand in op.operands]
    return any(not _is_integer(o) or _is_computed(o) for o in given)


def _is_integer(value: Any) -> bool:
    kind = value.type
    return isinstance(kind, ir.RankedTensorType) and isinstance(kind.element_type, ir.IntegerType)
