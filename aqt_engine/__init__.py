"""Accurate Quantized Training (AQT) for JAX, and its conversion for serving."""

from aqt_engine.config import DotGeneral as DotGeneral
from aqt_engine.config import DotGeneralRaw as DotGeneralRaw
from aqt_engine.config import Tensor as Tensor
from aqt_engine.context import Context as Context
from aqt_engine.modes import QuantMode as QuantMode
from aqt_engine.ops import dot_general as dot_general
from aqt_engine.ops import einsum as einsum
from aqt_engine.qtensor import QTensor as QTensor
from aqt_engine.quantizer import Quantizer as Quantizer

__all__ = [
    "Context",
    "DotGeneral",
    "DotGeneralRaw",
    "QTensor",
    "QuantMode",
    "Quantizer",
    "Tensor",
    "dot_general",
    "einsum",
]
