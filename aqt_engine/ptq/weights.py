"""The contractions of a linen model whose one side is a parameter, and what goes into them.

A weight is found by what the model does with it: the operand of a contraction is a parameter as it
stands, reshaped, transposed or cast, if the gradient of the operand's sum is one in each value of
that parameter and zero in all others.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from aqt_engine.config import DotGeneral, Tensor
from aqt_engine.convertible import ModelFactory
from aqt_engine.flax.conv import AqtConvGeneralDilated
from aqt_engine.flax.linen import AqtDotGeneral, numbered
from aqt_engine.modes import QuantMode
from aqt_engine.ops.axes import DotAxes
from aqt_engine.ops.conv import quantize_rhs as quantize_kernel
from aqt_engine.ops.dot_general import quantize_lhs, quantize_rhs
from aqt_engine.ops.windows import ConvAxes
from aqt_engine.ptq.forms import ConvForm, DotForm, Form
from aqt_engine.qtensor import QTensor
from aqt_engine.statistics import StatisticsCalibration

Variables = Mapping[str, Any]
Inputs = Mapping[str, Any]
Look = Callable[[jax.Array, jax.Array], Any]
"""What to keep of one contraction: of the weight, and of the operand that it is contracted with."""

_COLLECTION = "aqt_ptq"
_SIGNATURES = {
    kind: inspect.signature(kind.__call__) for kind in (AqtDotGeneral, AqtConvGeneralDilated)
}


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """One contraction: the path of its module, and the how manieth call of that it is."""

    path: tuple[str, ...]
    call: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One contraction with a parameter.

    `parameter` is the parameter's path in the collection `params`, and `stored` the name that
    CONVERT stores it under, in the module of the site. `tensor` is how it is quantized, and
    `quantize` does it, as the forward pass does; `tiled` says that the module does so in tiles.
    """

    parameter: tuple[str, ...]
    site: Site
    side: Literal["lhs", "rhs"]
    stored: str
    tiled: bool
    tensor: Tensor
    quantize: Callable[[jax.Array], QTensor]
    form: Form

    @property
    def layer(self) -> str:
        """The path of the module that has the parameter."""
        return "/".join(self.parameter[:-1])


class Weights:
    """The contractions with parameters that a model makes of `variables` and of `inputs`.

    They stand in the order in which the model computes them. Those inside of `nn.scan` or `nn.vmap`
    are not among them.
    """

    def __init__(self, model: ModelFactory, variables: Variables, inputs: Inputs):
        self._train = model(QuantMode.TRAIN)
        found = _converting(model(QuantMode.CONVERT), variables, inputs)
        parameters = self._parameters(variables, inputs, found)
        self._weights = [
            dataclasses.replace(weight, parameter=parameters[weight.site])
            for weight in found
            if weight.site in parameters
        ]

    def __iter__(self):
        return iter(self._weights)

    def look(
        self, variables: Variables, inputs: Inputs, looks: Sequence[tuple[Weight, Look]]
    ) -> list[Any]:
        """What each look gives of its contraction in the training forward. Can be traced."""
        wanted = {weight.site: (weight.side, look) for weight, look in looks}
        calls: dict[tuple[str, ...], int] = {}

        def watch(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if _is_contraction(context):
                called = context.module
                site = _next_site(calls, called)
                if site in wanted:
                    side, look = wanted[site]
                    given = _SIGNATURES[type(called)].bind(called, *args, **kwargs).arguments
                    other = "rhs" if side == "lhs" else "lhs"
                    called.sow(_COLLECTION, str(site.call), look(given[side], given[other]))
            return next_method(*args, **kwargs)

        _, kept = _run(self._train, variables, inputs, watch)

        def of(site: Site) -> Any:
            node = kept[_COLLECTION]
            for name in site.path:
                node = node[name]
            return node[str(site.call)][-1]

        return [of(weight.site) for weight, _ in looks]

    def operand(self, variables: Variables, inputs: Inputs, weight: Weight) -> jax.Array:
        """The weight as its contraction is given it."""
        return self.look(variables, inputs, [(weight, lambda w, _: w)])[0]

    def back(
        self, variables: Variables, inputs: Inputs, weight: Weight, operand: jax.Array
    ) -> jax.Array:
        """The parameter that its contraction is given as `operand`, in the parameter's layout."""
        parameter = at(variables["params"], weight.parameter)

        def forward(parameter: jax.Array) -> jax.Array:
            changed = replaced(variables, weight.parameter, parameter)
            return self.operand(changed, inputs, weight)

        # A permutation's transpose is its inverse.
        return jax.vjp(forward, parameter)[1](operand)[0]

    def _parameters(
        self, variables: Variables, inputs: Inputs, found: Sequence[Weight]
    ) -> dict[Site, tuple[str, ...]]:
        @jax.jit
        def ones(variables: Variables, inputs: Inputs) -> list[Any]:
            def operands(params: Any) -> list[jax.Array]:
                looks: list[tuple[Weight, Look]] = [(weight, lambda w, _: w) for weight in found]
                return self.look({**variables, "params": params}, inputs, looks)

            values, back = jax.vjp(operands, variables["params"])
            zeros = [jnp.zeros_like(value) for value in values]
            answers: list[Any] = []
            for i, value in enumerate(values):
                (gradients,) = back([*zeros[:i], jnp.ones_like(value), *zeros[i + 1 :]])
                sums = jax.tree.map(_some_and_all, gradients)
                answers.append((value.size, sums))
            return answers

        parameters: dict[Site, tuple[str, ...]] = {}
        shapes = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
        answers = ones(variables, inputs) if found else []
        for weight, (size, sums) in zip(found, answers, strict=True):
            leaves = jax.tree.leaves(sums, is_leaf=lambda x: isinstance(x, tuple))
            used = [
                (path, parameter.size, bool(one))
                for (path, parameter), (some, one) in zip(shapes, leaves, strict=True)
                if bool(some)
            ]
            if len(used) == 1 and used[0][1] == int(size) and used[0][2]:
                parameters[weight.site] = names(used[0][0])
        return parameters


def names(path: Any) -> tuple[str, ...]:
    """A key path as names; a metadata box is no name."""
    return tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def at(tree: Any, path: tuple[str, ...]) -> Any:
    """The array at `path`."""
    found = [
        leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0] if names(keys) == path
    ]
    return found[0]


