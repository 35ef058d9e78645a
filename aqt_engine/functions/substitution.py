"""A jaxpr with some of its values given: computed without what would have led to them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var
from jax.extend.core import primitives as p

from aqt_engine.functions import jaxprs
from aqt_engine.functions.jaxprs import Path, walk


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """What an equation would have resulted in.

    `loops` are the paths of the scans, from the outermost, for whose turns `value` has a leading
    axis each; in a loop that is not among them the value is the same in every turn.
    """

    value: jax.Array
    loops: tuple[Path, ...] = ()


def substituted(
    body: ClosedJaxpr, args: Sequence[Any], given: Mapping[Path, Given], path: Path = ()
) -> list[Any]:
    """The results of `body`, with those of its equations that are given by path.

    Raises:
      ValueError: what is given does not have the shape and dtype of what it stands for.
    """
    needed, _ = _needed(body, [True] * len(body.jaxpr.outvars), path, given)

    def step(eqn: JaxprEqn, args: list[Any], path: Path) -> Sequence[Any]:
        if path not in needed:
            return [None] * len(eqn.outvars)
        if (site := given.get(path)) is not None:
            return [_fitting(site.value, eqn.outvars[0].aval)]
        if not _any_below(path, given):
            return jaxprs.carry_out(eqn, args)
        if (inner := jaxprs.called(eqn)) is not None:
            return walk(inner, args, step, path)
        if eqn.primitive is p.scan_p:
            return _scan(eqn, args, path, given)
        if eqn.primitive is p.while_p:
            return _while(eqn, args, path, given)

        def branch(index: int, body: ClosedJaxpr) -> Callable[..., list[Any]]:
            return lambda *args: substituted(body, args, given, (*path, index))

        branches = [branch(i, body) for i, body in enumerate(eqn.params["branches"])]
        return lax.switch(args[0], branches, *args[1:])

    return walk(body, args, step, path)


def _needed(
    body: ClosedJaxpr, wanted: Sequence[bool], path: Path, given: Mapping[Path, Given]
) -> tuple[set[Path], list[bool]]:
    """The equations that the wanted results of `body` need, and whether they need each argument.

    The compiler leaves out what is not needed too, but not in the body of a while loop.
    """
    jaxpr, needed = body.jaxpr, set[Path]()
    live = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and _is_var(v)}
    for index, eqn in reversed(list(enumerate(jaxpr.eqns))):
        at, results = (*path, index), [v in live for v in eqn.outvars]
        if not any(results) and not eqn.effects:
            continue
        needed.add(at)
        used = [at not in given] * len(eqn.invars)
        if (inner := jaxprs.called(eqn)) is not None and _any_below(at, given):
            within, used = _needed(inner, results, at, given)
            needed |= within
        live |= {v for v, use in zip(eqn.invars, used, strict=True) if use and _is_var(v)}
    return needed, [v in live for v in jaxpr.invars]


def _any_below(path: Path, given: Mapping[Path, Given]) -> bool:
    return any(at[: len(path)] == path for at in given)


def _is_var(atom: Any) -> bool:
    return isinstance(atom, Var)


def _scan(eqn: JaxprEqn, args: list[Any], path: Path, given: Mapping[Path, Given]) -> list[Any]:
    consts, carry, xs = jaxprs.split(args, eqn.params["num_consts"], eqn.params["num_carry"])
    stacked = {at: site for at, site in given.items() if site.loops[:1] == (path,)}

    def turn(
        carry: list[Any], xs: list[Any], slices: list[jax.Array]
    ) -> tuple[list[Any], list[Any]]:
        turned = {
            at: Given(value, site.loops[1:])
            for (at, site), value in zip(stacked.items(), slices, strict=True)
        }
        body = eqn.params["jaxpr"]
        results = substituted(body, [*consts, *carry, *xs], {**given, **turned}, path)
        return results[: len(carry)], results[len(carry) :]

    values = [site.value for site in stacked.values()]
    final, ys = jaxprs.scan(eqn, turn, carry, xs, values)
    return [*final, *ys]


def _while(eqn: JaxprEqn, args: list[Any], path: Path, given: Mapping[Path, Given]) -> list[Any]:
    counts = (eqn.params["cond_nconsts"], eqn.params["body_nconsts"])
    condition, body, carry = jaxprs.split(args, *counts)

    def going_on(carry: list[Any]) -> Any:
        return substituted(eqn.params["cond_jaxpr"], [*condition, *carry], given, (*path, 1))[0]

    def turn(carry: list[Any]) -> list[Any]:
        return substituted(eqn.params["body_jaxpr"], [*body, *carry], given, (*path, 0))

    return lax.while_loop(going_on, turn, carry)


def _fitting(value: jax.Array, computed: Any) -> jax.Array:
    if (value.shape, value.dtype) != (computed.shape, computed.dtype):
        raise ValueError(
            f"{computed.dtype}{list(computed.shape)} is computed here, and given as "
            f"{value.dtype}{list(value.shape)}: a weight must be quantized alike for inputs of "
            f"every shape"
        )
    return value
