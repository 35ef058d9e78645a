"""How a batch lies in memory: the inputs of a bundle's signature as its executables take them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from aqt_engine import lengths
from aqt_engine.arrays import aligned_empty
from aqt_engine.manifest import LengthBucket, Manifest, TensorSpec

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
Shape = tuple[int, ...]
At = tuple[LengthBucket, int]
"""So many tiles at a length bucket."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output of a whole bucket: `shape` has all rows, and `laid_out` tiles of them."""

    name: str
    dtype: np.dtype[Any]
    shape: Shape
    laid_out: Shape

    @property
    def nbytes(self) -> int:
        """Of the whole bucket."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """The tensors of all rows that a bucket has, in the order of the signature."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def filled(self, inputs: Arrays, rows: int) -> list[Array]:
        """`inputs` of so many rows, and zeros, where executables on a CPU read them."""
        filled: list[Array] = []
        for tensor in self.inputs:
            array = aligned_empty(tensor.shape, tensor.dtype)
            array[:rows] = inputs[tensor.name]
            array[rows:] = 0
            filled.append(array.reshape(tensor.laid_out))
        return filled


class Batches:
    """The forms of a manifest's batches, in tiles or with all rows in one axis."""

    def __init__(self, manifest: Manifest, *, in_tiles: bool):
        self._manifest = manifest
        self._in_tiles = in_tiles
        self._forms: dict[At, Form] = {}
        # What every batch has, whatever its rows, where requests choose no size.
        self._fixed = None if manifest.lengths else _fixed(manifest.inputs)

    def form(self, bucket: int, length_bucket: LengthBucket) -> Form:
        """That of `bucket` tiles."""
        at = length_bucket, bucket
        if at not in self._forms:
            rows, sizes = bucket * self._manifest.tile, self._manifest.sizes(length_bucket)
            tensors = [
                tuple(self._tensor(spec, rows, sizes) for spec in specs)
                for specs in (self._manifest.inputs, self._manifest.outputs)
            ]
            self._forms[at] = Form(*tensors)
        return self._forms[at]

    def _tensor(self, spec: TensorSpec, rows: int, sizes: Mapping[str, int]) -> Tensor:
        of, tile = spec.with_rows(rows, sizes), self._manifest.tile
        laid_out = (rows // tile, tile, *of.shape[1:]) if self._in_tiles else of.shape
        return Tensor(spec.name, of.dtype, of.shape, laid_out)

    def empty(self, rows: int, length_bucket: LengthBucket) -> dict[str, Array]:
        """Arrays for the outputs of so many rows."""
        sizes = self._manifest.sizes(length_bucket)
        empty = {spec.name: spec.with_rows(rows, sizes) for spec in self._manifest.outputs}
        return {name: np.empty(of.shape, of.dtype) for name, of in empty.items()}

    def checked(self, inputs: Arrays) -> tuple[int, dict[str, int]]:
        """The number of rows of `inputs`, and the sizes of the symbolic dimensions.

        Raises:
          ValueError: they are not those of the signature, in names, dtypes or shapes.
        """
        rows = next((len(array) for array in inputs.values() if array.ndim), 0)
        if self._fixed is not None and _are(inputs, rows, self._fixed):
            return rows, {}
        manifest = self._manifest
        specs = {spec.name: spec for spec in manifest.inputs}
        sizes: dict[str, int] = {}
        if inputs.keys() == specs.keys() and all(
            inputs[name].ndim == len(spec.shape) for name, spec in specs.items()
        ):
            sizes = lengths.lengths_of(manifest, inputs)
        known = sizes or dict.fromkeys(manifest.lengths, -1)
        expected = {name: spec.with_rows(rows, known) for name, spec in specs.items()}
        if inputs.keys() != expected.keys() or any(
            (inputs[name].dtype, inputs[name].shape) != (one.dtype, one.shape)
            for name, one in expected.items()
        ):
            found = {name: f"{array.dtype}{list(array.shape)}" for name, array in inputs.items()}
            wanted = {name: f"{one.dtype}{list(one.shape)}" for name, one in expected.items()}
            raise ValueError(f"the inputs are {found}, and the signature has {wanted}")
        return rows, sizes


def _fixed(specs: tuple[TensorSpec, ...]) -> dict[str, tuple[np.dtype[Any], Shape]]:
    """Dtype and shape of each, without the rows."""
    of = {spec.name: spec.with_rows(0) for spec in specs}
    return {name: (one.dtype, one.shape[1:]) for name, one in of.items()}


def _are(inputs: Arrays, rows: int, fixed: Mapping[str, tuple[np.dtype[Any], Shape]]) -> bool:
    if len(inputs) != len(fixed):
        return False
    for name, (dtype, shape) in fixed.items():
        array = inputs.get(name)
        if array is None or array.dtype != dtype or array.shape != (rows, *shape):
            return False
    return True
