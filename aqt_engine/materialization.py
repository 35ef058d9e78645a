"""A value that the compiler computes on its own, and what uses it on its own.

A compiler repeats a cheap computation wherever its result is used, in one loop with what uses it,
and how it orders and joins the operations of a loop changes a float sum in its last bit. So the
same layer normalization could have other bits behind a scale that is computed, as in training, than
behind one that is read, as in serving. With `materialized` in between, both read it.

On CPU, where XLA drops its own optimization barriers before it joins loops, the barrier is a call
of the identity that is not to be inlined, neither by MLIR as a graph is loaded nor by XLA. It costs
nothing while running: a call gives back the memory that it was given. Elsewhere it is XLA's.
"""

from typing import Any, cast

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import func
from jax.interpreters import ad, batching, mlir

NAME = "aqt_materialize"
"""What the function is called that a graph for CPUs calls; others follow with a number."""


def materialized(x: jax.Array) -> jax.Array:
    """`x`, as if it were an argument of whatever is computed of it."""
    return cast(jax.Array, materialize_p.bind(x))


def materialized_on_cpu(x: jax.Array) -> jax.Array:
    """`materialized` on CPU, and `x` elsewhere."""
    return cast(jax.Array, materialize_on_cpu_p.bind(x))


def _same(x: Any) -> Any:
    return x


def _transposed(cotangent: Any, x: Any) -> Any:
    return [cotangent]


def _called(ctx: mlir.LoweringRuleContext, x: Any) -> Any:
    """A call of the identity."""
    if not ir.RankedTensorType(x.type).has_static_shape:
        # A graph for any number of rows, whose bits depend on that number all the same.
        return [x]
    module: Any = ctx.module_context
    with ir.InsertionPoint.at_block_begin(module.module.body):
        identity = func.FuncOp(NAME, ([x.type], [x.type]), visibility="private")
        body = identity.add_entry_block()
        with ir.InsertionPoint(body):
            func.ReturnOp(list(body.arguments))
    name = module.symbol_table.insert(identity)
    call = func.CallOp([x.type], ir.FlatSymbolRefAttr.get(name.value), [x])
    for_xla: dict[str, ir.Attribute] = {"inlineable": ir.StringAttr.get("false")}
    call.operation.attributes["no_inline"] = ir.UnitAttr.get()
    call.operation.attributes["mhlo.frontend_attributes"] = ir.DictAttr.get(for_xla)
    return call.results


def _primitive(name: str, elsewhere: Any) -> Primitive:
    """The identity, lowered `elsewhere` than on CPU. Analyses of jaxprs may take it for a copy."""
    primitive = Primitive(name)

    def batched(args: Any, axes: Any) -> Any:
        return primitive.bind(*args), axes[0]

    primitive.def_impl(_same)
    primitive.def_abstract_eval(_same)
    batching.primitive_batchers[primitive] = batched
    ad.deflinear2(primitive, _transposed)
    mlir.register_lowering(primitive, mlir.lower_fun(elsewhere, multiple_results=False))
    mlir.register_lowering(primitive, _called, "cpu")
    return primitive


materialize_p = _primitive(NAME, lax.optimization_barrier)
materialize_on_cpu_p = _primitive(f"{NAME}_on_cpu", _same)
