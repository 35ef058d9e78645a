"""Finds the contractions of a Flax linen model, without computing anything.

While the model is traced, each layer's hook notes what it is called with; in the jaxpr that
results, contractions that went through no hook are found. The names of scopes, which JAX keeps for
each operation, tell the two apart, and say in which module an operation is.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList
from flax.linen.module import InterceptorContext
from jax.extend.core import ClosedJaxpr, Jaxpr

from aqt_engine.flax.layers import Hook, intercepting, path_of
from aqt_engine.flax.linen import AqtDotGeneral
from aqt_engine.rules import Contraction, operand

_PRIMITIVES = ("dot_general", "ragged_dot_general", "conv_general_dilated")
_REACHED = "@reached@"


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Contraction, ...]:
    """The contractions of `model`, called with arrays or `jax.ShapeDtypeStruct`s."""
    leaves, tree = jax.tree.flatten((args, dict(kwargs)))
    # What is no array, as a flag, stays what it is: models branch on it.
    arrays = {i: operand(x) for i, x in enumerate(leaves) if hasattr(x, "dtype")}
    key = jax.eval_shape(lambda: jax.random.key(0))

    def call(run: Callable[..., Any], given: Mapping[int, Any]) -> Any:
        args, kwargs = jax.tree.unflatten(tree, [given.get(i, x) for i, x in enumerate(leaves)])
        return run(*args, **kwargs)

    found: list[Contraction] = []

    def forward(variables: Any, key: Any, given: Mapping[int, Any]) -> Any:
        apply = functools.partial(model.apply, variables, rngs=key, mutable=DenyList("params"))
        with (
            nn.intercept_methods(_marked(found)),
            intercepting(functools.partial(_noting, found), object()),
        ):
            answer = call(apply, given)
        return [x for x in jax.tree.leaves(answer) if isinstance(x, jax.Array)]

    def initialize(key: Any, given: Mapping[int, Any]) -> Any:
        return call(functools.partial(model.init, key), given)

    variables = jax.eval_shape(initialize, key, arrays)
    jaxpr = jax.make_jaxpr(forward)(variables, key, arrays)
    return tuple(dict.fromkeys([*found, *_unreached(jaxpr.jaxpr, "")]))


def _noting(found: list[Contraction], path: str, op: str) -> Hook:
    """The hook of `op` that notes its operands and contracts in float."""

    def contract(*args: Any, **kwargs: Any) -> jax.Array:
        lhs, rhs = args[1:3] if op.endswith("einsum") else args[:2]
        found.append(Contraction(path=path, op=op, lhs=operand(lhs), rhs=operand(rhs)))
        with jax.named_scope(_REACHED):
            if op.endswith("einsum"):
                return jnp.einsum(*args, **kwargs)
            if op == "conv_general_dilated":
                return jax.lax.conv_general_dilated(*args, **kwargs)
            return jax.lax.dot_general(*args, **kwargs)

    return contract


def _marked(found: list[Contraction]) -> Any:
    """The interceptor that gives the operations of each module its path as a scope's name."""

    def intercept(
        following: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: InterceptorContext,
    ) -> Any:
        module = context.module
        if module.scope is None:
            return following(*args, **kwargs)
        path = path_of(module)
        if isinstance(module, AqtDotGeneral) and context.method_name == "__call__":
            found.append(
                Contraction(
                    path=path,
                    op="dot_general",
                    lhs=operand(args[0]),
                    rhs=operand(args[1]),
                    hint=f"the model's own {type(module).__name__} keeps its configuration",
                )
            )
            with jax.named_scope(_REACHED):
                return following(*args, **kwargs)
        with jax.named_scope(f"@{path}:{type(module).__name__}@"):
            return following(*args, **kwargs)

    return intercept


def _unreached(jaxpr: Jaxpr, marks: str) -> Iterator[Contraction]:
    """The contractions in `jaxpr`, found within operations named `marks`, that no hook noted."""
    for equation in jaxpr.eqns:
        # Names within an operation that holds others begin anew.
        names = f"{marks}/{equation.source_info.name_stack}"
        if _REACHED in names:
            continue
        if equation.primitive.name in _PRIMITIVES:
            places = re.findall(r"@([^@:]*):([^@]*)@", names)
            path, cls = places[-1] if places else ("", "the model")
            yield Contraction(
                path=path,
                op=equation.primitive.name,
                lhs=operand(equation.invars[0].aval),
                rhs=operand(equation.invars[1].aval),
                hint=f"{cls} has no hook for it; use a layer that has, or an AqtEinsum",
            )
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
                yield from _unreached(inner, names)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)
