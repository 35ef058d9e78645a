"""The layout that the kernel reads a weight in: `native/instruction_set.h` says what lies where."""

import math
from typing import Any

import numpy as np

from aqt_engine.arrays import aligned_zeros

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
    groups, width = _padded(depth, _DEPTH) // _GROUP, _padded(columns, _COLUMNS)
    packed = aligned_zeros((packed_size(depth, columns),), np.dtype(np.int8))
    offsets = packed[-4 * width :].view(np.int32)
    # Panel by panel, so that beside the matrix and what it becomes there is no third.
    for start in range(0, width, _PANEL):
        wide = min(_PANEL, width - start)
        panel = np.zeros((groups * _GROUP, wide), np.int8)
        values = matrix[:, start : start + _PANEL]
        panel[:depth, : values.shape[1]] = values
        laid_out = panel.reshape(groups, _GROUP, wide).transpose(0, 2, 1)
        place = packed[start * groups * _GROUP :][: panel.size]
        place.reshape(laid_out.shape)[...] = laid_out
        # Modulo 2^32, like the sums that it is added to.
        sums = panel.sum(axis=0, dtype=np.int64) * -128
        offsets[start : start + wide] = sums.astype(np.int32)
    return packed


def _padded(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple
