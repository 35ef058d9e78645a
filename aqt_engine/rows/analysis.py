"""Which operations mix the rows of a batch, from the program alone.

Each value is followed from the inputs, whose first axis is the rows, to the outputs. What an output
owes to an operation that reads several rows is sure; what the rules cannot decide is left to the
proof by trial, and named by it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn

from aqt_engine.functions import jaxprs
from aqt_engine.rows.rules import RANDOM, RULES
from aqt_engine.rows.states import Along, Free, Mixed, Op, State, Unknown, joined, op_of


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """An output whose rows depend on each other: `op` `does` that."""

    output: str
    op: Op
    does: str

    def __str__(self) -> str:
        return f"output {self.output!r}: {self.op} {self.does}"


def mixing(
    forward: Callable[[Any, Mapping[str, Any]], Mapping[str, jax.Array]],
    variables: Any,
    inputs: Mapping[str, jax.ShapeDtypeStruct],
) -> list[Mixing]:
    """The outputs of `forward` of which it is sure that a row depends on others, and why."""
    closed, answer = jax.make_jaxpr(forward, return_shape=True)(variables, inputs)
    rows = next(iter(inputs.values())).shape[0]
    weights = len(jax.tree.leaves(variables))
    states = [Free()] * weights + [Along(0)] * (len(closed.jaxpr.invars) - weights)
    found = analyze(closed, states, rows)
    return [
        Mixing(output=name, op=state.op, does=state.does)
        for name, state in zip(answer, found, strict=True)
        if isinstance(state, Mixed)
    ]


def analyze(
    closed: ClosedJaxpr, states: Sequence[State], rows: int, within: Op | None = None
) -> list[State]:
    """The states of the results of a program, for those of its operands.

    `within` is the call that it is the program of.
    """

    def step(eqn: JaxprEqn, operands: list[State], _: jaxprs.Path) -> Sequence[State]:
        return results(eqn, operands, rows, within)

    return jaxprs.walk(closed, states, step, lift=lambda constant: Free())


def results(
    eqn: JaxprEqn, states: Sequence[State], rows: int, within: Op | None
) -> Sequence[State]:
    """The states of an equation's results, for those of its operands."""
    op = op_of(eqn, within)
    name, count = eqn.primitive.name, len(eqn.outvars)
    inner = jaxprs.called(eqn)
    if inner is not None:
        return analyze(inner, states, rows, op)
    if all(isinstance(state, Free) for state in states):
        drawn = Free(op) if name in RANDOM else joined(states)
        return [drawn] * count
    if name in _LOOPS:
        return _LOOPS[name](eqn, states, rows, op)
    rule = RULES.get(name)
    if rule is not None:
        # What an operand has mixed stays so, but for indices: a choice of rows may be undone.
        return rule(eqn, states, rows, op)
    return [Unknown()] * count


def _settled(body: Callable[[list[State]], list[State]], carry: Sequence[State]) -> list[State]:
    """The states of what a loop carries: those that its body leaves as they are."""
    before = list(carry)
    while True:
        after = [joined(pair) for pair in zip(before, body(before), strict=True)]
        if after == before:
            return after
        before = after


def _scan(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    consts, carry, xs = jaxprs.split(states, eqn.params["num_consts"], eqn.params["num_carry"])
    if any(isinstance(x, Along) and x.axis == 0 for x in xs):
        # A turn for each row: harmless as long as nothing is carried, which is not looked into.
        return [Unknown()] * len(eqn.outvars)
    sliced = [x.at(x.axis - 1) if isinstance(x, Along) else x for x in xs]
    body = jaxprs.closed(eqn.params["jaxpr"])

    def turn(carry: list[State]) -> list[State]:
        return analyze(body, [*consts, *carry, *sliced], rows, op)

    count = len(carry)
    carry = _settled(lambda carry: turn(carry)[:count], carry)
    stacked = turn(carry)[count:]
    return [*carry, *(y.at(y.axis + 1) if isinstance(y, Along) else y for y in stacked)]


def _while(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    params = eqn.params
    of_condition, of_body, carry = jaxprs.split(
        states, params["cond_nconsts"], params["body_nconsts"]
    )
    body = jaxprs.closed(params["body_jaxpr"])
    carry = _settled(lambda c: analyze(body, [*of_body, *c], rows, op), carry)
    condition = jaxprs.closed(params["cond_jaxpr"])
    (goes_on,) = analyze(condition, [*of_condition, *carry], rows, op)
    # How often it turns may depend on all rows and still change none: turns that do nothing.
    return carry if isinstance(goes_on, Free) else [Unknown()] * len(carry)


def _cond(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    which, *operands = states
    if not isinstance(which, Free):
        # Two branches that give a row the same bits would be a coincidence of the compiler's.
        return [Mixed(op, "is one choice for all rows, made of their values")] * len(eqn.outvars)
    branches = [
        analyze(jaxprs.closed(branch), operands, rows, op) for branch in eqn.params["branches"]
    ]
    return [joined(of) for of in zip(*branches, strict=True)]


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}
