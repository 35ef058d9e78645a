"""The choices that quantized ops know."""

import enum


class QuantMode(enum.Enum):
    """What a quantized op does with one of its sides.

    TRAIN quantizes the float operand on every call. CALIBRATE also updates calibration
    statistics. CONVERT quantizes as TRAIN does and stores the result. SERVE reads what CONVERT
    stored and never looks at the float operand.
    """

    TRAIN = 1
    CALIBRATE = 2
    CONVERT = 3
    SERVE = 4


class CalibrationMode(enum.Enum):
    """Along which axes of an operand values share a scale."""

    CONTRACTING_AXIS = 1
    REMAINING_AXIS = 2
    ALL_AXES = 3


class DequantMode(enum.Enum):
    """Where the scale of an operand is multiplied back in.

    OUTPUT multiplies the contraction's result, and needs a scale that is the same for all that is
    summed. THIS_INPUT multiplies the operand itself before contracting: fake quantization.
    OTHER_INPUT multiplies the other operand, which stays in float, and lets the scale vary along
    the contracted axes only.
    """

    OUTPUT = 1
    THIS_INPUT = 2
    OTHER_INPUT = 3
