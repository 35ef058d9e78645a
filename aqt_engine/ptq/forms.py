"""A contraction with a weight, seen as products of matrices.

Whatever its axes, it is B products of (M, K) inputs and (K, N) weights: B are the batch axes or the
feature groups of a convolution, K what is summed over, a convolution's window included.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from aqt_engine.ops.axes import Axes, DotAxes
from aqt_engine.ops.windows import ConvAxes


class Form(abc.ABC):
    """How inputs and the weight of one contraction are laid out as matrices."""

    @abc.abstractmethod
    def inputs(self, x: jax.Array) -> jax.Array:
        """The other operand as (B, M, K)."""

    @abc.abstractmethod
    def matrix(self, weight: jax.Array) -> jax.Array:
        """The weight, or an array like it, as (B, K, N)."""

    @abc.abstractmethod
    def weight(self, matrix: jax.Array) -> jax.Array:
        """The inverse of `matrix`."""

    @property
    @abc.abstractmethod
    def channel_axes(self) -> Axes:
        """The axes of the other operand that are summed over, other than those of a window."""

    @abc.abstractmethod
    def channels(self, factors: jax.Array) -> jax.Array:
        """Factors, of the sizes of the channel axes, in a shape that multiplies the weight."""


@dataclasses.dataclass(frozen=True, slots=True)
class DotForm(Form):
    """Of a `dot_general`. `axes` has the weight on the right, of the shape `shape`."""

    axes: DotAxes
    shape: tuple[int, ...]

    def inputs(self, x: jax.Array) -> jax.Array:
        """Batch axes, remaining axes, contracted axes."""
        a = self.axes
        x = jnp.transpose(x, a.lhs_batch + a.lhs_remaining + a.lhs_contracting)
        batch, _, summed = self._sizes()
        return x.reshape(batch, -1, summed)

    def matrix(self, weight: jax.Array) -> jax.Array:
        """Batch axes, contracted axes, remaining axes."""
        return jnp.transpose(weight, self._order()).reshape(self._matrix_shape())

    def weight(self, matrix: jax.Array) -> jax.Array:
        """The matrix with the axes of the weight."""
        order = self._order()
        split = matrix.reshape(tuple(self.shape[axis] for axis in order))
        return jnp.transpose(split, tuple(int(axis) for axis in np.argsort(order)))

    @property
    def channel_axes(self) -> Axes:
        """The contracted axes."""
        return tuple(sorted(self.axes.lhs_contracting))

    def channels(self, factors: jax.Array) -> jax.Array:
        """1 in the axes of the weight that are not contracted."""
        a = self.axes
        ranks = {axis: i for i, axis in enumerate(self.channel_axes)}
        pairs = sorted(zip(a.rhs_contracting, a.lhs_contracting, strict=True))
        kept = jnp.transpose(factors, tuple(ranks[left] for _, left in pairs))
        return jnp.expand_dims(kept, a.rhs_batch + a.rhs_remaining)

    def _order(self) -> Axes:
        return self.axes.rhs_batch + self.axes.rhs_contracting + self.axes.rhs_remaining

    def _sizes(self) -> tuple[int, int, int]:
        def size(axes: Axes) -> int:
            return math.prod(self.shape[axis] for axis in axes)

        a = self.axes
        return size(a.rhs_batch), size(a.rhs_remaining), size(a.rhs_contracting)

    def _matrix_shape(self) -> tuple[int, int, int]:
        batch, remaining, summed = self._sizes()
        return batch, summed, remaining


@dataclasses.dataclass(frozen=True, slots=True)
class ConvForm(Form):
    """Of a convolution, with the kernel on the right."""

    axes: ConvAxes
    shape: tuple[int, ...]

    def inputs(self, x: jax.Array) -> jax.Array:
        """The windows: one for each example and position, of all taps and channels of a group."""
        x = self.axes.to_lhs(x)
        *_, groups, features = x.shape
        windows = self.axes.windows
        taps = tuple(self.shape[axis] for axis in self.axes.rhs_spec[2:])
        spatial = "123456789"[: len(taps)]
        patches = lax.conv_general_dilated_patches(
            x.reshape(*x.shape[:-2], groups * features),
            taps,
            windows.strides,
            windows.padding,
            lhs_dilation=windows.lhs_dilation,
            rhs_dilation=windows.rhs_dilation,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            precision=lax.Precision.HIGHEST,
        )
        patches = patches.reshape(-1, groups, features, math.prod(taps))
        return jnp.transpose(patches, (1, 0, 3, 2)).reshape(groups, len(patches), -1)

    def matrix(self, weight: jax.Array) -> jax.Array:
        """Groups, taps and channels, outputs."""
        kernel = self.axes.to_rhs(weight)
        *_, groups, outputs = kernel.shape
        return jnp.moveaxis(kernel.reshape(-1, groups, outputs), 1, 0)

    def weight(self, matrix: jax.Array) -> jax.Array:
        """The matrix with the axes of the kernel."""
        groups, _, outputs = matrix.shape
        spec = self.axes.rhs_spec
        taps = tuple(self.shape[axis] for axis in spec[2:])
        kernel = jnp.moveaxis(matrix, 0, 1)
        return self.axes.from_rhs(kernel.reshape(*taps, self.shape[spec[1]], groups, outputs))

    @property
    def channel_axes(self) -> Axes:
        """The axis of the features."""
        return (self.axes.lhs_spec[1],)

    def channels(self, factors: jax.Array) -> jax.Array:
        """The factors of each group's features, of the kernel's shape."""
        kernel = self.axes.to_rhs(jnp.ones(self.shape, factors.dtype))
        by_group = factors.reshape(self.axes.feature_groups, -1)
        # Groups of examples have features of their own, and the same factors.
        by_group = jnp.tile(by_group, (self.axes.batch_groups, 1))
        return self.axes.from_rhs(kernel * by_group.T[..., None])
