"""What each primitive does to the bits of floats; of integers, every platform computes the same.

IEEE 754 says how one addition, one multiplication and one conversion is rounded. It leaves open
in what order a sum is added up, whether a product and the sum that follows are rounded once or
twice, and what an exponential is; dividing is left to approximations on some devices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from aqt_engine.portability.states import Exact, Narrowed, Product, State, joined
from aqt_engine.qtensor import POWER_OF_TWO
from aqt_engine.rows.states import Op


class NotPortable(Exception):
    """An equation's bits depend on the platform; the message says why, and what to do."""


Rule = Callable[[JaxprEqn, Sequence[State], Op], State]

_SCALES = "set `po2_scale=True` on both sides of the contraction before it"
_SUMS = "add up with `aqt_engine.ops.ordered_sum` or `ordered_mean`, or quantize it to integers"


def dtype_of(atom: Any) -> Any:
    """The dtype of a value of a jaxpr."""
    return atom.aval.dtype


def is_float(atom: Any) -> bool:
    """Whether a value of a jaxpr is of a float dtype."""
    return jnp.issubdtype(dtype_of(atom), jnp.floating)


def rule_for(name: str) -> Rule | None:
    """The rule of a primitive; None where there is none, and so no promise."""
    return _RULES.get(name)


def _copied(eqn: JaxprEqn, states: Sequence[State], op: Op) -> State:
    """Moves values, and computes none. Integers among the operands are places."""
    return joined(s for atom, s in zip(eqn.invars, states, strict=True) if is_float(atom))


def _named(eqn: JaxprEqn, states: Sequence[State], op: Op) -> State:
    return Exact(power_of_two=True) if eqn.params["name"] == POWER_OF_TWO else states[0]


def _compared(eqn: JaxprEqn, states: Sequence[State], op: Op) -> State:
    """Depends on the rounded values of its operands alone, and rounds them if they are not yet."""
    for atom, state in zip(eqn.invars, states, strict=True):
        if is_float(atom):
            _require_wide(state)
    return Exact()


def _sign(eqn: JaxprEqn, states: Sequence[State], op: Op) -> State:
    _compared(eqn, states, op)
    return Exact(power_of_two=True)


def _negated(eqn: JaxprEqn, states: Sequence[State], op: Op) -> State:
    return states[0]


def _multiplied(eqn: JaxprEqn, states: Sequence[State], op: Op) -> State:
    left, right = states
    _require_wide(left)
    _require_wide(right)
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Exact) and one.power_of_two:
            return other
    _require_float32(eqn)
    for state in states:
        if isinstance(state, Product):
            raise NotPortable(
                f"multiplies the product of {state.op}, and the order of three factors is the "
                f"compiler's: {_SCALES}"
            )
    return Product(op)


def _added(eqn: JaxprEqn, states: Sequence[State], op: Op) -> State:
    for state in states:
        _require_wide(state)
        if isinstance(state, Product):
            raise NotPortable(
                f"adds to the product of {state.op}, and both may be rounded at once: {_SCALES}"
            )
    _require_float32(eqn)
    return Exact()


def _divided(eqn: JaxprEqn, states: Sequence[State], op: Op) -> State:
    if isinstance(states[1], Exact) and states[1].power_of_two:
        return _multiplied(eqn, states, op)
    raise NotPortable(
        "divides, which devices approximate: divide by a power of two, or multiply by a constant"
    )


def _power(eqn: JaxprEqn, states: Sequence[State], op: Op) -> State:
    if eqn.params["y"] == 2:
        return _squared(eqn, states, op)
    raise NotPortable("is a division or several products: write out the products")


def _squared(eqn: JaxprEqn, states: Sequence[State], op: Op) -> State:
    return _multiplied(eqn, [states[0], states[0]], op)


def _converted(eqn: JaxprEqn, states: Sequence[State], op: Op) -> State:
    before, after = dtype_of(eqn.invars[0]), dtype_of(eqn.outvars[0])
    if jnp.issubdtype(before, jnp.bool_):
        return Exact(power_of_two=True)
    if jnp.issubdtype(before, jnp.integer):
        bits = jnp.iinfo(before).bits
        fits = bits <= jnp.finfo(after).nmant + 1 or jnp.finfo(after).bits >= 32
        return Exact() if fits else Narrowed(op)
    _require_wide(states[0])
    if not jnp.issubdtype(after, jnp.floating):
        return Exact()
    if jnp.finfo(after).bits >= jnp.finfo(before).bits:
        return states[0]
    if isinstance(states[0], Exact) and states[0].power_of_two:
        return states[0]
    return Narrowed(op)


def _rounded(eqn: JaxprEqn, states: Sequence[State], op: Op) -> State:
    _require_wide(states[0])
    return Exact()


def _summed(eqn: JaxprEqn, states: Sequence[State], op: Op) -> State:
    raise NotPortable(f"adds up floats in an order of the compiler's: {_SUMS}")


def _contracted(eqn: JaxprEqn, states: Sequence[State], op: Op) -> State:
    raise NotPortable(
        "sums products of floats in an order of the compiler's: quantize both sides to integers, "
        "with an int32 accumulator"
    )


def _approximated(eqn: JaxprEqn, states: Sequence[State], op: Op) -> State:
    raise NotPortable(
        "is approximated, otherwise on each platform: use a function of comparisons and products, "
        "as ReLU is"
    )


def _require_wide(state: State) -> None:
    if isinstance(state, Narrowed):
        raise NotPortable(
            f"computes with what {state.op} has narrowed, of which a compiler may keep more bits: "
            f"narrow the model's outputs only"
        )


def _require_float32(eqn: JaxprEqn) -> None:
    dtype = dtype_of(eqn.outvars[0])
    if jnp.finfo(dtype).bits < 32:
        raise NotPortable(
            f"computes in {dtype.name}, for which compilers take more bits as they like: compute "
            f"in float32"
        )


def _all(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Rule] = {
    **_all(
        _copied,
        "broadcast_in_dim reshape transpose squeeze expand_dims slice dynamic_slice "
        "dynamic_update_slice rev gather concatenate pad select_n copy copy_p split "
        "optimization_barrier aqt_materialize aqt_materialize_on_cpu sharding_constraint "
        "stop_gradient",
    ),
    **_all(
        _compared,
        "max min abs clamp round floor ceil reduce_max reduce_min argmax argmin sort top_k cummax "
        "cummin eq ne lt le gt ge is_finite bitcast_convert_type select_and_gather_add "
        "reduce_window_max reduce_window_min",
    ),
    **_all(
        _approximated,
        "exp exp2 expm1 log log1p log2 tanh sin cos tan asin acos atan atan2 sinh cosh asinh acosh "
        "atanh erf erfc erf_inv logistic sqrt rsqrt cbrt pow lgamma digamma nextafter rem",
    ),
    **_all(
        _summed,
        "reduce_sum reduce_prod cumsum cumprod cumlogsumexp reduce_window_sum scatter-add "
        "reduce_precision_sum",
    ),
    **_all(_contracted, "dot_general conv_general_dilated ragged_dot_general"),
    "name": _named,
    "sign": _sign,
    "neg": _negated,
    "mul": _multiplied,
    "add": _added,
    "sub": _added,
    "add_any": _added,
    "div": _divided,
    "integer_pow": _power,
    "square": _squared,
    "convert_element_type": _converted,
    "reduce_precision": _rounded,
    "iota": lambda eqn, states, op: Exact(),
}
