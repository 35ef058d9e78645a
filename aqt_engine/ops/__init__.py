"""Quantized contractions: forward and gradients."""

from aqt_engine.ops.conv import conv_general_dilated as conv_general_dilated
from aqt_engine.ops.dot_general import dot_general as dot_general
from aqt_engine.ops.einsum import einsum as einsum
from aqt_engine.ops.ragged_dot import ragged_dot as ragged_dot

__all__ = ["conv_general_dilated", "dot_general", "einsum", "ragged_dot"]
