"""Quantized contractions: forward and gradients."""

from aqt_engine.ops.dot_general import dot_general as dot_general
from aqt_engine.ops.einsum import einsum as einsum

__all__ = ["dot_general", "einsum"]
