"""Accurate Quantized Training (AQT) for JAX, and its conversion for serving."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aqt_engine.config import DotGeneral as DotGeneral
    from aqt_engine.config import DotGeneralRaw as DotGeneralRaw
    from aqt_engine.config import Tensor as Tensor
    from aqt_engine.context import Context as Context
    from aqt_engine.modes import QuantMode as QuantMode
    from aqt_engine.ops import dot_general as dot_general
    from aqt_engine.ops import einsum as einsum
    from aqt_engine.qtensor import QTensor as QTensor
    from aqt_engine.quantizer import Quantizer as Quantizer

__all__ = [
    "Context",
    "DotGeneral",
    "DotGeneralRaw",
    "QTensor",
    "QuantMode",
    "Quantizer",
    "Tensor",
    "dot_general",
    "einsum",
]

_MODULES = {
    "Context": "context",
    "DotGeneral": "config",
    "DotGeneralRaw": "config",
    "QTensor": "qtensor",
    "QuantMode": "modes",
    "Quantizer": "quantizer",
    "Tensor": "config",
    "dot_general": "ops",
    "einsum": "ops",
}


def __getattr__(name: str) -> Any:
    # When it is asked for: a server imports what reads bundles, and nothing of what makes them.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
