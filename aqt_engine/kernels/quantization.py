"""Rows that are quantized by their largest magnitudes: one call in the place of six operations.

What is quantized stands apart (`materialized_on_cpu`) wherever a kernel could quantize it, so that
what computes it is compiled alike before XLA's operations and before the call. From there to the
int8 values and their scale nothing is added, so that there is nothing which a compiler could round
otherwise than it is written: the kernel does one operation after the other, and gives the same
bits. Whatever is not exactly these operations is left to XLA.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo

from aqt_engine.kernels import library
from aqt_engine.kernels.calls import call, shape
from aqt_engine.kernels.identities import (
    comes_materialized,
    goes_materialized,
    is_identity,
    materialized_from,
)
from aqt_engine.kernels.inlining import Function, functions_of, operations

# MLIR's bindings are typed only in part.
Value = Any


class _OtherwiseError(Exception):
    """It is not what the kernel does."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Read:
    """A value, and the calls of functions that it stands in, the innermost last."""

    value: Value
    calls: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class _Rows:
    """Rows that the kernel can quantize: what it makes of which value, and by which numbers."""

    values: Value
    quantized: Value
    scale: Value
    factor: float
    bound: float


def put_in_one_pass(module: ir.Module, main: Function) -> None:
    """Puts calls of the kernel into `main`, in the place of all operations that it could do.

    Where several quantize the same, XLA makes one of their calls.
    """
    reading = _Reading(functions_of(module))
    for op in [op for op in operations(main) if op.name == "stablehlo.convert"]:
        try:
            rows = reading.rows(op.results[0])
        except _OtherwiseError:
            continue
        with ir.InsertionPoint(rows.scale.owner), rows.scale.owner.location:
            quantized, scale = call(
                library.QUANTIZE_TARGET,
                [rows.values],
                [rows.quantized.type, rows.scale.type],
                {"factor": rows.factor, "bound": rows.bound},
            )
        rows.quantized.replace_all_uses_with(quantized)
        rows.scale.replace_all_uses_with(scale)


class _Reading:
    """What values are made of, through calls of functions."""

    def __init__(self, functions: Mapping[str, Function]):
        self._functions = functions

    def rows(self, quantized: Value) -> _Rows:
        """The rows that become `quantized`.

        Raises:
          _OtherwiseError: they are not quantized as the kernel does it.
        """
        element: Any = ir.RankedTensorType(quantized.type).element_type
        _require(isinstance(element, ir.IntegerType) and element.width == 8)
        _require(element.is_signless and goes_materialized(quantized))
        (whole,) = self._of("convert", _Read(quantized))
        (clipped,) = self._of("round_nearest_even", whole)
        high, raised = self._of("minimum", clipped)
        low, scaled = self._of("maximum", raised)
        bound = self._number(high)
        _require(0 <= bound <= 127 and self._number(low) == -bound)
        values, spread = self._of("multiply", scaled)
        apart = self._outside(values)
        _require(comes_materialized(apart) and shape(apart) == shape(quantized))
        _require(isinstance(ir.RankedTensorType(apart.type).element_type, ir.F32Type))
        (inverse,) = self._of("broadcast_in_dim", spread)
        _require(self._is_in_front(spread, inverse))
        scale = self._inverted(inverse)
        _require(comes_materialized(scale))
        factor = self._factor(_Read(materialized_from(scale)), apart)
        return _Rows(materialized_from(apart), quantized, scale, factor, bound)

    def _inverted(self, inverse: _Read) -> Value:
        """What `inverse` is 1 over, and 1 where that is infinite."""
        infinite, one, quotient = self._of("select", inverse)
        _require(self._number(one) == 1)
        magnitude, infinity = self._of("compare", infinite, "EQ")
        _require(self._number(infinity) == math.inf)
        (same,) = self._of("abs", magnitude)
        self._require_same(same, quotient)
        dividend, scale = self._of("divide", quotient)
        _require(self._number(dividend) == 1)
        return self._outside(scale)

    def _factor(self, scale: _Read, apart: Value) -> float:
        """What the largest magnitude of each row of `apart`, or 1 for 0, is multiplied with."""
        rounded, factor = self._of("multiply", scale)
        (bound,) = self._of("reduce_precision", rounded)
        attributes = self._resolved(rounded).value.owner.attributes
        _require(attributes["exponent_bits"].value == 8 and attributes["mantissa_bits"].value == 23)
        is_zero, one, largest = self._of("select", bound)
        _require(self._number(one) == 1)
        same, zero = self._of("compare", is_zero, "EQ")
        _require(self._number(zero) == 0)
        self._require_same(same, largest)
        (reduced,) = self._of("broadcast_in_dim", largest)
        _require(self._is_in_front(largest, reduced))
        magnitudes, lowest = self._of("reduce", reduced)
        _require(self._number(lowest) == -math.inf)
        self._require_maximum_of_rows(self._resolved(reduced).value.owner, apart, scale)
        is_nan, infinity, magnitude = self._of("select", magnitudes)
        _require(self._number(infinity) == math.inf)
        (of,) = self._of("abs", magnitude)
        for each in (of, *self._of("compare", is_nan, "NE")):
            _require(self._outside(each) == apart)
        found = self._number(factor)
        _require(0 < found < math.inf)
        return found

    def _of(self, name: str, read: _Read, direction: str | None = None) -> list[_Read]:
        """The operands of the operation `name` that gives what is read."""
        at = self._resolved(read)
        op: Any = at.value.owner
        if isinstance(op, ir.Block) or op.name != f"stablehlo.{name}":
            raise _OtherwiseError
        if direction is not None:
            compared: Any = stablehlo.ComparisonDirectionAttr(op.attributes["comparison_direction"])
            _require(compared.value == direction)
        return [_Read(operand, at.calls) for operand in op.operands]

    def _resolved(self, read: _Read) -> _Read:
        """The same value where it is made: in the function that is called, or outside of one."""
        value, calls = read.value, read.calls
        while True:
            op = value.owner
            if isinstance(op, ir.Block):
                if not calls or op.owner.operation.name != "func.func":
                    return _Read(value, calls)
                argument: Any = ir.BlockArgument(value)
                value, calls = calls[-1].operands[argument.arg_number], calls[:-1]
            elif op.name == "func.call" and not is_identity(op):
                callee: Any = op.attributes["callee"]
                block = self._functions[callee.value].entry_block
                result: Any = ir.OpResult(value)
                *_, returned = block.operations
                value, calls = returned.operands[result.result_number], (*calls, op)
            elif op.name == "stablehlo.convert" and op.operands[0].type == value.type:
                value = op.operands[0]
            else:
                return _Read(value, calls)

    def _outside(self, read: _Read) -> Value:
        """The same value where it is made, which is in no function that is called."""
        at = self._resolved(read)
        _require(not at.calls)
        return at.value

    def _number(self, read: _Read) -> float:
        """The float that all of what is read is."""
        at = self._resolved(read)
        op: Any = at.value.owner
        if isinstance(op, ir.Block):
            raise _OtherwiseError
        if op.name == "stablehlo.broadcast_in_dim":
            return self._number(_Read(op.operands[0], at.calls))
        _require(op.name == "stablehlo.constant")
        found = np.asarray(op.attributes["value"])
        _require(found.dtype == np.float32 and found.size > 0)
        _require((found == found.flat[0]).all())
        return float(found.flat[0])

    def _is_in_front(self, spread: _Read, read: _Read) -> bool:
        """Whether the axes of what is read are the first ones of what it is spread over."""
        dims: Any = self._resolved(spread).value.owner.attributes["broadcast_dimensions"]
        return list(dims) == list(range(len(shape(read.value))))

    def _require_same(self, one: _Read, other: _Read) -> None:
        _require(self._resolved(one) == self._resolved(other))

    def _require_maximum_of_rows(self, reduce: Any, apart: Value, scale: _Read) -> None:
        dims = list(reduce.attributes["dimensions"])
        rank = len(shape(apart))
        first = rank - len(dims)
        _require(dims == list(range(first, rank)))
        _require(shape(scale.value) == (*shape(apart)[:first], *(1 for _ in dims)))
        block = reduce.operation.regions[0].blocks[0]
        maximum, returned = block.operations
        _require(maximum.operation.name == "stablehlo.maximum")
        _require(list(maximum.operands) == list(block.arguments))
        _require(returned.operands[0] == maximum.operation.results[0])


def _require(fulfilled: bool) -> None:
    if not fulfilled:
        raise _OtherwiseError
