"""Quantized contractions: forward and gradients; sums in an order of their own."""

from aqt_engine.ops.conv import conv_general_dilated as conv_general_dilated
from aqt_engine.ops.dot_general import dot_general as dot_general
from aqt_engine.ops.einsum import einsum as einsum
from aqt_engine.ops.ragged_dot import ragged_dot as ragged_dot
from aqt_engine.ops.sums import ordered_mean as ordered_mean
from aqt_engine.ops.sums import ordered_sum as ordered_sum
from aqt_engine.ops.tiled import tiled_dot_general as tiled_dot_general
from aqt_engine.ops.tiled import tiled_einsum as tiled_einsum
from aqt_engine.ops.tiling import TileCount as TileCount
from aqt_engine.ops.tiling import TileSize as TileSize
from aqt_engine.ops.tiling import Tiling as Tiling

__all__ = [
    "TileCount",
    "TileSize",
    "Tiling",
    "conv_general_dilated",
    "dot_general",
    "einsum",
    "ordered_mean",
    "ordered_sum",
    "ragged_dot",
    "tiled_dot_general",
    "tiled_einsum",
]
