"""Contractions of a graph brought into its main function, where it is seen what is a weight."""

from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend.mlir import ir

# MLIR's bindings are typed only in part.
Function = Any


def with_contractions_inlined(module: ir.Module) -> Function:
    """The function `main` of `module`, into which all others that contract were copied."""
    functions = functions_of(module)
    main = functions["main"]
    while call := next(_calls(main, functions), None):
        _inline(call, functions[_callee(call)])
    return main


def functions_of(module: ir.Module) -> dict[str, Function]:
    """The functions of `module` by their names."""
    functions: dict[str, Function] = {}
    for function in module.body.operations:
        name: Any = function.attributes["sym_name"]
        functions[name.value] = function
    return functions


def _calls(function: Function, functions: Mapping[str, Function]) -> Iterator[Any]:
    """Calls in `function` of what contracts."""
    for op in operations(function):
        if op.name == "func.call" and _contracts(functions[_callee(op)], functions):
            yield op


def _contracts(function: Function, functions: Mapping[str, Function]) -> bool:
    direct = any(op.name == "stablehlo.dot_general" for op in operations(function))
    return direct or next(_calls(function, functions), None) is not None


def operations(op: Any) -> Iterator[Any]:
    """All operations in `op`, however deep."""
    for region in op.operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from operations(inner)


def _callee(call: Any) -> str:
    return call.attributes["callee"].value


def _inline(call: Any, function: Function) -> None:
    copied = function.operation.clone()
    block = copied.regions[0].blocks[0]
    for argument, operand in zip(block.arguments, call.operands, strict=True):
        argument.replace_all_uses_with(operand)
    *body, returned = [op.operation for op in block]
    for op in body:
        op.move_before(call)
    for result, value in zip(call.results, returned.operands, strict=True):
        result.replace_all_uses_with(value)
    call.erase()
    copied.erase()
