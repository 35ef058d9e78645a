"""MiniLM's first layer: six compile for a minute in all that a test of the zoo does."""

from collections.abc import Mapping
from typing import Any

from aqt_engine import QuantMode
from examples.sentences import model, weights

LAYERS = 1


def static_int8_model(quant_mode: QuantMode) -> model.Encoder:
    return model.static_int8_model(quant_mode).clone(layers=LAYERS)


def variables(fast: bool) -> Mapping[str, Any]:
    """Those of the encoder without the layers that are left out."""
    del fast  # they are taken, not trained
    params = weights.load_variables()["params"]
    left_out = {f"layer_{layer}" for layer in range(LAYERS, model.LAYERS)}
    return {"params": {name: of for name, of in params.items() if name not in left_out}}
