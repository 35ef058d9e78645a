"""How a scaled value is put into a bucket."""

from aqt_engine.numerics.base import NoNumerics as NoNumerics
from aqt_engine.numerics.base import Numerics as Numerics
from aqt_engine.numerics.integer import IntNumerics as IntNumerics
from aqt_engine.numerics.noise import Noise as Noise
from aqt_engine.numerics.noise import Uniform as Uniform

__all__ = ["IntNumerics", "NoNumerics", "Noise", "Numerics", "Uniform"]
