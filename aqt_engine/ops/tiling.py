"""How axes of a contraction are split into tiles: descriptions, and the geometry of the result.

A tiled axis becomes two, of tiles and of what a tile holds. Tiles of a contracted axis are batches
of their own, whose results are summed; tiles of a remaining axis are batches too, along which the
other operand is repeated. The output has its axes whole again.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from aqt_engine.ops.axes import Axes, DimensionNumbers, DotAxes
from aqt_engine.ops.operand import Operand
from aqt_engine.qtensor import QTensor, Scale


@dataclasses.dataclass(frozen=True, slots=True)
class TileCount:
    """Axis `axis` in `count` tiles of equal size."""

    axis: int
    count: int

    def counted(self, size: int) -> int:
        """The number of tiles of an axis of this size.

        Raises:
          ValueError: they would not be equal.
        """
        if self.count < 1 or size % self.count:
            raise ValueError(
                f"axis {self.axis} of size {size} cannot be split into {self.count} equal tiles"
            )
        return self.count


@dataclasses.dataclass(frozen=True, slots=True)
class TileSize:
    """Axis `axis` in tiles of `size` values."""

    axis: int
    size: int

    def counted(self, size: int) -> int:
        """The number of tiles of an axis of this size.

        Raises:
          ValueError: it is no multiple of that of a tile.
        """
        if self.size < 1 or size % self.size:
            raise ValueError(
                f"axis {self.axis} of size {size} cannot be split into tiles of size {self.size}"
            )
        return size // self.size


AxisTiles = TileCount | TileSize


@dataclasses.dataclass(frozen=True, slots=True)
class Tiling:
    """Which axes of the left and of the right are tiled: contracted and remaining ones.

    A contracted axis need be named on one side only.
    """

    lhs: tuple[AxisTiles, ...] = ()
    rhs: tuple[AxisTiles, ...] = ()

    @staticmethod
    def of_letters(lhs: str, rhs: str, tile_sizes: Mapping[str, int]) -> "Tiling":
        """The tiling of operands with these einsum letters, by the size of a tile of each letter.

        Raises:
          ValueError: a letter is none of them.
        """
        unknown = [letter for letter in tile_sizes if letter not in lhs + rhs]
        if unknown:
            raise ValueError(
                f"`tile_sizes` has {', '.join(map(repr, unknown))}, and the operands have the "
                f"letters {lhs!r} and {rhs!r}"
            )
        left, right = (
            tuple(TileSize(labels.index(c), n) for c, n in tile_sizes.items() if c in labels)
            for labels in (lhs, rhs)
        )
        return Tiling(left, right)

    def swapped(self) -> "Tiling":
        """The same with left and right exchanged."""
        return Tiling(self.rhs, self.lhs)


@dataclasses.dataclass(frozen=True, slots=True)
class TiledSide:
    """An operand of shape `shape` whose axes `axes` are tiled; `counts` are the tiles of each."""

    shape: tuple[int, ...]
    axes: Axes
    counts: Axes

    def split(self, x: jax.Array) -> jax.Array:
        """`x` with the tiles of each tiled axis in an axis before it."""
        sizes: list[int] = []
        for axis, size in enumerate(self.shape):
            if axis in self.axes:
                count = self.count(axis)
                sizes += [count, size // count]
            else:
                sizes.append(size)
        return x.reshape(sizes)

    def count(self, axis: int) -> int:
        """The number of tiles of a tiled axis."""
        return self.counts[self.axes.index(axis)]

    def tiles(self, axis: int) -> int:
        """Where the tiles of a tiled axis are."""
        return self.values(axis) - 1

    def values(self, axis: int) -> int:
        """Where the values of an axis are."""
        return axis + sum(tiled <= axis for tiled in self.axes)

    def kinds(self, contracting: Axes, batch: Axes) -> tuple[Axes, Axes]:
        """The contracting and batch axes in tiles, of those when it is whole."""
        return (
            tuple(self.values(a) for a in contracting),
            tuple(self.values(a) for a in batch) + tuple(self.tiles(a) for a in self.axes),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class TiledContraction:
    """One contraction in tiles: the sides, and the axes of what was whole."""

    lhs: TiledSide
    rhs: TiledSide
    axes: DotAxes

    @staticmethod
    def of(
        tiling: Tiling, lhs: Operand, rhs: Operand, dimension_numbers: DimensionNumbers
    ) -> "TiledContraction":
        """The tiles of operands; one that is a `QTensor` has them in axes of their own already.

        Raises:
          ValueError: a tiling names no contracted or remaining axis, or one twice; or tiles would
            not be equal, or not as many on both sides.
        """
        (lc, rc), _ = dimension_numbers
        left, right = {t.axis: t for t in tiling.lhs}, {t.axis: t for t in tiling.rhs}
        if len(left) != len(tiling.lhs) or len(right) != len(tiling.rhs):
            raise ValueError(f"{tiling} names an axis twice")
        pairs = list(zip(lc, rc, strict=True))
        left_axes = tuple(sorted({*left, *(a for a, b in pairs if b in right)}))
        right_axes = tuple(sorted({*right, *(b for a, b in pairs if a in left)}))
        left_shape, right_shape = _whole_shape(lhs, left_axes), _whole_shape(rhs, right_axes)
        axes = DotAxes.parse(dimension_numbers, len(left_shape), len(right_shape))
        for side, tiled, allowed in (
            ("lhs", left_axes, axes.lhs_contracting + axes.lhs_remaining),
            ("rhs", right_axes, axes.rhs_contracting + axes.rhs_remaining),
        ):
            if not set(tiled) <= set(allowed):
                raise ValueError(
                    f"`{side}` is tiled along axes {tiled}, and only its contracted and remaining "
                    f"axes {tuple(sorted(allowed))} can be"
                )
        counts = _counts("lhs", lhs, left, left_axes, left_shape)
        other_counts = _counts("rhs", rhs, right, right_axes, right_shape)
        for a, b in pairs:
            mine, other = counts.get(a), other_counts.get(b)
            if mine is not None and other is not None and mine != other:
                raise ValueError(
                    f"the contracted axes {a} of `lhs` and {b} of `rhs` must have as many tiles, "
                    f"got {mine} and {other}"
                )
            if mine is None and other is not None:
                counts[a] = TileCount(a, other).counted(left_shape[a])
            if other is None and mine is not None:
                other_counts[b] = TileCount(b, mine).counted(right_shape[b])
        return TiledContraction(
            TiledSide(left_shape, left_axes, tuple(counts[a] for a in left_axes)),
            TiledSide(right_shape, right_axes, tuple(other_counts[b] for b in right_axes)),
            axes,
        )

    @property
    def summed_tiles(self) -> int:
        """How many of the contracted axes are tiled: the first axes of the tiles' results."""
        return len(self._pairs())

    @property
    def dimension_numbers(self) -> DimensionNumbers:
        """Of the contraction of `lhs_operand` and `rhs_operand`: tiles of contracted axes first."""
        axes, pairs = self.axes, self._pairs()
        lhs_tiles, rhs_tiles = self._remaining_tiles()
        # Before each operand come the tiles of the other's remaining axes.
        lhs_skip, rhs_skip = len(rhs_tiles), len(lhs_tiles)

        def left(kind: Axes) -> Axes:
            return tuple(self.lhs.values(a) + lhs_skip for a in kind)

        def right(kind: Axes) -> Axes:
            return tuple(self.rhs.values(a) + rhs_skip for a in kind)

        lhs_batch = (
            *(self.lhs.tiles(a) + lhs_skip for a, _ in pairs),
            *left(axes.lhs_batch),
            *(self.lhs.tiles(a) + lhs_skip for a in lhs_tiles),
            *range(lhs_skip),
        )
        rhs_batch = (
            *(self.rhs.tiles(b) + rhs_skip for _, b in pairs),
            *right(axes.rhs_batch),
            *range(rhs_skip),
            *(self.rhs.tiles(b) + rhs_skip for b in rhs_tiles),
        )
        return (left(axes.lhs_contracting), right(axes.rhs_contracting)), (lhs_batch, rhs_batch)

    def lhs_operand(self, x: Any) -> Any:
        """The left operand, or its scale, in tiles, repeated for those of the right."""
        _, rhs_tiles = self._remaining_tiles()
        return _repeated(x, self.lhs, tuple(self.rhs.count(b) for b in rhs_tiles))

    def rhs_operand(self, x: Any) -> Any:
        """The right operand, or its scale, in tiles, repeated for those of the left."""
        lhs_tiles, _ = self._remaining_tiles()
        return _repeated(x, self.rhs, tuple(self.lhs.count(a) for a in lhs_tiles))

    def whole(self, out: jax.Array) -> jax.Array:
        """The sum of the tiles' results, with the axes that the output has."""
        out = jnp.sum(out, axis=tuple(range(self.summed_tiles)))
        lhs_tiles, rhs_tiles = self._remaining_tiles()
        axes = self.axes
        batch = len(axes.lhs_batch)
        tile_axes = iter(range(batch, batch + len(lhs_tiles) + len(rhs_tiles)))
        value_axes = iter(range(batch + len(lhs_tiles) + len(rhs_tiles), out.ndim))
        order = list(range(batch))
        shape = [self.lhs.shape[a] for a in axes.lhs_batch]
        for side, remaining, tiled in (
            (self.lhs, axes.lhs_remaining, lhs_tiles),
            (self.rhs, axes.rhs_remaining, rhs_tiles),
        ):
            for axis in remaining:
                order += [next(tile_axes)] if axis in tiled else []
                order.append(next(value_axes))
                shape.append(side.shape[axis])
        return jnp.transpose(out, order).reshape(shape)

    def _pairs(self) -> list[tuple[int, int]]:
        pairs = zip(self.axes.lhs_contracting, self.axes.rhs_contracting, strict=True)
        return [(a, b) for a, b in pairs if a in self.lhs.axes]

    def _remaining_tiles(self) -> tuple[Axes, Axes]:
        return (
            tuple(a for a in self.axes.lhs_remaining if a in self.lhs.axes),
            tuple(b for b in self.axes.rhs_remaining if b in self.rhs.axes),
        )


