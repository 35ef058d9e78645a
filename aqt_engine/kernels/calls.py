"""A graph's call of the native library, through XLA's FFI."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo

# MLIR's bindings are typed only in part.
Value = Any
_TYPED_FFI = 4


def call(
    target: str, operands: Sequence[Value], types: Sequence[Any], sizes: Mapping[str, int | float]
) -> Sequence[Value]:
    """What `target` gives of `operands`, in `types`; integers of `sizes` are int64, floats f32."""
    i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
    config: dict[str, ir.Attribute] = {
        name: ir.IntegerAttr.get(i64, size)
        if isinstance(size, int)
        else ir.FloatAttr.get(f32, size)
        for name, size in sizes.items()
    }
    made = stablehlo.CustomCallOp(
        list(types),
        list(operands),
        target,
        has_side_effect=False,
        backend_config=ir.DictAttr.get(config),
        api_version=ir.IntegerAttr.get(ir.IntegerType.get_signless(32), _TYPED_FFI),
        operand_layouts=ir.ArrayAttr.get([_row_major(operand.type) for operand in operands]),
        result_layouts=ir.ArrayAttr.get([_row_major(each) for each in types]),
    )
    return list(made.operation.results)


def shape(value: Value) -> tuple[int, ...]:
    """The shape of `value`, which is static."""
    return tuple(ir.RankedTensorType(value.type).shape)


def _row_major(of: Any) -> ir.Attribute:
    rank = ir.RankedTensorType(of).rank
    order: Any = np.arange(rank - 1, -1, -1, dtype=np.int64)
    return ir.DenseIntElementsAttr.get(order, type=ir.IndexType.get())
