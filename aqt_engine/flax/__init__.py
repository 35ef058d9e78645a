"""AQT in Flax: what to give to a layer's `dot_general` or convolution, and an einsum."""

from aqt_engine.flax.conv import AqtConvGeneralDilated as AqtConvGeneralDilated
from aqt_engine.flax.linen import AqtDotGeneral as AqtDotGeneral
from aqt_engine.flax.linen import AqtEinsum as AqtEinsum

__all__ = ["AqtConvGeneralDilated", "AqtDotGeneral", "AqtEinsum"]