def replaced(variables: Variables, path: tuple[str, ...], array: jax.Array) -> dict[str, Any]:
    """`variables` with another parameter at `path`."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(variables["params"])
    changed = [array if names(keys) == path else leaf for keys, leaf in leaves]
    return {**variables, "params": jax.tree.unflatten(tree, changed)}


def _some_and_all(gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.any(gradient != 0), jnp.all(gradient == 1)


def _converting(module: nn.Module, variables: Variables, inputs: Inputs) -> list[Weight]:
    """The contractions that CONVERT stores a quantized side of, in order."""
    found: list[Weight] = []
    calls: dict[tuple[str, ...], int] = {}

    def watch(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if _is_contraction(context):
            called = context.module
            site = _next_site(calls, called)
            bound = _SIGNATURES[type(called)].bind(called, *args, **kwargs)
            bound.apply_defaults()
            config = called.configuration()
            if config is not None:
                found.extend(_stored(site, called, bound.arguments, config))
        return next_method(*args, **kwargs)

    jax.eval_shape(functools.partial(_run, module, watch=watch), variables, dict(inputs))
    return found


def _stored(
    site: Site, called: AqtDotGeneral, given: Mapping[str, Any], config: DotGeneral
) -> list[Weight]:
    lhs, rhs = given["lhs"], given["rhs"]
    modes = {"lhs": called.lhs_quant_mode, "rhs": called.rhs_quant_mode}
    sides = [
        side
        for side, tensor in (("lhs", config.fwd.lhs), ("rhs", config.fwd.rhs))
        if modes[side] is QuantMode.CONVERT
        and tensor.is_quantized
        # Of these only the scale is stored.
        and not isinstance(tensor.calibration, StatisticsCalibration)
    ]
    if isinstance(called, AqtConvGeneralDilated):
        geometry = {
            name: given[name]
            for name in (
                "window_strides",
                "padding",
                "lhs_dilation",
                "rhs_dilation",
                "dimension_numbers",
                "feature_group_count",
                "batch_group_count",
            )
        }
        axes = ConvAxes.parse(lhs.shape, rhs.shape, *geometry.values())
        form: Form = ConvForm(axes, rhs.shape)
        quantize = functools.partial(quantize_kernel, axes=axes, config=config)
        return [_weight(site, called, "rhs", config, quantize, form)] if "rhs" in sides else []
    numbers = given["dimension_numbers"]
    weights: list[Weight] = []
    for side in sides:
        if side == "rhs":
            form = DotForm(DotAxes.parse(numbers, lhs.ndim, rhs.ndim), rhs.shape)
            quantize = functools.partial(
                quantize_rhs,
                lhs_ndim=lhs.ndim,
                dimension_numbers=numbers,
                config=config,
            )
        else:
            (lc, rc), (lb, rb) = numbers
            form = DotForm(DotAxes.parse(((rc, lc), (rb, lb)), rhs.ndim, lhs.ndim), lhs.shape)
            quantize = functools.partial(
                quantize_lhs,
                rhs_ndim=rhs.ndim,
                dimension_numbers=numbers,
                config=config,
            )
        weights.append(_weight(site, called, cast(Any, side), config, quantize, form))
    return weights


def _weight(
    site: Site,
    called: AqtDotGeneral,
    side: Literal["lhs", "rhs"],
    config: DotGeneral,
    quantize: Callable[[jax.Array], QTensor],
    form: Form,
) -> Weight:
    tensor = config.fwd.lhs if side == "lhs" else config.fwd.rhs
    name = called.lhs_var_name if side == "lhs" else called.rhs_var_name
    return Weight(
        parameter=(),
        site=site,
        side=side,
        stored=numbered(name, site.call),
        tiled=called.tiling is not None,
        tensor=tensor,
        quantize=quantize,
        form=form,
    )


def _is_contraction(context: Any) -> bool:
    return type(context.module) in _SIGNATURES and context.method_name == "__call__"


def _next_site(calls: dict[tuple[str, ...], int], called: nn.Module) -> Site:
    call = calls.get(called.path, 0)
    calls[called.path] = call + 1
    return Site(called.path, call)


def _run(module: nn.Module, variables: Variables, inputs: Inputs, watch: Any) -> Any:
    with nn.intercept_methods(watch):
        return module.apply(variables, inputs, method=_call, mutable=True)


def _call(module: nn.Module, inputs: Inputs) -> Any:
    return module(**inputs)
