"""AQT in Flax: what to give to a layer's `dot_general`, and an einsum."""

from aqt_engine.flax.linen import AqtDotGeneral as AqtDotGeneral
from aqt_engine.flax.linen import AqtEinsum as AqtEinsum

__all__ = ["AqtDotGeneral", "AqtEinsum"]
