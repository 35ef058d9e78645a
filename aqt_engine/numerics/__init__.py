"""How a scaled value is put into a bucket."""

from aqt_engine.numerics.base import NoNumerics as NoNumerics
from aqt_engine.numerics.base import Numerics as Numerics
from aqt_engine.numerics.emulated import FloatNumerics as FloatNumerics
from aqt_engine.numerics.emulated import FloatRounding as FloatRounding
from aqt_engine.numerics.emulated import aqt_float as aqt_float
from aqt_engine.numerics.fp8 import Fp8Numerics as Fp8Numerics
from aqt_engine.numerics.integer import IntNumerics as IntNumerics
from aqt_engine.numerics.noise import Centered as Centered
from aqt_engine.numerics.noise import Noise as Noise
from aqt_engine.numerics.noise import Uniform as Uniform

__all__ = [
    "Centered",
    "FloatNumerics",
    "FloatRounding",
    "Fp8Numerics",
    "IntNumerics",
    "NoNumerics",
    "Noise",
    "Numerics",
    "Uniform",
    "aqt_float",
]
