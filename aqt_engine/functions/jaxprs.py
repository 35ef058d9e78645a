"""Carrying out a jaxpr equation by equation, so that some of them can be replaced.

An equation is known by its path: its index among the equations of its jaxpr, after the paths of the
equations around it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax import lax
from jax.extend import core
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.extend.core import primitives as p

Path = tuple[int, ...]
Step = Callable[[JaxprEqn, list[Any], Path], Sequence[Any]]


def walk(
    body: ClosedJaxpr,
    args: Sequence[Any],
    step: Step,
    path: Path = (),
    *,
    lift: Callable[[Any], Any] = lambda constant: constant,
) -> list[Any]:
    """The results of `body`, of whatever kind `step` gives for an equation and its operands.

    `lift` makes an operand of a constant.
    """
    jaxpr = body.jaxpr
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, map(lift, body.consts), strict=True))
    known |= dict(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return lift(atom.val) if isinstance(atom, Literal) else known[atom]

    for index, eqn in enumerate(jaxpr.eqns):
        results = step(eqn, [read(atom) for atom in eqn.invars], (*path, index))
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def carry_out(eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """The results of an equation as it stands."""
    operands = {v: a for v, a in zip(eqn.invars, args, strict=True) if isinstance(v, Var)}
    about = core.DebugInfo("aqt", eqn.primitive.name, None, None)
    alone = Jaxpr((), list(operands), eqn.outvars, [eqn], eqn.effects, about)
    return list(core.jaxpr_as_fun(ClosedJaxpr(alone, ()))(*operands.values()))


def called(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """What an equation calls with just its operands; None where it is not such a call."""
    if eqn.primitive in (p.custom_jvp_call_p, p.custom_vjp_call_p):
        return eqn.params["call_jaxpr"]
    if eqn.primitive in (p.call_p, p.closed_call_p):
        return closed(eqn.params["call_jaxpr"])
    if eqn.primitive in (p.jit_p, p.remat_p):
        return closed(eqn.params["jaxpr"])
    return None


def closed(jaxpr: Jaxpr | ClosedJaxpr) -> ClosedJaxpr:
    """`jaxpr`, with the constants that it has or none."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """The equations of `jaxpr` and of all within it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def split(args: Sequence[Any], *counts: int) -> tuple[list[Any], ...]:
    """`args` in pieces of these lengths, and the rest."""
    pieces: list[list[Any]] = []
    for count in counts:
        pieces.append(list(args[:count]))
        args = args[count:]
    return (*pieces, list(args))


def scan(
    eqn: JaxprEqn,
    turn: Callable[[list[Any], list[Any], Any], tuple[list[Any], Any]],
    carry: list[Any],
    xs: list[Any],
    more: Any,
) -> tuple[list[Any], Any]:
    """A scan like that of `eqn`, with another body: its final carry, and what turns gave, stacked.

    `turn` gets a carry, a slice of `xs` and one of `more`.
    """
    return lax.scan(
        lambda carry, sliced: turn(carry, *sliced),
        carry,
        (xs, more),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
