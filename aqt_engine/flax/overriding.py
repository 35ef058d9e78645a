"""Other configurations for the AQT contractions that a linen model holds, by their places."""

import abc
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from aqt_engine.config import DotGeneral
from aqt_engine.convertible import ModelFactory
from aqt_engine.flax.conv import AqtConvGeneralDilated
from aqt_engine.flax.linen import AqtDotGeneral, AqtEinsum
from aqt_engine.rules import Rules

# As rules name them. A contraction that injection has placed is named after its op.
_OPS = (
    "dot_general",
    "einsum",
    "conv_general_dilated",
    "attend",
    "qk_attn_weights_einsum",
    "attn_weights_value_einsum",
)


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
        if not isinstance(module, AqtDotGeneral | AqtEinsum):
            return "/".join(module.path), ""
        *parent, name = module.path
        if name in _OPS:
            return "/".join(parent), name
        if isinstance(module, AqtEinsum):
            return "/".join(module.path), "einsum"
        path, op = self.place
        return path, op or op_name(module)


def overridden(factory: ModelFactory, rules: Rules) -> ModelFactory:
    """The linen models of `factory` with the configurations of their AQT contractions replaced.

    Where no rule matches, a contraction keeps its own; where one with `config` None does, it is
    left in float. It is for models that hold AQT modules already: `aqt_engine.flax.quantize` is for
    those that do not.
    """

    def choose(place: tuple[str, str], own: DotGeneral) -> DotGeneral | None:
        index = rules.first_match(*place)
        return own if index is None else rules.rules[index].config

    return lambda mode: _Overridden(factory(mode), choose)


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
    """`model` with other configurations; its variables are those of `model`."""

    model: nn.Module
    choose: Choose

    def setup(self):
        nn.share_scope(self, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(Override(self.choose)):
            return self.model(*args, **kwargs)


def op_name(module: AqtDotGeneral) -> str:
    """The operation of `jax.lax` that `module` stands for."""
    conv = isinstance(module, AqtConvGeneralDilated)
    return "conv_general_dilated" if conv else "dot_general"
