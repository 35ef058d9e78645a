"""Conversion of any JAX function: its weights are quantized once, when it is converted.

The jaxpr of the training forward names each array that a tensor of ours was quantized to. What of
those depends on variables alone, and on no input, is computed beforehand and becomes an argument of
the serving forward; what led to it is read no more. So it matters neither on which side a weight
stands nor what is done to it before it is quantized, and no framework has to help. A weight that a
`scan` takes a slice of in each turn is quantized by a scan of its own, and served in slices.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jax.extend.core import primitives as p

from aqt_engine.convertible import ConversionError, Convertible, Inputs, Leaf, Serving, leaves_of
from aqt_engine.functions import jaxprs
from aqt_engine.functions.jaxprs import Path, walk
from aqt_engine.functions.quantized import QuantizedFunction
from aqt_engine.functions.substitution import Given, substituted
from aqt_engine.manifest import Role
from aqt_engine.qtensor import MARKS
from aqt_engine.streaming import Keep, as_it_is, in_turn

# The source of an array that stands in the program itself: any variable comes before it.
_CLOSURE = sys.maxsize


@dataclasses.dataclass(frozen=True, slots=True)
class Function(Convertible):
    """A function `fn(variables, **inputs)` whose contractions are ours, as it was trained.

    `variables` is any tree of arrays, and the names of its inputs are those of the example.
    """

    fn: Callable[..., Any]

    def train(self, variables: Any, inputs: Inputs) -> Any:
        """The function itself."""
        if isinstance(variables, Calibrated) and isinstance(self.fn, QuantizedFunction):
            calibrated = dataclasses.replace(self.fn, statistics=variables.statistics)
            return calibrated(variables.variables, **inputs)
        return self.fn(variables, **inputs)

    def serving(self, variables: Any, inputs: Inputs, keep: Keep = as_it_is) -> Serving:
        """The function with everything folded that variables alone decide.

        Raises:
          ConversionError: that is nothing, or something stands where it cannot be folded.
        """
        arrays = leaves_of(variables)
        traced = _trace(self.train, variables, inputs)[0]
        sites: dict[Path, _Site] = {}

        # Compiled, as training is: a search for the best scale depends on the order of its sums.
        def fold(variables: Any) -> list[jax.Array]:
            folder = _Folder({})
            known = [_Known(v, i) for i, v in enumerate(jax.tree.leaves(variables))]
            unknown = [None] * (len(traced.jaxpr.invars) - len(known))
            walk(traced, [*known, *unknown], folder.step, lift=_constant)
            sites.update(folder.found)
            return [site.value for site in sites.values()]

        values = in_turn(fold, keep, variables)
        if not any(site.role == "qvalue" for site in sites.values()):
            raise ConversionError(
                "the function quantizes no weight: contract with `aqt_engine` (a `DotGeneral` in "
                "the place of `jax.lax.dot_general`, `einsum`, ...), and pass the weights as "
                "variables, not as inputs"
            )
        folded, positions = _named(list(sites.values()), values, [leaf.name for leaf in arrays])

        def forward(values: Sequence[jax.Array], inputs: Inputs) -> Any:
            tree = jax.tree.unflatten(jax.tree.structure(variables), values[: len(arrays)])
            again, answer = _trace(self.train, variables, inputs)
            given = {
                path: Given(values[len(arrays) + position], site.loops)
                for (path, site), position in zip(sites.items(), positions, strict=True)
            }
            flat = [*jax.tree.leaves(tree), *jax.tree.leaves(dict(inputs))]
            return jax.tree.unflatten(answer, substituted(again, flat, given))

        return Serving(leaves=[*arrays, *folded], forward=forward)

    def calibrated(self, variables: Any, batches: Iterable[Inputs]) -> "Calibrated":
        """`variables` with the statistics of `batches`, for a function that rules quantize.

        Raises:
          ConversionError: it is no such function, or there is nothing to calibrate.
        """
        if not isinstance(self.fn, QuantizedFunction):
            raise ConversionError(
                "a function keeps no statistics unless `aqt_engine.functions.quantize` made it: "
                "quantize it by rules, or convert without calibrating"
            )
        calls = (((variables,), dict(batch)) for batch in batches)
        try:
            return Calibrated(variables, self.fn.calibrate_calls(calls).statistics)
        except ValueError as error:
            raise ConversionError(str(error)) from error


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["variables", "statistics"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, slots=True)
class Calibrated:
    """The variables of a function that rules quantize, with the statistics that it has learned."""

    variables: Any
    statistics: Any


@dataclasses.dataclass(frozen=True, slots=True)
class _Known:
    """A value that no input decides.

    `source` is the index of the first variable that does; None where the program alone does.
    """

    value: Any
    source: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Site:
    """An array to be stored, with the paths of the loops that it has a leading axis for."""

    value: Any
    source: int
    role: Role
    loops: tuple[Path, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Folder:
    """Carries out what no input decides; values are `_Known`, or None for those that one does."""

    found: dict[Path, _Site]

    def step(self, eqn: JaxprEqn, args: list[_Known | None], path: Path) -> Sequence[_Known | None]:
        if eqn.primitive is p.name_p and eqn.params["name"] in MARKS:
            if (known := args[0]) is not None and known.source is not None:
                role = MARKS[eqn.params["name"]]
                self.found.setdefault(path, _Site(known.value, known.source, role, ()))
            return args
        if (body := jaxprs.called(eqn)) is not None:
            return self._inside(body, args, path)
        if eqn.primitive is p.scan_p:
            return self._scan(eqn, args, path)
        if eqn.primitive is p.while_p:
            self._while(eqn, args, path)
        elif eqn.primitive is p.cond_p:
            for branch, body in enumerate(eqn.params["branches"]):
                self._inside(body, args[1:], (*path, branch))
        elif any(args) and any(map(_is_marked, core.jaxprs_in_params(eqn.params))):
            raise ConversionError(
                f"a contraction with a quantized weight stands inside `{eqn.primitive.name}`, "
                f"which conversion does not look into: apply `{eqn.primitive.name}` around the "
                f"served function rather than in it, or contract outside of it"
            )
        known = [arg for arg in args if arg is not None]
        if eqn.effects or len(known) < len(args):
            return [None] * len(eqn.outvars)
        source = min((k.source for k in known if k.source is not None), default=None)
        results = jaxprs.carry_out(eqn, [k.value for k in known])
        return [_Known(value, source) for value in results]

    def _inside(
        self, body: ClosedJaxpr, args: Sequence[_Known | None], path: Path
    ) -> list[_Known | None]:
        return walk(body, args, self.step, path, lift=_constant)

    def _while(self, eqn: JaxprEqn, args: list[_Known | None], path: Path) -> None:
        counts = (eqn.params["cond_nconsts"], eqn.params["body_nconsts"])
        condition, body, carry = jaxprs.split(args, *counts)
        for i, (name, consts) in enumerate((("body_jaxpr", body), ("cond_jaxpr", condition))):
            self._inside(eqn.params[name], [*consts, *[None] * len(carry)], (*path, i))

    def _scan(self, eqn: JaxprEqn, args: list[_Known | None], path: Path) -> list[_Known | None]:
        body = eqn.params["jaxpr"]
        consts, carry, xs = jaxprs.split(args, eqn.params["num_consts"], eqn.params["num_carry"])
        # What the constants of the loop decide is the same in every turn, and stored once.
        self._inside(body, [*consts, *[None] * (len(carry) + len(xs))], path)
        carry = _carried(body, consts, carry, xs)
        results, sites = list[_Known | None](), dict[Path, _Site]()

        def turn(carried: list[Any], sliced: list[Any], _: None) -> tuple[list[Any], Any]:
            varying = [*_refilled(carry, carried), *_refilled(xs, sliced)]
            folder = _Folder(dict(self.found))
            results[:] = walk(body, [*consts, *varying], folder.step, path, lift=_constant)
            # JAX may trace a turn more than once: the last time counts.
            sites.clear()
            sites.update({at: site for at, site in folder.found.items() if at not in self.found})
            left, ys = results[: len(carry)], results[len(carry) :]
            return _values(_where(carry, left)), (_values(ys), [s.value for s in sites.values()])

        final, (ys, new) = jaxprs.scan(eqn, turn, _values(carry), _values(xs), None)
        for (at, site), value in zip(sites.items(), new, strict=True):
            loops = (path, *site.loops)
            self.found[at] = dataclasses.replace(site, value=value, loops=loops)
        left, right = results[: len(carry)], results[len(carry) :]
        return [*_refilled(_where(carry, left), final), *_refilled(right, ys)]


def _trace(
    fn: Callable[[Any, Inputs], Any], variables: Any, inputs: Inputs
) -> tuple[ClosedJaxpr, Any]:
    """The jaxpr of `fn` over the leaves of variables, then inputs, and the tree of its answer."""

    traced, answer = jax.make_jaxpr(fn, return_shape=True)(variables, dict(inputs))
    return traced, jax.tree.structure(answer)


def _named(
    sites: Sequence[_Site], values: Sequence[jax.Array], variables: Sequence[str]
) -> tuple[list[Leaf], list[int]]:
    """The leaves to store, and for each site the position of its own: equal ones are stored once.

    A leaf is called after the variable that it was first computed from; others of that one and of
    the same role are numbered.
    """
    leaves: dict[str, Leaf] = {}
    positions: list[int] = []
    for site, value in zip(sites, values, strict=True):
        base, count = "closure" if site.source == _CLOSURE else variables[site.source], 0
        name = f"{base}/{site.role}"
        while name in leaves and not _same(leaves[name].value, value):
            count += 1
            name = f"{base}_{count}/{site.role}"
        leaves.setdefault(name, Leaf(name=name, value=value, role=site.role))
        positions.append(list(leaves).index(name))
    return list(leaves.values()), positions


def _same(a: jax.Array, b: jax.Array) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    )


def _constant(value: Any) -> _Known:
    return _Known(value, _CLOSURE if np.ndim(value) else None)


def _is_marked(jaxpr: core.Jaxpr) -> bool:
    return any(eqn.params.get("name") in MARKS for eqn in jaxprs.equations(jaxpr))


def _carried(
    body: ClosedJaxpr,
    consts: list[_Known | None],
    carry: list[_Known | None],
    xs: list[_Known | None],
) -> list[_Known | None]:
    """The carry, with None where any turn gives a value that an input decides."""

    def step(eqn: JaxprEqn, args: list[bool], path: Path) -> list[bool]:
        inner = jaxprs.called(eqn)
        if inner is not None:
            return walk(inner, args, step, path, lift=lambda _: True)
        return [all(args) and not eqn.effects] * len(eqn.outvars)

    while True:
        flags = [value is not None for value in (*consts, *carry, *xs)]
        results = walk(body, flags, step, lift=lambda _: True)[: len(carry)]
        kept = _where([known or None for known in results], carry)
        if kept.count(None) == carry.count(None):
            return carry
        carry = kept


def _where(condition: Sequence[Any], values: Sequence[_Known | None]) -> list[_Known | None]:
    """`values`, with None where `condition` has it."""
    return [None if c is None else v for c, v in zip(condition, values, strict=True)]


def _values(values: Sequence[_Known | None]) -> list[Any]:
    return [v.value for v in values if v is not None]


def _refilled(values: Sequence[_Known | None], new: Sequence[Any]) -> list[_Known | None]:
    """`values` with `new` in the place of those that are known."""
    left = iter(new)
    return [None if v is None else _Known(next(left), v.source) for v in values]
