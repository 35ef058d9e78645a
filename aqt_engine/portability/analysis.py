"""Which operations of a serving forward give other bits on other platforms, from the program alone.

Values are followed from inputs and weights to outputs. What has the same bits everywhere stays so
through integer arithmetic, comparisons, moves, products with powers of two, and single additions.
An operation that breaks it is a finding; what follows is looked at as if it had not, so that a
report names causes and no consequences.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn

from aqt_engine.convertible import Serving
from aqt_engine.functions import jaxprs
from aqt_engine.portability.rules import NotPortable, dtype_of, is_float, rule_for
from aqt_engine.portability.states import Exact, State, constant, joined
from aqt_engine.rows.states import Op, op_of


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """An operation whose bits depend on the platform; `why` says that, and what to do."""

    op: Op
    why: str

    def __str__(self) -> str:
        return f"{self.op} {self.why}"


def findings(serving: Serving, inputs: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[Finding, ...]:
    """The operations of a serving forward that are not portable; none if its bits are.

    Scales are looked at: products with those that are powers of two are exact. Numbers smaller than
    the smallest normal float are left out of the promise, as some devices take them for zero.
    """
    values = [leaf.value for leaf in serving.leaves]
    closed = jax.make_jaxpr(serving.forward)(values, dict(inputs))
    others = len(closed.jaxpr.invars) - len(values)
    states = [*map(constant, values), *[Exact()] * others]
    found: dict[Finding, None] = {}
    _analyze(closed, states, None, lambda finding: found.setdefault(finding))
    return tuple(found)


_Note = Callable[[Finding], None]
_Within = Op | None


def _analyze(
    closed: ClosedJaxpr, states: Sequence[State], within: _Within, note: _Note
) -> list[State]:
    def step(eqn: JaxprEqn, operands: list[State], _: jaxprs.Path) -> Sequence[State]:
        return _results(eqn, operands, within, note)

    return jaxprs.walk(closed, states, step, lift=constant)


def _results(
    eqn: JaxprEqn, states: Sequence[State], within: _Within, note: _Note
) -> Sequence[State]:
    op, count = op_of(eqn, within), len(eqn.outvars)
    inner = jaxprs.called(eqn)
    if inner is not None:
        return _analyze(inner, states, op, note)
    if eqn.primitive.name in _LOOPS:
        return _LOOPS[eqn.primitive.name](eqn, states, op, note)
    if _is_random(eqn):
        note(Finding(op=op, why="draws random numbers: serve a model that draws none"))
        return [Exact()] * count
    if not any(map(is_float, (*eqn.invars, *eqn.outvars))):
        return [Exact()] * count
    rule = rule_for(eqn.primitive.name)
    try:
        if rule is None:
            raise NotPortable("is not known to give the same bits everywhere: leave it out")
        return [rule(eqn, states, op)] * count
    except NotPortable as reason:
        note(Finding(op=op, why=str(reason)))
        return [Exact()] * count


def _is_random(eqn: JaxprEqn) -> bool:
    drawn = any(jnp.issubdtype(dtype_of(v), jax.dtypes.prng_key) for v in eqn.outvars)
    return drawn or eqn.primitive.name in ("random_bits", "rng_bit_generator", "rng_uniform")


def _scan(eqn: JaxprEqn, states: Sequence[State], within: _Within, note: _Note) -> Sequence[State]:
    params = eqn.params
    consts, carry, xs = jaxprs.split(states, params["num_consts"], params["num_carry"])
    body, count = jaxprs.closed(params["jaxpr"]), params["num_carry"]

    def turn(carry: Sequence[State]) -> list[State]:
        return _analyze(body, [*consts, *carry, *xs], within, note)

    carry = _settled(lambda c: turn(c)[:count], carry)
    return [*carry, *turn(carry)[count:]]


def _while(eqn: JaxprEqn, states: Sequence[State], within: _Within, note: _Note) -> Sequence[State]:
    params = eqn.params
    of_condition, of_body, carry = jaxprs.split(
        states, params["cond_nconsts"], params["body_nconsts"]
    )
    body = jaxprs.closed(params["body_jaxpr"])
    carry = _settled(lambda c: _analyze(body, [*of_body, *c], within, note), carry)
    _analyze(jaxprs.closed(params["cond_jaxpr"]), [*of_condition, *carry], within, note)
    return carry


def _cond(eqn: JaxprEqn, states: Sequence[State], within: _Within, note: _Note) -> Sequence[State]:
    branches = [
        _analyze(jaxprs.closed(branch), states[1:], within, note)
        for branch in eqn.params["branches"]
    ]
    return [joined(of) for of in zip(*branches, strict=True)]


def _settled(
    body: Callable[[Sequence[State]], Sequence[State]], carry: Sequence[State]
) -> Sequence[State]:
    """What a loop carries, as its body leaves it."""
    while (after := [joined(p) for p in zip(carry, body(carry), strict=True)]) != list(carry):
        carry = after
    return carry


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}
