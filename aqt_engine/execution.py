"""Running a bundle's graph: always at its tile, whatever the number of rows.

A float sum over a row changes in its last bit with the shape of the batch it is computed in, and
the next quantizer can turn that bit into another integer. So the graph is compiled at one fixed
number of rows, the tile, and a batch is `lax.map` of that one body over tiles: a row meets the
same instructions wherever it lies. How many tiles an executable maps over is its bucket; buckets
are powers of two.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax import lax

from aqt_engine.bundle import Bundle, BundleError

Array = np.ndarray[Any, Any]


def tile_buckets(max_rows: int, tile: int) -> tuple[int, ...]:
    """Numbers of tiles to compile for, so that `max_rows` rows fit: powers of two from 1."""
    last = max(0, math.ceil(math.log2(max(1, math.ceil(max_rows / tile)))))
    return tuple(2**i for i in range(last + 1))


class Program:
    """A bundle's weights on a device, and its executables by bucket.

    Calling it is exact and thread-safe: each row's answer has the same bits for every number of
    rows, every position and every neighbour.
    """

    def __init__(self, bundle: Bundle, *, max_rows: int):
        platform = jax.default_backend()
        lowered_for = {"gpu": "cuda"}.get(platform, platform)
        if lowered_for not in bundle.manifest.platforms:
            raise BundleError(
                f"this bundle was lowered for {', '.join(bundle.manifest.platforms)} and the "
                f"device here is {lowered_for}: convert again with that platform"
            )
        self.manifest = bundle.manifest
        self.buckets = tile_buckets(max_rows, bundle.manifest.tile)
        self._graph = bundle.graph
        self._weights = [jax.device_put(w) for w in bundle.weights]
        self._executables: dict[int, Callable[..., Sequence[jax.Array]]] = {}
        self._compiling = threading.Lock()

    @property
    def max_rows(self) -> int:
        """Rows that the largest bucket holds."""
        return self.buckets[-1] * self.manifest.tile

    def compile(self, bucket: int) -> None:
        """Compiles the executable that maps over `bucket` tiles, unless it is there already."""
        with self._compiling:
            if bucket not in self._executables:
                self._executables[bucket] = self._compiled(bucket)

    def _compiled(self, bucket: int) -> Callable[..., Sequence[jax.Array]]:
        def forward(weights: list[jax.Array], inputs: list[jax.Array]) -> list[jax.Array]:
            def at_tile(tile: list[jax.Array]) -> list[jax.Array]:
                return list(self._graph.call(weights, tile))

            return cast(list[jax.Array], lax.map(at_tile, inputs))

        tiled = [spec.with_rows(self.manifest.tile) for spec in self.manifest.inputs]
        inputs = [jax.ShapeDtypeStruct((bucket, *s.shape), s.dtype) for s in tiled]
        return jax.jit(forward).lower(self._weights, inputs).compile()

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs for `inputs`: by name, each of shape (rows, ...), the same rows for all.

        More rows than the largest bucket holds are computed in several calls; a bucket that was
        not compiled yet is compiled now.

        Raises:
          ValueError: the inputs are not those of the signature, in names, dtypes or shapes.
        """
        rows = self._checked_rows(inputs)
        chunks = [
            self._run(
                {name: array[start : start + self.max_rows] for name, array in inputs.items()}
            )
            for start in range(0, rows, self.max_rows)
        ]
        if len(chunks) == 1:
            return chunks[0]
        return {
            spec.name: np.concatenate([chunk[spec.name] for chunk in chunks])
            if chunks
            else np.zeros((0, *spec.shape[1:]), np.dtype(spec.dtype))
            for spec in self.manifest.outputs
        }

    def _checked_rows(self, inputs: Mapping[str, Array]) -> int:
        rows = next((len(array) for array in inputs.values() if array.ndim), 0)
        expected = {spec.name: spec.with_rows(rows) for spec in self.manifest.inputs}
        found = {name: f"{array.dtype}{list(array.shape)}" for name, array in inputs.items()}
        wanted = {name: f"{s.dtype}{list(s.shape)}" for name, s in expected.items()}
        if found != wanted:
            raise ValueError(f"the inputs are {found}, and the signature has {wanted}")
        return rows

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        tile = self.manifest.tile
        rows = len(next(iter(inputs.values())))
        bucket = next(b for b in self.buckets if b * tile >= rows)
        padded: list[Array] = []
        for spec in self.manifest.inputs:
            whole = spec.with_rows(bucket * tile)
            array = np.zeros(whole.shape, whole.dtype)
            array[:rows] = inputs[spec.name]
            padded.append(array.reshape(bucket, tile, *whole.shape[1:]))
        self.compile(bucket)
        answers = self._executables[bucket](self._weights, padded)
        return {
            spec.name: np.asarray(answer).reshape(bucket * tile, *answer.shape[2:])[:rows]
            for spec, answer in zip(self.manifest.outputs, answers, strict=True)
        }
