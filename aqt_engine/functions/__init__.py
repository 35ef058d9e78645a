"""Any JAX function: its contractions quantized by rules, its weights folded for serving."""

from aqt_engine.functions.quantized import QuantizedFunction as QuantizedFunction
from aqt_engine.functions.quantized import quantize as quantize

__all__ = ["QuantizedFunction", "quantize"]
