"""The arithmetic of dimension numbers.

A `dot_general` sorts the axes of its operands into three kinds: contracting (summed over, in
both), batch (kept, in both) and remaining (kept, in one). The output has the batch axes first,
then the remaining axes of the left, then those of the right.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

DimensionNumbers = tuple[
    tuple[Sequence[int], Sequence[int]],
    tuple[Sequence[int], Sequence[int]],
]
Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DotAxes:
    """The axes of one contraction, by side and kind."""

    lhs_contracting: Axes
    rhs_contracting: Axes
    lhs_batch: Axes
    rhs_batch: Axes
    lhs_remaining: Axes
    rhs_remaining: Axes

    @staticmethod
    def parse(dimension_numbers: DimensionNumbers, lhs_ndim: int, rhs_ndim: int) -> "DotAxes":
        """The axes that `dimension_numbers` name, and those that they leave."""
        (lc, rc), (lb, rb) = dimension_numbers
        return DotAxes(
            lhs_contracting=tuple(lc),
            rhs_contracting=tuple(rc),
            lhs_batch=tuple(lb),
            rhs_batch=tuple(rb),
            lhs_remaining=tuple(a for a in range(lhs_ndim) if a not in (*lc, *lb)),
            rhs_remaining=tuple(a for a in range(rhs_ndim) if a not in (*rc, *rb)),
        )

    def require_fit(self, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> None:
        """Refuses operands of these shapes where sizes differ.

        Raises:
          ValueError: they do.
        """
        for kind, left, right in (
            ("contracted", self.lhs_contracting, self.rhs_contracting),
            ("batch", self.lhs_batch, self.rhs_batch),
        ):
            sizes, others = [lhs[a] for a in left], [rhs[a] for a in right]
            if sizes != others:
                raise ValueError(
                    f"the {kind} axes {left} of `lhs` {lhs} and {right} of `rhs` {rhs} must have "
                    f"the same sizes, got {sizes} and {others}"
                )

    @property
    def dimension_numbers(self) -> DimensionNumbers:
        """What `jax.lax.dot_general` takes."""
        return (
            (self.lhs_contracting, self.rhs_contracting),
            (self.lhs_batch, self.rhs_batch),
        )

    def lhs_to_output(self, scale: jax.Array) -> jax.Array:
        """`scale`, in the left's layout with 1 in its contracting axes, laid out as the output."""
        kept = jnp.transpose(scale, self.lhs_batch + self.lhs_remaining + self.lhs_contracting)
        kept = kept.reshape(kept.shape[: kept.ndim - len(self.lhs_contracting)])
        return kept.reshape(kept.shape + (1,) * len(self.rhs_remaining))

    def rhs_to_output(self, scale: jax.Array) -> jax.Array:
        """`scale`, in the right's layout with 1 in its contracting axes, laid out as the output."""
        kept = jnp.transpose(scale, self.rhs_batch + self.rhs_remaining + self.rhs_contracting)
        kept = kept.reshape(kept.shape[: kept.ndim - len(self.rhs_contracting)])
        batch = len(self.rhs_batch)
        return kept.reshape(
            kept.shape[:batch] + (1,) * len(self.lhs_remaining) + kept.shape[batch:]
        )

    def lhs_to_rhs(self, scale: jax.Array) -> jax.Array:
        """`scale`, in the left's layout with 1 in its remaining axes, laid out as the right."""
        return _relayout(
            scale,
            dict(zip(self.rhs_batch, self.lhs_batch, strict=True))
            | dict(zip(self.rhs_contracting, self.lhs_contracting, strict=True)),
            self.lhs_remaining,
            self.rhs_remaining,
        )

    def rhs_to_lhs(self, scale: jax.Array) -> jax.Array:
        """`scale`, in the right's layout with 1 in its remaining axes, laid out as the left."""
        return _relayout(
            scale,
            dict(zip(self.lhs_batch, self.rhs_batch, strict=True))
            | dict(zip(self.lhs_contracting, self.rhs_contracting, strict=True)),
            self.rhs_remaining,
            self.lhs_remaining,
        )

    def dlhs(self) -> "tuple[DotAxes, Axes]":
        """The axes of (output gradient) x (right), and the permutation of its result to the left's.

        The right's contracting axes come out in their own order, not in that of the pairs.
        """
        batch, left, right = self._output()
        order = np.argsort(self.rhs_contracting)
        layout = self.lhs_batch + self.lhs_remaining
        layout += tuple(self.lhs_contracting[i] for i in order)
        axes = DotAxes(
            lhs_contracting=right,
            rhs_contracting=self.rhs_remaining,
            lhs_batch=batch,
            rhs_batch=self.rhs_batch,
            lhs_remaining=left,
            rhs_remaining=tuple(sorted(self.rhs_contracting)),
        )
        return axes, tuple(int(i) for i in np.argsort(layout))

    def drhs(self) -> "tuple[DotAxes, Axes]":
        """The axes of (output gradient) x (left), and the permutation of its result to right's."""
        batch, left, right = self._output()
        order = np.argsort(self.lhs_contracting)
        layout = self.rhs_batch + self.rhs_remaining
        layout += tuple(self.rhs_contracting[i] for i in order)
        axes = DotAxes(
            lhs_contracting=left,
            rhs_contracting=self.lhs_remaining,
            lhs_batch=batch,
            rhs_batch=self.lhs_batch,
            lhs_remaining=right,
            rhs_remaining=tuple(sorted(self.lhs_contracting)),
        )
        return axes, tuple(int(i) for i in np.argsort(layout))

    def _output(self) -> tuple[Axes, Axes, Axes]:
        batch, left = len(self.lhs_batch), len(self.lhs_remaining)
        total = batch + left + len(self.rhs_remaining)
        return (
            tuple(range(batch)),
            tuple(range(batch, batch + left)),
            tuple(range(batch + left, total)),
        )


def _relayout(scale: jax.Array, source: dict[int, int], dropped: Axes, inserted: Axes) -> jax.Array:
    """Takes axis `source[a]` of `scale` to axis `a`; the others have size 1."""
    order = tuple(source[a] for a in sorted(source))
    kept = jnp.transpose(scale, order + dropped)
    kept = kept.reshape(kept.shape[: len(order)])
    return jnp.expand_dims(kept, inserted)
