"""The kernel in a bundle's graph: contractions of int8 with a weight, replaced as it is loaded.

A bundle's graph is portable StableHLO, and stays so on disk. Here each `dot_general` of int8 values
with an int8 weight, summed in int32, becomes a `custom_call` of the kernel, and the graph takes the
weight packed instead. Sums of integers are the same in any order, so these are the same integers.
What is multiplied is quantized in one call where it can be (`quantization`).

A weight is packed where all that the graph does with it are such contractions, all of which read it
in the same layout; so there is never a second copy of it. Contractions of two activations, those
with batch axes, and those of a graph for any number of rows are left to XLA.

Only contractions that stand apart (`materialized_on_cpu` on both sides) are replaced. Around others
XLA would compile the float operations otherwise than around a contraction of its own: it reads and
writes them in another shape and layout, and in another loop a product and a sum become one fused
operation or two, which round once or twice. Then the calls of the identity go: nothing can be seen
through the kernel either, nor through a scale that is read. What moves its left operand first keeps
its call, since a transposition would be compiled into what is before it.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax import export
from jax.extend import mlir as jax_mlir
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir

from aqt_engine.kernels import library
from aqt_engine.kernels.calls import call, shape
from aqt_engine.kernels.identities import (
    bypass_identities,
    comes_materialized,
    goes_materialized,
    materialized_from,
)
from aqt_engine.kernels.inlining import with_contractions_inlined
from aqt_engine.kernels.packing import Packing, Steps, packed_size
from aqt_engine.kernels.quantization import put_in_one_pass

Array = np.ndarray[Any, Any]
# MLIR's bindings are typed only in part.
Value = Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Substituted:
    """A graph that calls the kernel, and by index the weights that it takes packed."""

    graph: export.Exported
    packed: Mapping[int, Packing] = dataclasses.field(default_factory=dict[int, Packing])


def substituted(graph: export.Exported, weights: int) -> Substituted:
    """`graph`, whose first `weights` arguments are weights, with the kernel where it can be called.

    It is the graph itself if there is no kernel here, or nothing that it could compute.
    """
    packed: dict[int, Packing] = {}
    if library.instruction_set() is None or graph.nr_devices != 1:
        return Substituted(graph=graph)
    avals = list(graph.in_avals)
    with mlir.make_ir_context(), ir.Location.unknown():
        module = jax_mlir.deserialize_portable_artifact(graph.mlir_module_serialized)
        main = with_contractions_inlined(module)
        put_in_one_pass(module, main)
        arguments = list(main.entry_block.arguments)
        arrays = arguments[-len(graph.module_kept_var_idx) :]
        for argument, index in zip(arrays, graph.module_kept_var_idx, strict=True):
            sites = list(_sites(argument)) if index < weights else []
            readings = {site.packing if site else None for site in sites}
            if len(readings) == 1 and (packing := readings.pop()):
                packed[index] = packing
                size = _put_kernel(argument, [site for site in sites if site])
                avals[index] = avals[index].update(shape=(size,), dtype=np.dtype(np.int8))
            elif index < weights:
                # A scale that is read stands apart from what uses it by itself.
                bypass_identities(argument, by=argument)
        types = ir.FunctionType.get([a.type for a in arguments], main.type.results)
        main.attributes["function_type"] = ir.TypeAttr.get(types)
        module.operation.verify()
        serialized = jax_mlir.serialize_portable_artifact(
            module, stablehlo.get_current_version(), True
        )
    if not packed:
        return Substituted(graph=graph)
    changed = dataclasses.replace(graph, in_avals=tuple(avals), mlir_module_serialized=serialized)
    return Substituted(graph=changed, packed=packed)


@dataclasses.dataclass(frozen=True, slots=True)
class _Site:
    """A contraction that the kernel can compute, and how it reads its weight."""

    dot: ir.OpView
    numbers: Any
    packing: Packing


def _sites(value: Value, steps: Steps = ()) -> Iterator[_Site | None]:
    """What uses `value`, which `steps` have made of a weight; None for what is not ours."""
    for use in value.uses:
        op = use.owner.opview
        match op.operation.name:
            case "stablehlo.dot_general":
                yield _contraction(op, use.operand_number, steps)
            case "stablehlo.reshape":
                yield from _sites(op.result, (*steps, ("reshape", shape(op.result))))
            case "stablehlo.transpose":
                permutation: Any = op.attributes["permutation"]
                step = ("transpose", tuple(permutation))
                yield from _sites(op.result, (*steps, step))
            case "stablehlo.convert" if _narrow(value) and _narrow(op.result):
                yield from _sites(op.result, steps)
            case _:
                yield None


def _contraction(dot: ir.OpView, operand: int, steps: Steps) -> _Site | None:
    lhs, rhs = dot.operands
    numbers = stablehlo.DotDimensionNumbers(dot.attributes["dot_dimension_numbers"])
    int8 = all(_bits(operand) == 8 for operand in (lhs, rhs)) and _bits(dot.result) == 32
    static = ir.RankedTensorType(dot.result.type).has_static_shape
    if operand != 1 or not int8 or not static or len(numbers.lhs_batching_dimensions):
        return None
    if 0 in (*shape(lhs), *shape(rhs)) or not comes_materialized(lhs):
        return None
    if not goes_materialized(dot.result):
        return None
    return _Site(dot, numbers, Packing(steps, tuple(numbers.rhs_contracting_dimensions)))


def _put_kernel(weight: Value, sites: Sequence[_Site]) -> int:
    """Puts the kernel in the place of all `sites`; the bytes that it takes the weight in."""
    site = sites[0]
    rhs = shape(site.dot.operands[1])
    depth = math.prod(rhs[a] for a in site.packing.contracted)
    columns = math.prod(rhs) // depth
    size = packed_size(depth, columns)
    weight.set_type(ir.RankedTensorType.get([size], ir.IntegerType.get_signless(8)))
    for site in sites:
        _replace(site, weight, depth, columns)
    _erase_uses(weight)
    return size


def _replace(site: _Site, weight: Value, depth: int, columns: int) -> None:
    dot = site.dot
    with ir.InsertionPoint(dot), dot.location:
        lhs = dot.operands[0]
        contracted = tuple(site.numbers.lhs_contracting_dimensions)
        rank = len(shape(lhs))
        order = [*(a for a in range(rank) if a not in contracted), *contracted]
        if order == list(range(rank)):
            # What is behind the identity can see the kernel no more than it.
            lhs = materialized_from(lhs)
        else:
            lhs = stablehlo.transpose(lhs, ir.DenseI64ArrayAttr.get(order))
        sizes = {"depth": depth, "columns": columns}
        (sums,) = call(library.TARGET, [lhs, weight], [dot.result.type], sizes)
        bypass_identities(dot.result, by=sums)
        dot.result.replace_all_uses_with(sums)
        left = dot.operands[0].owner
        dot.operation.erase()
        if not list(left.results[0].uses):
            left.erase()


def _erase_uses(value: Value) -> None:
    """Erases what was made of a weight for contractions that are no more."""
    for use in list(value.uses):
        op = use.owner
        if op.name != "stablehlo.custom_call":
            _erase_uses(op.results[0])
            op.erase()


def _bits(value: Value) -> int:
    """The bits of signed integers; 0 for other types."""
    element: Any = ir.RankedTensorType(value.type).element_type
    signed = isinstance(element, ir.IntegerType) and element.is_signless
    return element.width if signed else 0


def _narrow(value: Value) -> bool:
    return 2 <= _bits(value) <= 8
