"""The layout that the kernel reads a weight in: `native/instruction_set.h` says what lies where."""

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_PANEL = 32
_GROUP = 4
_DEPTH = 64
_COLUMNS = _PANEL // 2


def packed_size(depth: int, columns: int) -> int:
    """Bytes of a packed matrix of `depth` rows."""
    return _padded(columns, _COLUMNS) * (_padded(depth, _DEPTH) + 4)


def pack(matrix: Array) -> Array:
    """The int8 `matrix` of shape (depth, columns) packed, of shape (packed_size,)."""
    depth, columns = matrix.shape
    values = np.zeros((_padded(depth, _DEPTH), _padded(columns, _COLUMNS)), np.int8)
    values[:depth, :columns] = matrix
    groups = values.reshape(values.shape[0] // _GROUP, _GROUP, values.shape[1])
    panels = [
        groups[:, :, start : start + _PANEL].transpose(0, 2, 1).reshape(-1)
        for start in range(0, values.shape[1], _PANEL)
    ]
    # Modulo 2^32, like the sums that it is added to.
    offsets = (values.sum(axis=0, dtype=np.int64) * -128).astype(np.int32)
    return np.concatenate([*panels, offsets.view(np.int8)])


def _padded(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple
