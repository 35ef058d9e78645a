"""Quantized `einsum` of two operands, as one `dot_general`.

Letters that only one operand has and the output has not are summed, and repeated letters reduced
to their diagonal, in float before the contraction. What is left is a `dot_general` and a
permutation of its output.
"""

import dataclasses
import functools
import re
import string
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from aqt_engine.context import Context
from aqt_engine.ops.axes import DimensionNumbers
from aqt_engine.ops.operand import Operand
from aqt_engine.qtensor import QTensor

if TYPE_CHECKING:
    from aqt_engine.config import DotGeneral

# Operands are as `contract` got them: arrays, or QTensors where the contraction takes those.
Contraction = Callable[[Any, Any, DimensionNumbers], jax.Array]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EinsumPlan:
    """How an equation becomes a contraction.

    `lhs_labels` and `rhs_labels` are the letters of the operands as given, `lhs_kept` and
    `rhs_kept` those that reach the contraction. With `swap` the right operand stands on the left
    of it, which saves a permutation. `permutation` takes its output to the equation's.
    """

    lhs_labels: str
    rhs_labels: str
    lhs_kept: str
    rhs_kept: str
    swap: bool
    dimension_numbers: DimensionNumbers
    permutation: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def plan(equation: str, lhs_ndim: int, rhs_ndim: int) -> EinsumPlan:
    """The plan for `equation` on operands of these ranks.

    Raises:
      ValueError: the equation is not one of two operands, or does not fit the ranks.
    """
    lhs, rhs, out = labels_of(equation, lhs_ndim, rhs_ndim)
    lhs_kept = "".join(c for c in dict.fromkeys(lhs) if c in rhs or c in out)
    rhs_kept = "".join(c for c in dict.fromkeys(rhs) if c in lhs or c in out)
    shared = sorted(set(lhs_kept) & set(rhs_kept))
    batch = [c for c in shared if c in out]
    contracted = [c for c in shared if c not in out]
    lhs_only = [c for c in lhs_kept if c not in shared]
    rhs_only = [c for c in rhs_kept if c not in shared]
    swap = [*batch, *lhs_only, *rhs_only] != list(out)
    left, right = (rhs_kept, lhs_kept) if swap else (lhs_kept, rhs_kept)
    result = [*batch, *rhs_only, *lhs_only] if swap else [*batch, *lhs_only, *rhs_only]
    return EinsumPlan(
        lhs_labels=lhs,
        rhs_labels=rhs,
        lhs_kept=lhs_kept,
        rhs_kept=rhs_kept,
        swap=swap,
        dimension_numbers=(
            (_axes(left, contracted), _axes(right, contracted)),
            (_axes(left, batch), _axes(right, batch)),
        ),
        permutation=tuple(result.index(c) for c in out),
    )


def contract(p: EinsumPlan, lhs: Operand, rhs: Operand, contraction: Contraction) -> jax.Array:
    """Carries out plan `p`; `contraction` gets its operands in the order of the plan.

    Raises:
      ValueError: a letter has two sizes, or a `QTensor` would have to be summed or reduced to a
        diagonal.
    """
    _require_one_size(p, lhs, rhs)
    lhs = _reduce(lhs, p.lhs_labels, p.lhs_kept)
    rhs = _reduce(rhs, p.rhs_labels, p.rhs_kept)
    left, right = (rhs, lhs) if p.swap else (lhs, rhs)
    return jnp.transpose(contraction(left, right, p.dimension_numbers), p.permutation)


def einsum(
    equation: str,
    lhs: Operand,
    rhs: Operand,
    *,
    config: "DotGeneral | None",
    context: Context = Context(),
) -> jax.Array:
    """`jax.numpy.einsum` of two operands, quantized by `config`; None is `jax.numpy.einsum` itself.

    Either operand may be a `QTensor`. Scales are shared along the letters that are contracted.
    Everything else is as in `aqt_engine.ops.dot_general`.

    Raises:
      TypeError: `config` is None, and an operand is a `QTensor`.
      ValueError: the equation is not one of two operands, or does not fit them.
    """
    if config is None:
        if isinstance(lhs, QTensor) or isinstance(rhs, QTensor):
            raise TypeError(
                "a QTensor is contracted by a configuration, and `config` is None: give the one "
                "that quantized it, or dequantize it first"
            )
        return jnp.einsum(equation, lhs, rhs)
    p = plan(equation, lhs.ndim, rhs.ndim)
    oriented = config.swapped() if p.swap else config
    return contract(p, lhs, rhs, functools.partial(oriented, context=context))


def _axes(labels: str, letters: list[str]) -> tuple[int, ...]:
    return tuple(labels.index(c) for c in letters)


def labels_of(equation: str, lhs_ndim: int, rhs_ndim: int) -> tuple[str, str, str]:
    """The letters of both operands and of the output, with those that an ellipsis stands for.

    Raises:
      ValueError: the equation is not one of two operands, or does not fit the ranks.
    """
    compact = re.sub(r"\s", "", equation)
    match = re.fullmatch(r"([a-zA-Z.]*),([a-zA-Z.]*)(?:->([a-zA-Z.]*))?", compact)
    if match is None:
        raise ValueError(
            f"{equation!r} is not an einsum equation of two operands, such as 'ab,bc->ac'"
        )
    lhs, rhs, out = match.groups()
    unused = [c for c in string.ascii_letters if c not in compact]
    widths = [ndim - len(s.replace("...", "")) for s, ndim in ((lhs, lhs_ndim), (rhs, rhs_ndim))]
    widest = max((w for s, w in zip((lhs, rhs), widths, strict=True) if "..." in s), default=0)
    ellipsis = "".join(unused[: max(0, widest)])
    expanded: list[str] = []
    for labels, width in zip((lhs, rhs), widths, strict=True):
        # A shorter ellipsis is aligned at the right, as in NumPy broadcasting.
        named = labels.replace("...", ellipsis[len(ellipsis) - width :] if width > 0 else "")
        if len(named) != labels.count("...") * max(width, 0) + len(labels.replace("...", "")) or (
            width != 0 and "..." not in labels
        ):
            raise ValueError(
                f"{equation!r} does not fit operands of {lhs_ndim} and {rhs_ndim} dimensions"
            )
        expanded.append(named)
    left, right = expanded
    if out is None:
        counted = left + right
        named = sorted(c for c in set(counted) if counted.count(c) == 1 and c not in ellipsis)
        out = ellipsis + "".join(named)
    out = out.replace("...", ellipsis)
    if "." in left + right + out:
        raise ValueError(f"{equation!r} has dots that are no ellipsis '...'")
    if len(set(out)) != len(out) or not set(out) <= set(left + right):
        raise ValueError(f"the output of {equation!r} must name letters of the operands, each once")
    return left, right, out


def _require_one_size(p: EinsumPlan, lhs: Operand, rhs: Operand) -> None:
    sizes: dict[str, int] = {}
    for labels, operand in ((p.lhs_labels, lhs), (p.rhs_labels, rhs)):
        # What is stored in tiles has axes without letters.
        letters = labels if operand.ndim == len(labels) else ""
        for letter, size in zip(letters, operand.shape, strict=False):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"the letter {letter!r} of {p.lhs_labels!r} and {p.rhs_labels!r} stands for "
                    f"sizes {sizes[letter]} and {size}, of operands of shapes {lhs.shape} and "
                    f"{rhs.shape}"
                )


def _reduce(operand: Operand, labels: str, kept: str) -> Operand:
    if labels == kept:
        return operand
    if isinstance(operand, QTensor):
        raise ValueError(
            f"a QTensor with letters {labels!r} cannot be summed or reduced to {kept!r}: "
            f"dequantize it first, or quantize what is left"
        )
    return jnp.einsum(f"{labels}->{kept}", operand)
