"""What the zoo knows of a model, and what has to be served for it: its training forward."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from aqt_engine.convert import Convertible, Signature, calibrate
from aqt_engine.convertible import LinenModel

Arrays = Mapping[str, np.ndarray]
Forward = Callable[[Arrays], Arrays]
"""Inputs by name, each (rows, ...), to outputs by name; as a server gives them."""
Quality = Mapping[str, float]
"""What was measured, by the name of the measure."""

CHUNK = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the zoo.

    Attributes:
      name: what it is served as.
      summary: what it is, in a few words.
      factory: "package.module:name", as `aqt convert --model` takes it.
      variables: what was trained or taken, for False; for True, at once, weights of the same shapes
        that need not be trained.
      inputs: that many rows of typical inputs, of the length that is given where the model has
        lengths; the same for the same generator.
      quality: of a forward, on data that was held out of training.
      float_quality: the same of the model before quantization, or trained without.
      tile: the rows that are computed at once.
      cost: of a row, very roughly, where that of a picture of a digit is 1.
      signature: the lengths that a request may have, and its scalars.
      made: what the factory stands for, where that is no linen model.
      calibration: inputs to learn static scales from, for a model that has them.
    """

    name: str
    summary: str
    factory: str
    variables: Callable[[bool], Any]
    inputs: Callable[[np.random.Generator, int, int], Arrays]
    quality: Callable[[Forward], Quality]
    float_quality: Callable[[], Quality]
    tile: int = 16
    cost: float = 1.0
    signature: Signature = Signature()  # noqa: RUF009 - frozen
    made: Callable[[], Convertible] | None = None
    calibration: Callable[[], Arrays] | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """The buckets of its one symbolic dimension; (0,) for a model without one."""
        return tuple(next(iter(self.signature.lengths.values()), (0,)))

    def with_lengths(self, *sizes: int) -> "Model":
        """The same model, with these buckets of its symbolic dimension."""
        lengths = {name: sizes for name in self.signature.lengths}
        signature = dataclasses.replace(self.signature, lengths=lengths)
        return dataclasses.replace(self, signature=signature)

    def convertible(self) -> Convertible:
        """What the factory names, as a model that can be converted."""
        if self.made is not None:
            return self.made()
        module, _, name = self.factory.partition(":")
        return LinenModel(getattr(importlib.import_module(module), name))

    def calibrated(self, variables: Any) -> Any:
        """`variables` with the static scales that the model learns, if it learns any."""
        if self.calibration is None:
            return variables
        return calibrate(self.convertible(), variables, in_chunks(self.calibration(), CHUNK))

    def training_forward(self, calibrated: Any) -> Forward:
        """R: the model in TRAIN mode, compiled at the tile and at the request's own bucket."""
        model = self.convertible()
        at_tile = forward_of(lambda v, **inputs: model.train(v, inputs), calibrated, self.tile)
        return lambda inputs: at_tile(self._padded(inputs))

    def _padded(self, inputs: Arrays) -> Arrays:
        padded: dict[str, np.ndarray] = {}
        for name, array in inputs.items():
            for axis, dim in enumerate(self.signature.shapes.get(name, ())):
                if dim in self.signature.lengths:
                    size = min(s for s in self.signature.lengths[dim] if s >= array.shape[axis])
                    width = [(0, size - n if i == axis else 0) for i, n in enumerate(array.shape)]
                    array = np.pad(array, width)
            padded[name] = array
        return padded


def forward_of(apply: Callable[..., Any], variables: Any, tile: int = CHUNK) -> Forward:
    """`apply` with its variables, always computed at `tile` rows; one scalar is for all rows."""
    compiled = jax.jit(apply)

    def forward(inputs: Arrays) -> Arrays:
        rows = max(map(len, inputs.values()))
        whole = {k: v[np.arange(-(-rows // tile) * tile) % len(v)] for k, v in inputs.items()}
        tiles = [compiled(variables, **chunk) for chunk in in_chunks(whole, tile)]
        return {k: np.concatenate([np.asarray(t[k]) for t in tiles])[:rows] for k in tiles[0]}

    return forward


def in_chunks(arrays: Arrays, rows: int) -> list[dict[str, np.ndarray]]:
    """The rows of `arrays` in their order, so many at a time, each with what is one for all."""
    total = max(map(len, arrays.values()))
    return [
        {k: v if len(v) < total else v[start : start + rows] for k, v in arrays.items()}
        for start in range(0, total, rows)
    ]


def answers(forward: Forward, inputs: Arrays) -> Arrays:
    """What `forward` gives for all rows of `inputs`, asked a chunk at a time."""
    chunks = [forward(chunk) for chunk in in_chunks(inputs, CHUNK)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
