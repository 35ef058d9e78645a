"""Better weights for quantization, found after training: new parameters of the same model."""

from aqt_engine.ptq.gptq import gptq as gptq
from aqt_engine.ptq.smooth import Smoothing as Smoothing
from aqt_engine.ptq.smooth import smooth as smooth

__all__ = ["Smoothing", "gptq", "smooth"]
