"""What the zoo knows of a model, and what has to be served for it: its training forward."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from aqt_engine import QuantMode
from aqt_engine.convert import calibrate

Arrays = Mapping[str, np.ndarray]
Forward = Callable[[Arrays], Arrays]
"""Inputs by name, each (rows, ...), to outputs by name; as a server gives them."""

CHUNK = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the zoo.

    Attributes:
      name: what it is served as.
      summary: what it is, in a few words.
      factory: "package.module:function", as `aqt convert --model` takes it.
      variables: what was trained or taken, for False; for True, at once, weights of the same shapes
        that were not trained.
      inputs: that many rows of typical inputs, the same for the same generator.
      metric: what `quality` measures.
      quality: of a forward, on data that was held out of training.
      float_quality: the same of the model before quantization, or trained without.
      tile: the rows that are computed at once.
      calibration: inputs to learn static scales from, for a model that has them.
    """

    name: str
    summary: str
    factory: str
    variables: Callable[[bool], Mapping[str, Any]]
    inputs: Callable[[np.random.Generator, int], Arrays]
    metric: str
    quality: Callable[[Forward], float]
    float_quality: Callable[[], float]
    tile: int = 16
    calibration: Callable[[], Arrays] | None = None

    def module(self, quant_mode: QuantMode) -> nn.Module:
        """What the factory gives for a mode."""
        module, _, function = self.factory.partition(":")
        return getattr(importlib.import_module(module), function)(quant_mode)

    def training_forward(self, variables: Mapping[str, Any]) -> Forward:
        """R: the model in TRAIN mode, compiled at the tile; for variables as they were trained."""
        if self.calibration is not None:
            batches = in_chunks(self.calibration(), CHUNK)
            variables = calibrate(self.module, variables, batches)
        return forward_of(self.module(QuantMode.TRAIN), variables, self.tile)


def forward_of(module: nn.Module, variables: Mapping[str, Any], tile: int = CHUNK) -> Forward:
    """The module with its variables, always computed at `tile` rows."""
    compiled = jax.jit(lambda variables, inputs: module.apply(variables, **inputs))

    def forward(inputs: Arrays) -> Arrays:
        rows = len(next(iter(inputs.values())))
        padded = {k: v[np.arange(-(-rows // tile) * tile) % rows] for k, v in inputs.items()}
        answers = [compiled(variables, chunk) for chunk in in_chunks(padded, tile)]
        return {k: np.concatenate([np.asarray(a[k]) for a in answers])[:rows] for k in answers[0]}

    return forward


def in_chunks(arrays: Arrays, rows: int) -> list[dict[str, np.ndarray]]:
    """The rows of `arrays` in their order, so many at a time."""
    total = len(next(iter(arrays.values())))
    return [
        {name: array[start : start + rows] for name, array in arrays.items()}
        for start in range(0, total, rows)
    ]


def answers(forward: Forward, inputs: Arrays) -> Arrays:
    """What `forward` gives for all rows of `inputs`, asked a chunk at a time."""
    chunks = [forward(chunk) for chunk in in_chunks(inputs, CHUNK)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
