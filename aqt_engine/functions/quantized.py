"""Quantizes the contractions of any JAX function by rules, without a change to it.

    quantized = functions.quantize(logits, Rules((Rule(modules="mlp/.*", config=int8),)))
    quantized(params, x)                                     # differentiable, under jit, vmap
    quantized(params, x, context=Context(key=key))           # with noise, as of stochastic rounding
    rich.print(quantized.report(params, x).table())          # what got which rule
    convert(quantized, params, {"x": x}, "models/mine/1")

A contraction is known by the `jax.named_scope`s that it stands in, which Flax modules set too, and
its number among those that stand in the same: "encoder/mlp/0". It is quantized as it stands in the
function's own forward: give the loss, or what it calls, not a training step with its gradients.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from aqt_engine.context import Context
from aqt_engine.functions import sites
from aqt_engine.functions.jaxprs import Path
from aqt_engine.functions.rewriting import Quantized, Rewriting, SiteStatistics, Turn
from aqt_engine.functions.sites import Site
from aqt_engine.rules import Report, Rules
from aqt_engine.static import StaticSide


def quantize(fn: Callable[..., Any], rules: Rules) -> "QuantizedFunction":
    """`fn` with its contractions quantized by `rules`, the first that matches each; gradients too.

    Contractions are `jax.lax.dot_general` and all that is made of it, `conv_general_dilated` and
    `ragged_dot`, of floats, directly or inside `jit`, `scan`, `while_loop`, `cond`, `checkpoint`,
    `vmap` and `shard_map`. One inside a function with a derivative rule of its own is left as it
    is, and the report says so.
    """
    return QuantizedFunction(fn, rules)


# JAX keeps what it has compiled by weak references to functions.
@dataclasses.dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class QuantizedFunction:
    """A function quantized by rules. `statistics` are those that static calibration goes by."""

    fn: Callable[..., Any]
    rules: Rules
    statistics: SiteStatistics | None = None

    def __call__(self, *args: Any, context: Context = Context(), **kwargs: Any) -> Any:
        """What the function answers, with quantized contractions.

        Arguments are trees; what is no array in them stays as it is, and is seen by the function.

        Raises:
          RuleError: a rule has no effect on this function.
          ValueError: noise is drawn and `context` has no key, or a rule calibrates statically and
            the function was not calibrated.
        """
        traced = _Traced.of(self.fn, args, kwargs)
        quantized = self._checked(traced)
        # As constants they would be joined with those of other scales, in another order.
        statistics = jax.lax.optimization_barrier(self.statistics or {})
        for q in quantized.values():
            path = q.site.contraction.path
            if q.static and path not in statistics:
                raise ValueError(
                    f"{path!r} is calibrated statically and has no statistics: call `calibrate` "
                    f"with typical arguments, and use the function that it returns"
                )
        run = Rewriting(quantized, learns=False).run
        return traced.answer(run(traced.jaxpr, traced.arrays, Turn(context.key, statistics))[0])

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """Which contraction of a call with these arguments gets which rule; nothing is computed."""
        found = sites.find(_Traced.of(self.fn, args, kwargs).jaxpr)
        return Report(self.rules, tuple(site.contraction for site in found.values()))

    def empty_statistics(self, *args: Any, **kwargs: Any) -> SiteStatistics:
        """Statistics of nothing, for a function called with arguments like these.

        In a scan each turn has its own, along a leading axis.
        """
        quantized = self._checked(_Traced.of(self.fn, args, kwargs))
        return {
            q.site.contraction.path: {
                side: static.empty(getattr(q.site.contraction, side), q.site.turns)
                for side, static in q.static.items()
            }
            for q in quantized.values()
            if q.static
        }

    def observe(
        self, statistics: SiteStatistics, *args: Any, context: Context = Context(), **kwargs: Any
    ) -> tuple[Any, SiteStatistics]:
        """The answer with the statistics after this call, and those statistics."""
        traced = _Traced.of(self.fn, args, kwargs)
        run = Rewriting(self._checked(traced), learns=True).run
        results, learned = run(traced.jaxpr, traced.arrays, Turn(context.key, statistics))
        return traced.answer(results), {**statistics, **learned}

    def calibrate(self, calls: Iterable[Sequence[Any]]) -> "QuantizedFunction":
        """The same function with the statistics of `calls`, each the arguments of one.

        Raises:
          ValueError: there are no calls, no rule calibrates statically, or a contraction was not
            met in any of them.
        """
        return self.calibrate_calls((args, {}) for args in calls)

    def calibrate_calls(
        self, calls: Iterable[tuple[Sequence[Any], dict[str, Any]]]
    ) -> "QuantizedFunction":
        """As `calibrate`, of calls that have arguments by name too: trees of arrays."""
        statistics: SiteStatistics | None = None

        @jax.jit
        def observe(
            statistics: SiteStatistics, args: Sequence[Any], kwargs: dict[str, Any]
        ) -> SiteStatistics:
            return self.observe(statistics, *args, **kwargs)[1]

        for args, kwargs in calls:
            if statistics is None:
                statistics = self.empty_statistics(*args, **kwargs)
            statistics = observe(statistics, tuple(args), kwargs)
        if not statistics:
            raise ValueError(
                "there is nothing to calibrate: no calls were given, or no rule's configuration "
                "has a calibration that keeps statistics, such as MeanOfAbsMaxCalibration"
            )
        for path, by_side in statistics.items():
            if any((np.asarray(s["count"]) == 0).any() for s in by_side.values()):
                raise ValueError(
                    f"{path!r} was not met in every turn of any call: calibrate with arguments "
                    f"that lead there, or leave it in float by a rule"
                )
        return dataclasses.replace(self, statistics=statistics)

    def _checked(self, traced: "_Traced") -> dict[Path, Quantized]:
        found = sites.find(traced.jaxpr)
        Report(self.rules, tuple(site.contraction for site in found.values())).check()
        quantized = {at: self._quantized(site) for at, site in found.items()}
        return {at: q for at, q in quantized.items() if q is not None}

    def _quantized(self, site: Site) -> Quantized | None:
        contraction = site.contraction
        config = self.rules.for_contraction(contraction.path, contraction.op)
        if config is None or contraction.hint is not None:
            return None
        static: dict[str, StaticSide] = {}
        for side, axes in zip(("lhs", "rhs"), site.sides, strict=True):
            found = StaticSide.of(config, side, getattr(contraction, side).ndim, axes)
            if found is not None:
                static[side] = found
        if static and site.inside is not None:
            raise ValueError(
                f"{contraction.path!r} is calibrated statically inside `{site.inside}`, where no "
                f"statistics are kept: calibrate it dynamically, as by AbsMaxCalibration"
            )
        return Quantized(site, config, static)


@dataclasses.dataclass(frozen=True, slots=True)
class _Traced:
    """A call as a jaxpr over its arrays."""

    jaxpr: ClosedJaxpr
    arrays: list[Any]
    tree: Any

    @staticmethod
    def of(fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> "_Traced":
        leaves, tree = jax.tree.flatten((tuple(args), kwargs))
        places = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

        def over_arrays(arrays: list[Any]) -> Any:
            filled = list(leaves)
            for place, array in zip(places, arrays, strict=True):
                filled[place] = array
            args, kwargs = jax.tree.unflatten(tree, filled)
            return fn(*args, **kwargs)

        arrays = [leaves[place] for place in places]
        jaxpr, answer = jax.make_jaxpr(over_arrays, return_shape=True)(arrays)
        return _Traced(jaxpr, arrays, jax.tree.structure(answer))

    def answer(self, results: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.tree, results)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
