"""Other configurations for the AQT contractions that a linen model holds, by their places."""

import abc
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from aqt_engine.config import DotGeneral
from aqt_engine.convertible import ModelFactory
from aqt_engine.flax.conv import AqtConvGeneralDilated
from aqt_engine.flax.layers import ATTENTION_OPS
from aqt_engine.flax.linen import AqtDotGeneral, AqtEinsum
from aqt_engine.modes import QuantMode
from aqt_engine.rules import Contraction, Report, Rules

# As rules name them. A contraction that injection has placed is named after its op.
_OPS = ("dot_general", "einsum", "conv_general_dilated", "attend", *ATTENTION_OPS)

# What a module is called that was made before it came to share its wrapper's scope: its path keeps
# the name, though its variables do not.
_WRAPPED = "wrapped_model"


class LayerInterceptor(abc.ABC):
    """An interceptor for `nn.intercept_methods` that knows the place of each contraction.

    A place is the path of a layer and an op, as rules name them: ("encoder/Dense_0",
    "dot_general"). A contraction module that several layers share is a part of each.
    """

    def __init__(self):
        self._places: list[tuple[str, str]] = [("", "")]

    @property
    def place(self) -> tuple[str, str]:
        """The path of the layer that is being called, and the op that it contracts by."""
        return self._places[-1]

    def __call__(
        self,
        next_method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Keeps count of layers, and gives the methods of contractions to `contraction`."""
        module = context.module
        if context.method_name == "setup":
            return next_method(*args, **kwargs)
        self._places.append(self._entered(module))
        try:
            if isinstance(module, AqtDotGeneral):
                return self.contraction(module, context.method_name, next_method, args, kwargs)
            return next_method(*args, **kwargs)
        finally:
            self._places.pop()

    @abc.abstractmethod
    def contraction(
        self,
        module: AqtDotGeneral,
        method: str,
        next_method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What `next_method`, which is `method` of `module`, is to give for these arguments."""

    def _entered(self, module: nn.Module) -> tuple[str, str]:
        names = [name for name in module.path if name != _WRAPPED]
        if not isinstance(module, AqtDotGeneral | AqtEinsum):
            return "/".join(names), ""
        *parent, name = names
        if name in _OPS:
            return "/".join(parent), name
        if isinstance(module, AqtEinsum):
            return "/".join(names), "einsum"
        path, op = self.place
        return path, op or op_name(module)


def overridden(factory: ModelFactory, rules: Rules) -> ModelFactory:
    """The linen models of `factory` with the configurations of their AQT contractions replaced.

    Where no rule matches, a contraction keeps its own; where one with `config` None does, it is
    left in float. It is for models that hold AQT modules already: `aqt_engine.flax.quantize` is for
    those that do not. As there, rules without effect are an error when a model is initialized, and
    in CONVERT.
    """

    def made(mode: QuantMode) -> nn.Module:
        return _Overridden(factory(mode), rules, mode)

    return made


Choose = Callable[[tuple[str, str], DotGeneral], DotGeneral | None]


class Override(LayerInterceptor):
    """Gives each contraction the configuration that `choose` makes of its place and its own."""

    def __init__(self, choose: Choose):
        super().__init__()
        self._choose = choose

    def contraction(
        self,
        module: AqtDotGeneral,
        method: str,
        next_method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Answers for `configuration`; everything else is left as it is."""
        answer = next_method(*args, **kwargs)
        if method != "configuration" or answer is None:
            return answer
        return self._choose(self.place, answer)


class _Overridden(nn.Module):
    """A model with other configurations; its variables are those of the model."""

    wrapped_model: nn.Module
    rules: Rules
    mode: QuantMode

    def setup(self):
        nn.share_scope(self, self.wrapped_model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        met: dict[tuple[str, str], None] = {}

        def choose(place: tuple[str, str], own: DotGeneral) -> DotGeneral | None:
            met[place] = None
            index = self.rules.first_match(*place)
            return own if index is None else self.rules.rules[index].config

        with nn.intercept_methods(Override(choose)):
            answer = self.wrapped_model(*args, **kwargs)
        if self.is_initializing() or self.mode is QuantMode.CONVERT:
            unseen = jax.ShapeDtypeStruct((), jnp.float32)
            places = (Contraction(path=p, op=op, lhs=unseen, rhs=unseen) for p, op in met)
            Report(self.rules, tuple(places)).check()
        return answer


def op_name(module: AqtDotGeneral) -> str:
    """The operation of `jax.lax` that `module` stands for."""
    conv = isinstance(module, AqtConvGeneralDilated)
    return "conv_general_dilated" if conv else "dot_general"