def _whole_shape(x: Operand, tiled: Axes) -> tuple[int, ...]:
    if not isinstance(x, QTensor):
        return tuple(x.shape)
    sizes = list(x.shape)
    for axis in tiled:
        sizes[axis : axis + 2] = [math.prod(sizes[axis : axis + 2])]
    return tuple(sizes)


def _counts(
    side: str,
    x: Operand,
    tiles: Mapping[int, AxisTiles],
    tiled: Axes,
    whole: tuple[int, ...],
) -> dict[int, int]:
    counts = {axis: t.counted(whole[axis]) for axis, t in tiles.items()}
    for i, axis in enumerate(tiled):
        if isinstance(x, QTensor) and axis in counts and x.shape[axis + i] != counts[axis]:
            raise ValueError(
                f"`{side}` is a QTensor of shape {x.shape}, and needs the {counts[axis]} tiles of "
                f"axis {axis} as its axis {axis + i}: quantize it with the same tiling"
            )
    return counts


def _repeated(x: Any, side: TiledSide, counts: Axes) -> Any:
    """An operand in tiles, `counts` times; of a scale only the axes, which it shares."""
    if isinstance(x, Scale):
        return jax.tree.map(functools.partial(jnp.expand_dims, axis=tuple(range(len(counts)))), x)
    if isinstance(x, QTensor):
        shared = _repeated(Scale(x.scale, x.bias), side, counts) if x.scale is not None else None
        return QTensor(
            jnp.broadcast_to(x.qvalue, (*counts, *x.shape)),
            None if shared is None else shared.scale,
            x.dequant_dtype,
            None if shared is None else shared.bias,
        )
    split = side.split(x)
    return jnp.broadcast_to(split, (*counts, *split.shape))
