"""Quantizes an unmodified Flax linen model by rules.

    factory = quantize(model, rules)
    variables = factory(QuantMode.TRAIN).init(key, x)      # the same parameters, by the same names
    convert(factory, variables, {"x": x}, "models/mine/1")

A weight is the right side of its layer's contraction, and follows the mode. Activations, and both
sides in an attention, are quantized on every call, except for static calibration, which follows the
mode too. What is stored lies in the layer's own scope: `aqt/Dense_0/dot_general/qrhs`. A layer
under `nn.scan` or `nn.vmap` stores only what that transform carries: its `variable_axes` have to
name "aqt", and "aqt_statistics" where calibration is static.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from aqt_engine.config import DotGeneral, Tensor
from aqt_engine.flax.conv import AqtConvGeneralDilated
from aqt_engine.flax.layers import ATTENTION_OPS, Hook, intercepting
from aqt_engine.flax.linen import AqtDotGeneral, AqtEinsum
from aqt_engine.flax.tracing import trace
from aqt_engine.modes import QuantMode
from aqt_engine.rules import Report, Rules
from aqt_engine.statistics import StatisticsCalibration


def quantize(model: nn.Module, rules: Rules) -> Callable[[QuantMode], nn.Module]:
    """The function from a mode to `model` quantized by `rules`, which `convert` takes.

    When the result is initialized, and in CONVERT, rules without effect are an error.
    """
    check = functools.partial(_check, model, rules)
    return lambda mode: Quantized(model, rules, mode, check)


def report(model: nn.Module, rules: Rules, *args: Any, **kwargs: Any) -> Report:
    """Which contraction of `model`, called with these arguments, gets which rule.

    Nothing is computed: an array may be a `jax.ShapeDtypeStruct`. Contractions that no layer's hook
    reaches are listed with what to do about them.
    """
    return Report(rules, trace(model, args, kwargs))


class Quantized(nn.Module):
    """`model` with its contractions quantized by `rules`. Made by `quantize`.

    Its variables are those of `model`. Called, it calls the model; `run` calls another method.
    """

    model: nn.Module
    rules: Rules
    mode: QuantMode
    check: Callable[..., None]

    def setup(self):
        """Takes the model's place in the tree of variables."""
        nn.share_scope(self, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model answers.

        Raises:
          RuleError: while initializing or in CONVERT, if a rule has no effect.
        """
        if self.is_initializing() or self.mode is QuantMode.CONVERT:
            self.check(*args, **kwargs)
        return self.run(lambda model: model(*args, **kwargs))

    def run(self, method: Callable[[Any], Any]) -> Any:
        """What `method` of the model answers.

        `apply(variables, x, method=lambda q, x: q.run(lambda model: model.encode(x)))`.
        """
        with intercepting(self._hook, (self.rules, self.mode)):
            return method(self.model)

    def _hook(self, path: str, op: str) -> Hook | None:
        config = self.rules.for_contraction(path, op)
        return None if config is None else _quantized(config, op, self.mode)


def _quantized(config: DotGeneral, op: str, mode: QuantMode) -> Hook:
    """The linen module that computes `op` by `config`, not yet bound to a scope."""
    if op == "conv_general_dilated":
        cls = AqtConvGeneralDilated
    elif op.endswith("einsum"):
        cls = AqtEinsum
    else:
        cls = AqtDotGeneral
    return cls(
        config,
        lhs_quant_mode=_mode(config.fwd.lhs, mode, is_weight=False),
        rhs_quant_mode=_mode(config.fwd.rhs, mode, is_weight=op not in ATTENTION_OPS),
        parent=None,
    )


def _mode(tensor: Tensor, mode: QuantMode, *, is_weight: bool) -> QuantMode:
    static = isinstance(tensor.calibration, StatisticsCalibration)
    return mode if is_weight or static else QuantMode.TRAIN


def _check(model: nn.Module, rules: Rules, *args: Any, **kwargs: Any) -> None:
    report(model, rules, *args, **kwargs).check()
