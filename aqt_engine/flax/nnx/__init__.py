"""AQT in Flax nnx: a model quantized by rules, or layer by layer; and its conversion.

int8_model = quantize(model, rules, rngs=nnx.Rngs(0))    # a copy, to be trained as any other
graph, variables = split(int8_model)
convert(graph, variables, {"x": x}, "models/mine/1")
"""

from aqt_engine.flax.nnx.conversion import NnxModel as NnxModel
from aqt_engine.flax.nnx.conversion import split as split
from aqt_engine.flax.nnx.injection import quantize as quantize
from aqt_engine.flax.nnx.injection import report as report
from aqt_engine.flax.nnx.ops import AqtConvGeneralDilated as AqtConvGeneralDilated
from aqt_engine.flax.nnx.ops import AqtDotGeneral as AqtDotGeneral
from aqt_engine.flax.nnx.ops import AqtEinsum as AqtEinsum

__all__ = [
    "AqtConvGeneralDilated",
    "AqtDotGeneral",
    "AqtEinsum",
    "NnxModel",
    "quantize",
    "report",
    "split",
]
