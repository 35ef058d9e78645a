"""A jaxpr carried out with our contractions in the place of its own, in loops and branches too."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jax.extend.core import primitives as p
from jax.sharding import PartitionSpec

from aqt_engine.config import DotGeneral
from aqt_engine.context import Context
from aqt_engine.functions import jaxprs
from aqt_engine.functions.jaxprs import Path, walk
from aqt_engine.functions.sites import Site
from aqt_engine.qtensor import Scale
from aqt_engine.static import StaticSide
from aqt_engine.statistics import Statistics

SiteStatistics = Mapping[str, Mapping[str, Statistics]]
"""By the path of a contraction, then by its side, "lhs" or "rhs"."""


@dataclasses.dataclass(frozen=True, slots=True)
class Quantized:
    """A site with its configuration, and its sides whose bounds are learned."""

    site: Site
    config: DotGeneral
    static: Mapping[str, StaticSide]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["key", "statistics"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """What one turn of a loop, or the whole function, is given beside its arguments."""

    key: jax.Array | None
    statistics: SiteStatistics


_Results = tuple[list[Any], SiteStatistics]


@dataclasses.dataclass(frozen=True, slots=True)
class Rewriting:
    """Carries out jaxprs with `sites` quantized; where it `learns`, statistics are updated first.

    Every site draws noise with a key of its own, and so does every turn of a loop.
    """

    sites: Mapping[Path, Quantized]
    learns: bool

    def run(self, body: ClosedJaxpr, args: Sequence[Any], given: Turn, path: Path = ()) -> _Results:
        """The results of `body`, and the statistics of the sites in it where it learns."""
        learned: dict[str, Any] = {}

        def step(eqn: JaxprEqn, args: list[Any], path: Path) -> Sequence[Any]:
            if path in self.sites:
                results, new = self._contract(path, args, given)
            elif not self._below(path):
                return jaxprs.carry_out(eqn, args)
            elif eqn.primitive is p.remat_p:
                results, new = self._remat(eqn, args, given, path)
            elif (inner := jaxprs.called(eqn)) is not None:
                return walk(inner, args, step, path)
            else:
                below = {q.site.contraction.path for q in self._below(path)} & set(given.statistics)
                there = Turn(given.key, {name: given.statistics[name] for name in below})
                handlers = {p.scan_p: self._scan, p.while_p: self._while, p.cond_p: self._cond}
                handle = handlers.get(eqn.primitive, self._shard_map)
                results, new = handle(eqn, args, there, path)
            learned.update(new)
            return results

        return walk(body, args, step, path), learned

    def _below(self, path: Path) -> list[Quantized]:
        return [quantized for at, quantized in self.sites.items() if at[: len(path)] == path]

    def _contract(self, path: Path, args: list[Any], given: Turn) -> _Results:
        quantized = self.sites[path]
        name = quantized.site.contraction.path
        scales: dict[str, Scale] = {}
        learned: dict[str, Statistics] = {}
        for side, static in quantized.static.items():
            operand = args[0] if side == "lhs" else args[1]
            statistics = given.statistics[name][side]
            if self.learns:
                statistics = learned[side] = static.observed(statistics, operand)
            scales[f"{side}_scale"] = static.scale(statistics, operand)
        number = list(self.sites).index(path)
        context = Context(key=None if given.key is None else jax.random.fold_in(given.key, number))
        result = quantized.site.quantized(quantized.config, args, context, scales)
        return [result], {name: learned} if learned else {}

    def _remat(self, eqn: JaxprEqn, args: list[Any], given: Turn, path: Path) -> _Results:
        def body(args: list[Any], given: Turn) -> _Results:
            return self.run(jaxprs.closed(eqn.params["jaxpr"]), args, given, path)

        params = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
        return jax.checkpoint(body, **params)(args, given)

    def _scan(self, eqn: JaxprEqn, args: list[Any], given: Turn, path: Path) -> _Results:
        body = eqn.params["jaxpr"]
        consts, carry, xs = jaxprs.split(args, eqn.params["num_consts"], eqn.params["num_carry"])

        def turn(carry: list[Any], xs: list[Any], given: Turn) -> tuple[list[Any], Any]:
            results, learned = self.run(body, [*consts, *carry, *xs], given, path)
            return results[: len(carry)], (results[len(carry) :], learned)

        keys = None if given.key is None else jax.random.split(given.key, eqn.params["length"])
        turns = Turn(keys, given.statistics)
        final, (ys, learned) = jaxprs.scan(eqn, turn, carry, xs, turns)
        return [*final, *ys], learned

    def _while(self, eqn: JaxprEqn, args: list[Any], given: Turn, path: Path) -> _Results:
        counts = (eqn.params["cond_nconsts"], eqn.params["body_nconsts"])
        condition, consts, carry = jaxprs.split(args, *counts)

        def part(name: str, index: int, args: list[Any], count: jax.Array) -> list[Any]:
            key = None if given.key is None else jax.random.fold_in(given.key, count)
            return self.run(eqn.params[name], args, Turn(key, {}), (*path, index))[0]

        def going_on(state: tuple[jax.Array, list[Any]]) -> Any:
            return part("cond_jaxpr", 1, [*condition, *state[1]], state[0])[0]

        def turn(state: tuple[jax.Array, list[Any]]) -> tuple[jax.Array, list[Any]]:
            return state[0] + 1, part("body_jaxpr", 0, [*consts, *state[1]], state[0])

        return lax.while_loop(going_on, turn, (jnp.zeros((), jnp.int32), carry))[1], {}

    def _cond(self, eqn: JaxprEqn, args: list[Any], given: Turn, path: Path) -> _Results:
        def branch(index: int, body: ClosedJaxpr, given: Turn, args: list[Any]) -> _Results:
            results, learned = self.run(body, args, given, (*path, index))
            # A branch that is not taken learns nothing.
            return results, {**given.statistics, **learned} if self.learns else {}

        branches = [functools.partial(branch, i, b) for i, b in enumerate(eqn.params["branches"])]
        return lax.switch(args[0], branches, given, args[1:])

    def _shard_map(self, eqn: JaxprEqn, args: list[Any], given: Turn, path: Path) -> _Results:
        params = eqn.params
        axes = params["newly_manual_axes"]

        def shard(args: list[Any], key: jax.Array | None) -> list[Any]:
            if key is not None:
                for axis in sorted(axes):
                    key = jax.random.fold_in(key, lax.axis_index(axis))
            return self.run(jaxprs.closed(params["jaxpr"]), args, Turn(key, {}), path)[0]

        sharded = jax.shard_map(
            shard,
            mesh=params["mesh"],
            in_specs=(list(params["in_specs"]), PartitionSpec()),
            out_specs=list(params["out_specs"]),
            axis_names=axes,
            check_vma=params["check_vma"],
        )
        return sharded(args, given.key), {}
