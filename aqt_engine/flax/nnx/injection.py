"""Quantizes an nnx model by rules: a copy of it, whose layers contract with our ops.

A layer's path is its place in the model, "encoder/layers/0", and its op is what it calls:
"dot_general" (`nnx.Linear`, `nnx.LinearGeneral`), "einsum" (`nnx.Einsum`), "conv_general_dilated"
(`nnx.Conv`), and in `nnx.MultiHeadAttention` "qk_attn_weights_einsum" and
"attn_weights_value_einsum". A layer that was given an op of its own keeps it. A module that is
shared has one path, the first that `nnx.iter_modules` gives.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from aqt_engine.context import Context
from aqt_engine.flax.nnx.conversion import fresh
from aqt_engine.flax.nnx.ops import AqtConvGeneralDilated, AqtDotGeneral, AqtEinsum
from aqt_engine.functions import quantize as quantize_function
from aqt_engine.rules import Contraction, Report, Rule, Rules, operand
from aqt_engine.statistics import StatisticsCalibration

_Model = TypeVar("_Model", bound=nnx.Module)
_REACHED = "@reached@"
_ATTENTION_OPS = ("qk_attn_weights_einsum", "attn_weights_value_einsum")


def quantize(model: _Model, rules: Rules, *, rngs: nnx.Rngs | None = None) -> _Model:
    """A copy of `model` with its layers' contractions quantized by `rules`; gradients too.

    Noise, as of stochastic rounding, is drawn with the stream `aqt` of `rngs`, or its default one.
    Static calibration learns as `AqtDotGeneral` says.

    Raises:
      RuleError: a rule has no effect on the model's layers.
      ValueError: a rule calibrates an attention's own contractions statically.
    """
    model = nnx.clone(model)
    hooks = list(_hooks(model))
    unknown = jax.ShapeDtypeStruct((), jnp.float32)
    places = [(hook.path, op) for hook in hooks for op in hook.ops]
    Report(
        rules,
        tuple(Contraction(path=path, op=op, lhs=unknown, rhs=unknown) for path, op in places),
    ).check()
    for hook in hooks:
        configs = [rules.for_contraction(hook.path, op) for op in hook.ops]
        if hook.attribute == "attention_fn":
            if any(configs):
                scoped = [
                    Rule(modules=f"(.*/)?{i}", config=config) for i, config in enumerate(configs)
                ]
                hook.set(AqtAttention(hook.value, Rules(tuple(scoped)), rngs=rngs))
        elif configs[0] is not None:
            hook.set(_MODULES[hook.attribute](configs[0], rngs=rngs))
    return model


def report(model: nnx.Module, rules: Rules, *args: Any, **kwargs: Any) -> Report:
    """Which contraction of `model`, called with these arguments, gets which rule.

    Nothing is computed: an array may be a `jax.ShapeDtypeStruct`. Contractions that no layer's op
    reaches are listed by the `jax.named_scope`s that they stand in.
    """
    model = nnx.clone(model)
    found: list[Contraction] = []
    for hook in _hooks(model):
        hook.set(functools.partial(_noting, found, hook))
    graph, state = nnx.split(model)

    def call(state: Any, *args: Any, **kwargs: Any) -> Any:
        answer = nnx.merge(graph, fresh(state))(*args, **kwargs)
        return [leaf for leaf in jax.tree.leaves(answer) if isinstance(leaf, jax.Array)]

    traced = quantize_function(call, Rules(())).report(state, *args, **kwargs).contractions
    hint = "no layer of nnx has an op for it: use a layer that has, or an AqtEinsum"
    rest = (dataclasses.replace(c, hint=hint) for c in traced if _REACHED not in c.path)
    return Report(rules, (*dict.fromkeys(found), *rest))


class AqtAttention(nnx.Module):
    """An attention function of nnx with its two contractions quantized by rules."""

    def __init__(self, fn: Callable[..., jax.Array], rules: Rules, *, rngs: nnx.Rngs | None):
        for rule in rules.rules:
            sides = () if rule.config is None else (rule.config.fwd.lhs, rule.config.fwd.rhs)
            if any(isinstance(side.calibration, StatisticsCalibration) for side in sides):
                raise ValueError(
                    "an attention's own contractions keep no statistics in nnx: calibrate them "
                    "dynamically, as by AbsMaxCalibration"
                )
        self.fn = fn
        self.rules = rules
        self.rngs = nnx.data(None if rngs is None else rngs.aqt.fork())

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """What the function answers."""
        context = Context(key=None if self.rngs is None else self.rngs())
        return quantize_function(self.fn, self.rules)(*args, context=context, **kwargs)


_MODULES = {
    "dot_general": AqtDotGeneral,
    "einsum_op": AqtEinsum,
    "conv_general_dilated": AqtConvGeneralDilated,
}
_PLAIN: dict[str, Callable[..., Any]] = {
    "dot_general": jax.lax.dot_general,
    "einsum_op": jnp.einsum,
    "conv_general_dilated": jax.lax.conv_general_dilated,
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Hook:
    """The attribute of a layer that it contracts by, and what it had there."""

    module: Any
    path: str
    attribute: str
    ops: tuple[str, ...]
    value: Callable[..., Any]

    def set(self, op: Any) -> None:
        status = nnx.data if isinstance(op, nnx.Module) else nnx.static
        setattr(self.module, self.attribute, status(op))


def _hooks(model: nnx.Module) -> Iterator[_Hook]:
    """The hooks of `model` that nobody has put anything into, in the order of its modules."""
    for place, module in list(nnx.iter_modules(model)):
        path = "/".join(map(str, place))
        match module:
            case nnx.MultiHeadAttention():
                yield _Hook(module, path, "attention_fn", _ATTENTION_OPS, module.attention_fn)
                continue
            case nnx.Linear() | nnx.LinearGeneral():
                attribute, op = "dot_general", "dot_general"
            case nnx.Einsum():
                attribute, op = "einsum_op", "einsum"
            case nnx.Conv():
                attribute, op = "conv_general_dilated", "conv_general_dilated"
            case _:
                continue
        given = (getattr(module, attribute), getattr(module, "dot_general_cls", None))
        if given[0] in (None, _PLAIN[attribute]) and given[1] is None:
            yield _Hook(module, path, attribute, (op,), _PLAIN[attribute])


def _noting(found: list[Contraction], hook: _Hook, *args: Any, **kwargs: Any) -> jax.Array:
    """What a hook that nothing was put into answers, its contractions noted."""
    if hook.attribute == "attention_fn":
        inner = quantize_function(hook.value, Rules(())).report(*args, **kwargs).contractions
        for op, contraction in zip(hook.ops, inner, strict=True):
            found.append(dataclasses.replace(contraction, path=hook.path, op=op))
    else:
        lhs, rhs = args[1:3] if hook.attribute == "einsum_op" else args[:2]
        found.append(
            Contraction(path=hook.path, op=hook.ops[0], lhs=operand(lhs), rhs=operand(rhs))
        )
    with jax.named_scope(_REACHED):
        return hook.value(*args, **kwargs)
