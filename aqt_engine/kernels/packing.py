"""The layout that the kernel reads a weight in: `native/instruction_set.h` says what lies where."""

import dataclasses
import math
from typing import Any

import numpy as np

from aqt_engine.arrays import aligned_zeros

Array = np.ndarray[Any, Any]
Axes = tuple[int, ...]
Steps = tuple[tuple[str, Axes], ...]

_PANEL = 32
_GROUP = 4
_DEPTH = 64
_COLUMNS = _PANEL // 2
_WORD = np.dtype("<u4")
_AT_ONCE = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Packing:
    """How a weight is read: what the graph does to it first, and along which axes it is summed.

    `steps` are shapes ("reshape") and permutations ("transpose") one after the other.
    """

    steps: Steps
    contracted: Axes

    def __call__(self, weight: Array) -> Array:
        """The weight as the kernel reads it."""
        values = np.asarray(weight).astype(np.int8, copy=False)
        for step, numbers in self.steps:
            values = values.reshape(numbers) if step == "reshape" else values.transpose(numbers)
        free = [a for a in range(values.ndim) if a not in self.contracted]
        ordered = values.transpose((*self.contracted, *free))
        depth = math.prod(values.shape[a] for a in self.contracted)
        return pack(ordered.reshape(depth, -1))

    def nbytes(self, shape: Axes) -> int:
        """Bytes of a weight of `shape` as the kernel reads it."""
        for step, numbers in self.steps:
            shape = numbers if step == "reshape" else tuple(shape[axis] for axis in numbers)
        depth = math.prod(shape[axis] for axis in self.contracted)
        free = (size for axis, size in enumerate(shape) if axis not in self.contracted)
        return packed_size(depth, math.prod(free))


def packed_size(depth: int, columns: int) -> int:
    """Bytes of a packed matrix of `depth` rows."""
    return _padded(columns, _COLUMNS) * (_padded(depth, _DEPTH) + 4)


def pack(matrix: Array) -> Array:
    """The int8 `matrix` of shape (depth, columns) packed, of shape (packed_size,)."""
    depth, columns = matrix.shape
    groups, width = _padded(depth, _DEPTH) // _GROUP, _padded(columns, _COLUMNS)
    packed = aligned_zeros((packed_size(depth, columns),), np.dtype(np.int8))
    values, offsets = packed[: -4 * width], packed[-4 * width :].view(np.int32)
    whole = width // _PANEL * _PANEL
    panels = values[: groups * _GROUP * whole].view(_WORD).reshape(whole // _PANEL, groups, _PANEL)
    last = values[groups * _GROUP * whole :].view(_WORD).reshape(groups, width - whole)
    # Some rows at once, so that beside the matrix and what it becomes there is no third.
    for start in range(0, groups, _AT_ONCE):
        end = min(start + _AT_ONCE, groups)
        rows = matrix[start * _GROUP : end * _GROUP]
        grouped = np.zeros((end - start, width, _GROUP), np.int8)
        for i in range(_GROUP):
            each = rows[i::_GROUP]
            grouped[: len(each), :columns, i] = each
        # A group is a word, which NumPy moves faster than four bytes.
        words = grouped.view(_WORD)[..., 0]
        panels[:, start:end] = (
            words[:, :whole].reshape(end - start, len(panels), _PANEL).swapaxes(0, 1)
        )
        last[start:end] = words[:, whole:]
    # Modulo 2^32, like the sums that they are added to.
    np.multiply(matrix.sum(axis=0, dtype=np.int32), -128, out=offsets[:columns])
    return packed


def _padded(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple
