"""AQT in Flax: a linen model quantized by rules, or layer by layer.

By rules `quantize` takes the model as it is, and `report` says what each rule does. Layer by layer
`AqtDotGeneral` and `AqtConvGeneralDilated` are what to give to a layer as its `dot_general` or
convolution, and `AqtEinsum` is an einsum.
"""

from aqt_engine.flax.conv import AqtConvGeneralDilated as AqtConvGeneralDilated
from aqt_engine.flax.injection import quantize as quantize
from aqt_engine.flax.injection import report as report
from aqt_engine.flax.linen import AqtDotGeneral as AqtDotGeneral
from aqt_engine.flax.linen import AqtEinsum as AqtEinsum
from aqt_engine.flax.scale import ChannelScale as ChannelScale

__all__ = [
    "AqtConvGeneralDilated",
    "AqtDotGeneral",
    "AqtEinsum",
    "ChannelScale",
    "quantize",
    "report",
]
