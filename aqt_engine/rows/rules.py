"""How each primitive carries rows from its operands to its results."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.extend.core import JaxprEqn

from aqt_engine.rows.states import Along, Free, Mixed, Op, State, Unknown, joined

Rule = Callable[[JaxprEqn, Sequence[State], int, Op], Sequence[State]]
"""The states of an equation's results, for those of its operands and the number of rows."""

_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
    clz complex conj convert_element_type copy copy_p cos cosh device_put digamma div eq eq_to erf
    erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le le_to
    lgamma log log1p logistic lt lt_to max min mul mulhi name ne neg nextafter not
    aqt_materialize aqt_materialize_on_cpu optimization_barrier or polygamma population_count pow
    real reduce_precision
    regularized_incomplete_beta rem round rsqrt sharding_constraint shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh
    xor zeta
"""
_REDUCTIONS = "reduce reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor"
_SUMS = "cumsum cumprod cummax cummin cumlogsumexp"
_WINDOWS = "reduce_window reduce_window_sum reduce_window_max reduce_window_min"
_SCATTERS = "scatter scatter-add scatter-mul scatter-min scatter-max"
_DRAWS = "random_bits random_gamma rng_bit_generator rng_uniform threefry2x32 philox2x32 philox4x32"
RANDOM = frozenset(_DRAWS.split())


def elementwise(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    """Operands of one shape, or scalars."""
    found = joined(states)
    if isinstance(found, Along):
        for operand, state in zip(eqn.invars, states, strict=True):
            shape = _shape(operand)
            if isinstance(state, Free) and state.random and shape and shape[found.axis] > 1:
                return [Mixed(state.random, "draws other random numbers for each row")]
    return [found] * len(eqn.outvars)


def _select(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    which, *cases = states
    mixed = [case for case in cases if isinstance(case, Mixed)]
    if isinstance(which, Free) and not which.random and 0 < len(mixed) < len(cases):
        # Variables choose, as where a scale is learned if there is none: they may not choose this.
        return [Unknown()]
    return elementwise(eqn, states, rows, op)


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _bitcast(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    (state,) = states
    # Between widths, the last axis comes or goes.
    narrower = min(len(_shape(eqn.invars[0])), len(_shape(eqn.outvars[0])))
    return [Unknown() if isinstance(state, Along) and state.axis >= narrower else state]


def _reduce(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    axes = eqn.params["axes" if "axes" in eqn.params else "dimensions"]
    return [_without(joined(states), axes, op, "reduces over the rows")] * len(eqn.outvars)


def _without(state: State, axes: Sequence[int], op: Op, does: str) -> State:
    """`state` of a value that loses `axes`."""
    if not isinstance(state, Along):
        return state
    if state.axis in axes:
        return Mixed(op, does)
    return state.at(state.axis - sum(axis < state.axis for axis in axes))


def _along_axis(does: str, axis_of: Callable[[Mapping[str, Any]], int]) -> Rule:
    """For what works along one axis and leaves the shape, but for that axis's size."""

    def rule(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
        found = joined(states)
        ndim = len(_shape(eqn.invars[0]))
        if isinstance(found, Along) and found.axis == axis_of(eqn.params) % max(ndim, 1):
            found = Mixed(op, does)
        return [found] * len(eqn.outvars)

    return rule


def _broadcast(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    (state, *_) = states
    if isinstance(state, Along):
        state = state.at(eqn.params["broadcast_dimensions"][state.axis])
    return [state]


def _reshape(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    state, shape = states[0], _shape(eqn.outvars[0])
    if isinstance(state, Along):
        state = reshaped(state, _shape(eqn.invars[0]), shape, rows)
    return [state]


def reshaped(state: Along, old: Sequence[int], new: Sequence[int], rows: int) -> State:
    """Where the rows are when a value of shape `old` is given shape `new`."""
    if 0 in old:
        return Unknown()
    inner = state.inner * math.prod(old[state.axis + 1 :])
    for axis, size in enumerate(new):
        after = math.prod(new[axis + 1 :])
        if inner % after == 0 and size % (inner // after * rows) == 0:
            return Along(axis, size // (inner // after * rows), inner // after)
    return Unknown()


def _transpose(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    (state,) = states
    if isinstance(state, Along):
        state = state.at(list(eqn.params["permutation"]).index(state.axis))
    return [state]


def _squeeze(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    return [_without(states[0], eqn.params["dimensions"], op, "squeezes the rows")]


def _rev(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    (state,) = states
    if isinstance(state, Along) and state.axis in eqn.params["dimensions"]:
        return [Mixed(op, "reverses the rows")]
    return [state]


def _slice(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    state = states[0]
    if not isinstance(state, Along):
        return [state]
    axis, params = state.axis, eqn.params
    size = _shape(eqn.invars[0])[axis]
    start, end = params["start_indices"][axis], params["limit_indices"][axis]
    step = 1 if params["strides"] is None else params["strides"][axis]
    whole = rows * state.inner
    if step == 1 and (start, end) == (0, size):
        return [state]
    if step == 1 and start % whole == 0 and end % whole == 0 and end > start:
        return [Along(axis, (end - start) // whole, state.inner)]
    # Some of the rows: whether they come back to where they were, the rest of the model decides.
    return [Unknown()]


def _dynamic_slice(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    operand, *starts = states
    if not all(isinstance(start, Free) for start in starts):
        return [Unknown()]
    if isinstance(operand, Along):
        axis = operand.axis
        if eqn.params["slice_sizes"][axis] != _shape(eqn.invars[0])[axis]:
            return [Unknown()]
    return [operand]


def _dynamic_update_slice(
    eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op
) -> Sequence[State]:
    operand, update, *starts = states
    found = joined((operand, update))
    if not all(isinstance(start, Free) for start in starts):
        return [Unknown()]
    if isinstance(found, Along):
        shapes = [_shape(var)[found.axis] for var in eqn.invars[:2]]
        if shapes[0] != shapes[1]:
            return [Unknown()]
    return [found]


def _concatenate(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    found, axis = joined(states), eqn.params["dimension"]
    alike = [s for s in states if isinstance(s, Along) and s.axis == axis and s.inner == 1]
    if len(alike) == len(states):
        return [Along(axis, sum(s.outer for s in alike))]
    if isinstance(found, Along) and found.axis == axis:
        return [Unknown()]
    return [found]


def _pad(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    found = joined(states)
    if isinstance(found, Along) and any(eqn.params["padding_config"][found.axis]):
        return [Unknown()]
    return [found]


def _split(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    (state,) = states
    if isinstance(state, Along) and state.axis == eqn.params["axis"]:
        state = Unknown()
    return [state] * len(eqn.outvars)


def _dot_general(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    (contracting, batch) = eqn.params["dimension_numbers"]
    found: list[State] = []
    for side, state in enumerate(states):
        ndim = len(_shape(eqn.invars[side]))
        free = [d for d in range(ndim) if d not in contracting[side] and d not in batch[side]]
        if not isinstance(state, Along):
            found.append(state)
        elif state.axis in contracting[side]:
            found.append(Mixed(op, "sums over the rows"))
        elif state.axis in batch[side]:
            found.append(state.at(list(batch[side]).index(state.axis)))
        else:
            left = len(_shape(eqn.invars[0])) - len(contracting[0])
            start = len(batch[0]) if side == 0 else left
            found.append(state.at(start + free.index(state.axis)))
    return [joined(found)]


def _conv(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    lhs, rhs = states
    numbers = eqn.params["dimension_numbers"]
    if isinstance(lhs, Along) and isinstance(rhs, Free):
        if lhs.axis == numbers.lhs_spec[0] and eqn.params["batch_group_count"] == 1:
            return [lhs.at(numbers.out_spec[0])]
        if lhs.axis == numbers.lhs_spec[1] and eqn.params["feature_group_count"] == 1:
            return [Mixed(op, "sums over the rows")]
        return [Unknown()]
    found = joined(states)
    return [Unknown() if isinstance(found, Along) else found]


def _gather(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    operand, indices = states
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape, ndim = _shape(eqn.invars[0]), len(_shape(eqn.outvars[0]))
    batch = [d for d in range(ndim) if d not in numbers.offset_dims]
    found: list[State] = []
    if isinstance(indices, Along):
        if indices.axis >= len(batch):
            return [Unknown()]
        found.append(indices.at(batch[indices.axis]))
    elif not isinstance(indices, Free):
        # Which rows they choose is not known: it may be each row its own, as a sort undone.
        return [Unknown()]
    if isinstance(operand, Along):
        dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        kept = [d for d in range(len(shape)) if d not in dropped]
        if operand.axis in numbers.operand_batching_dims:
            place = list(numbers.operand_batching_dims).index(operand.axis)
            found.append(operand.at(batch[numbers.start_indices_batching_dims[place]]))
        elif operand.axis in kept and sizes[operand.axis] == shape[operand.axis]:
            found.append(operand.at(numbers.offset_dims[kept.index(operand.axis)]))
        else:
            return [Unknown()]
    else:
        found.append(operand)
    return [joined(found)]


def _scatter(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    operand, indices, updates = states
    numbers = eqn.params["dimension_numbers"]
    if not isinstance(indices, Free):
        return [Unknown()]
    dropped = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    kept = [d for d in range(len(_shape(eqn.invars[0]))) if d not in dropped]
    if isinstance(updates, Along):
        if updates.axis not in numbers.update_window_dims:
            return [Unknown()]
        updates = updates.at(kept[list(numbers.update_window_dims).index(updates.axis)])
    found = joined((operand, updates))
    if isinstance(found, Along):
        if found.axis not in kept:
            return [Unknown()]
        window = numbers.update_window_dims[kept.index(found.axis)]
        if _shape(eqn.invars[2])[window] != _shape(eqn.invars[0])[found.axis]:
            return [Unknown()]
    return [found]


def _window(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    found, params = joined(states), eqn.params
    if isinstance(found, Along):
        axis = found.axis
        if params["window_dimensions"][axis] > 1:
            return [Mixed(op, "reduces over neighboring rows")] * len(eqn.outvars)
        if params["window_strides"][axis] > 1 or any(params["padding"][axis]):
            return [Unknown()] * len(eqn.outvars)
    return [found] * len(eqn.outvars)


def _fft(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    (state,) = states
    ndim = len(_shape(eqn.invars[0]))
    if isinstance(state, Along) and state.axis >= ndim - len(eqn.params["fft_lengths"]):
        return [Mixed(op, "transforms along the rows")]
    return [state]


def _matrices(eqn: JaxprEqn, states: Sequence[State], rows: int, op: Op) -> Sequence[State]:
    found = joined(states)
    if isinstance(found, Along) and found.axis >= len(_shape(eqn.invars[0])) - 2:
        found = Unknown()
    return [found] * len(eqn.outvars)


def _one_axis(params: Mapping[str, Any]) -> int:
    return params["axis"]


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), elementwise),
    **dict.fromkeys([*_REDUCTIONS.split(), "argmax", "argmin"], _reduce),
    **dict.fromkeys(_SUMS.split(), _along_axis("accumulates over the rows", _one_axis)),
    **dict.fromkeys(_WINDOWS.split(), _window),
    **dict.fromkeys(_SCATTERS.split(), _scatter),
    **dict.fromkeys(("cholesky", "lu", "qr", "svd", "triangular_solve", "eigh"), _matrices),
    "bitcast_convert_type": _bitcast,
    "select_n": _select,
    "sort": _along_axis("sorts the rows", lambda params: params["dimension"]),
    "top_k": _along_axis("chooses among the rows", lambda params: params.get("axis", -1)),
    "approx_top_k": _along_axis(
        "chooses among the rows", lambda params: params["reduction_dimension"]
    ),
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "rev": _rev,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "concatenate": _concatenate,
    "pad": _pad,
    "split": _split,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "fft": _fft,
}
"""What is not here is not known."""
