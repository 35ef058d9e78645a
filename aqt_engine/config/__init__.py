"""What is quantized, and how: frozen configurations, and the presets that make them."""

from aqt_engine.config.changes import with_absmax_calib_scale as with_absmax_calib_scale
from aqt_engine.config.changes import with_bits as with_bits
from aqt_engine.config.changes import (
    with_int_numerics_preserve_zero as with_int_numerics_preserve_zero,
)
from aqt_engine.config.changes import with_stochastic_rounding as with_stochastic_rounding
from aqt_engine.config.contraction import DotGeneral as DotGeneral
from aqt_engine.config.contraction import DotGeneralRaw as DotGeneralRaw
from aqt_engine.config.contraction import LocalAqt as LocalAqt
from aqt_engine.config.contraction import LocalAqtBySize as LocalAqtBySize
from aqt_engine.config.contraction import Tensor as Tensor
from aqt_engine.config.presets import config_fwd_fp8 as config_fwd_fp8
from aqt_engine.config.presets import config_v3 as config_v3
from aqt_engine.config.presets import config_v4 as config_v4
from aqt_engine.config.presets import fully_quantized as fully_quantized
from aqt_engine.config.presets import int_numerics as int_numerics
from aqt_engine.config.presets import int_tensor as int_tensor
from aqt_engine.config.presets import raw as raw
from aqt_engine.config.presets import update as update
from aqt_engine.config.presets import weight_only as weight_only
from aqt_engine.modes import CalibrationMode as CalibrationMode
from aqt_engine.modes import DequantMode as DequantMode

__all__ = [
    "CalibrationMode",
    "DequantMode",
    "DotGeneral",
    "DotGeneralRaw",
    "LocalAqt",
    "LocalAqtBySize",
    "Tensor",
    "config_fwd_fp8",
    "config_v3",
    "config_v4",
    "fully_quantized",
    "int_numerics",
    "int_tensor",
    "raw",
    "update",
    "weight_only",
    "with_absmax_calib_scale",
    "with_bits",
    "with_int_numerics_preserve_zero",
    "with_stochastic_rounding",
]
