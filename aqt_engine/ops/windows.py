"""The arithmetic of convolutions.

Whatever dimension numbers and groups a convolution has, it is computed in one layout, with the
groups in an axis of their own:

    lhs (N, *S, G, C)    rhs (*K, C, G, O)    output (N, *T, G, O)

It sums over the window K and the features C. A scale with 1 in those axes is laid out over the
output as it stands, by broadcasting. Both gradients of a convolution are convolutions in the same
layout. It is also the layout in which XLA:CPU is fast with integers.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from aqt_engine.ops.axes import Axes

Padding = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """How windows lie on the left operand; one entry for each spatial axis."""

    strides: tuple[int, ...]
    padding: Padding
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]

    def convolve(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        precision: lax.PrecisionLike,
        dtype: DTypeLike | None,
    ) -> jax.Array:
        """The convolution of (N, *S, G, C) and (*K, C, G, O): (N, *T, G, O), summed in `dtype`."""
        windows = self
        spatial = len(self.strides)
        # XLA:CPU is fast with integers in two spatial dimensions, and in one it is not.
        if spatial == 1:
            windows, lhs, rhs = self._with_a_row(), lhs[:, None], rhs[None]
        groups = rhs.shape[-2]
        axes = "123456789"[: len(windows.strides)]
        out = lax.conv_general_dilated(
            lhs.reshape(*lhs.shape[:-2], groups * lhs.shape[-1]),
            rhs.reshape(*rhs.shape[:-2], groups * rhs.shape[-1]),
            windows.strides,
            windows.padding,
            lhs_dilation=windows.lhs_dilation,
            rhs_dilation=windows.rhs_dilation,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            feature_group_count=groups,
            precision=precision,
            preferred_element_type=dtype,
        )
        out = out.reshape(*out.shape[:-1], groups, rhs.shape[-1])
        return out[:, 0] if spatial == 1 else out

    def dlhs(self, lhs: Axes, rhs: Axes, out: Axes) -> "Windows":
        """The windows of (output gradient) x (reversed kernel), from spatial sizes."""
        padding: list[tuple[int, int]] = []
        for i, (low, _) in enumerate(self.padding):
            before = self._window(rhs, i) - 1 - low
            total = self._image(lhs, i) + self._window(rhs, i) - 1 - self._strided(out, i)
            padding.append((before, total - before))
        return Windows(
            strides=self.lhs_dilation,
            padding=tuple(padding),
            lhs_dilation=self.strides,
            rhs_dilation=self.rhs_dilation,
        )

    def drhs(self, lhs: Axes, rhs: Axes, out: Axes) -> "Windows":
        """The windows of (left operand) x (output gradient), from spatial sizes."""
        padding: list[tuple[int, int]] = []
        for i, (low, _) in enumerate(self.padding):
            total = self._window(rhs, i) + self._strided(out, i) - 1 - self._image(lhs, i)
            padding.append((low, total - low))
        return Windows(
            strides=self.rhs_dilation,
            padding=tuple(padding),
            lhs_dilation=self.lhs_dilation,
            rhs_dilation=self.strides,
        )

    def _image(self, lhs: Axes, i: int) -> int:
        return _dilated(lhs[i], self.lhs_dilation[i])

    def _window(self, rhs: Axes, i: int) -> int:
        return _dilated(rhs[i], self.rhs_dilation[i])

    def _strided(self, out: Axes, i: int) -> int:
        return _dilated(out[i], self.strides[i])

    def _with_a_row(self) -> "Windows":
        return Windows(
            strides=(1, *self.strides),
            padding=((0, 0), *self.padding),
            lhs_dilation=(1, *self.lhs_dilation),
            rhs_dilation=(1, *self.rhs_dilation),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConvAxes:
    """The layouts of one convolution as its caller has them, and its windows.

    Each spec is (batch, feature, *spatial), that of `rhs` (out, in, *spatial).
    """

    lhs_spec: Axes
    rhs_spec: Axes
    out_spec: Axes
    feature_groups: int
    batch_groups: int
    windows: Windows

    @staticmethod
    def parse(
        lhs: Axes,
        rhs: Axes,
        strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        lhs_dilation: Sequence[int] | None,
        rhs_dilation: Sequence[int] | None,
        dimension_numbers: Any,
        feature_groups: int,
        batch_groups: int,
    ) -> "ConvAxes":
        """What the arguments of `jax.lax.conv_general_dilated` say of operands of these shapes.

        Raises:
          TypeError, ValueError: they contradict each other, in the words of `jax.lax`.
        """
        jax.eval_shape(
            functools.partial(
                lax.conv_general_dilated,
                window_strides=strides,
                padding=padding,
                lhs_dilation=lhs_dilation,
                rhs_dilation=rhs_dilation,
                dimension_numbers=dimension_numbers,
                feature_group_count=feature_groups,
                batch_group_count=batch_groups,
            ),
            jax.ShapeDtypeStruct(lhs, jnp.float32),
            jax.ShapeDtypeStruct(rhs, jnp.float32),
        )
        numbers = lax.conv_dimension_numbers(lhs, rhs, dimension_numbers)
        ones = (1,) * (len(lhs) - 2)
        dilation = ones if rhs_dilation is None else tuple(rhs_dilation)
        if isinstance(padding, str):
            sizes = [lhs[a] for a in numbers.lhs_spec[2:]]
            spans = zip(numbers.rhs_spec[2:], dilation, strict=True)
            window = [_dilated(rhs[a], d) for a, d in spans]
            padding = lax.padtype_to_pads(sizes, window, strides, padding)
        return ConvAxes(
            lhs_spec=tuple(numbers.lhs_spec),
            rhs_spec=tuple(numbers.rhs_spec),
            out_spec=tuple(numbers.out_spec),
            feature_groups=feature_groups,
            batch_groups=batch_groups,
            windows=Windows(
                strides=tuple(strides),
                padding=tuple((int(low), int(high)) for low, high in padding),
                lhs_dilation=ones if lhs_dilation is None else tuple(lhs_dilation),
                rhs_dilation=dilation,
            ),
        )

    @property
    def lhs_contracting(self) -> Axes:
        """The axes of the left operand, as the caller has it, over which a scale is shared."""
        return tuple(sorted(self.lhs_spec[1:]))

    @property
    def rhs_contracting(self) -> Axes:
        """The axes of the right operand, as the caller has it, over which a scale is shared."""
        return tuple(sorted(self.rhs_spec[1:]))

    def to_lhs(self, x: jax.Array) -> jax.Array:
        """The left operand, or a scale of it, as (N, *S, G, C)."""
        x = _split(_spatial_first(x, self.lhs_spec), -1, self.feature_groups)
        # (B * N, *S, 1, C): groups of examples are features that are convolved apart.
        x = _split(x, 0, self.batch_groups)
        return _merge(jnp.moveaxis(x, 0, -3), -3)

    def from_lhs(self, x: jax.Array) -> jax.Array:
        """The inverse of `to_lhs`."""
        x = _split(x, -2, self.batch_groups)
        x = _merge(jnp.moveaxis(x, -3, 0), 0)
        return jnp.transpose(_merge(x, -2), _spatial_last(self.lhs_spec))

    def to_rhs(self, x: jax.Array) -> jax.Array:
        """The right operand, or a scale of it, as (*K, C, G, O)."""
        out, features, *spatial = self.rhs_spec
        return _split(jnp.transpose(x, (*spatial, features, out)), -1, self._groups)

    def from_rhs(self, x: jax.Array) -> jax.Array:
        """The inverse of `to_rhs`."""
        out, features, *spatial = self.rhs_spec
        return jnp.transpose(_merge(x, -2), tuple(np.argsort((*spatial, features, out))))

    def to_out(self, x: jax.Array) -> jax.Array:
        """The output as (N, *T, G, O)."""
        return _split(_spatial_first(x, self.out_spec), -1, self._groups)

    def from_out(self, x: jax.Array) -> jax.Array:
        """The inverse of `to_out`."""
        return jnp.transpose(_merge(x, -2), _spatial_last(self.out_spec))

    @property
    def _groups(self) -> int:
        return self.feature_groups * self.batch_groups


def summed(rhs: jax.Array) -> int:
    """How many products an output of (*K, C, G, O) sums at most."""
    return math.prod(rhs.shape[:-2])


def _spatial_first(x: jax.Array, spec: Axes) -> jax.Array:
    batch, feature, *spatial = spec
    return jnp.transpose(x, (batch, *spatial, feature))


def _spatial_last(spec: Axes) -> Axes:
    batch, feature, *spatial = spec
    return tuple(int(a) for a in np.argsort((batch, *spatial, feature)))


def _dilated(size: int, dilation: int) -> int:
    return 0 if size == 0 else (size - 1) * dilation + 1


def _split(x: jax.Array, axis: int, groups: int) -> jax.Array:
    """Axis `axis` as two, of groups and members; one that a scale shares stays shared in both."""
    axis %= x.ndim
    size = x.shape[axis]
    parts = (1, 1) if size == 1 else (groups, size // groups)
    return x.reshape(*x.shape[:axis], *parts, *x.shape[axis + 1 :])


def _merge(x: jax.Array, axis: int) -> jax.Array:
    """Axis `axis` and the next as one."""
    axis %= x.ndim
    size = x.shape[axis] * x.shape[axis + 1]
    return x.reshape(*x.shape[:axis], size, *x.shape[axis + 2 :])
