"""What a request may choose: the signature that is declared, and examples that fit it."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from aqt_engine.convertible import ConversionError
from aqt_engine.manifest import BATCH, LengthBucket, TensorSpec, bucket_name

MAX_WITNESS_ROWS = 256

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What an example does not say of a model's inputs; empty where it says everything.

    Attributes:
      shapes: for inputs with symbolic dimensions, what each axis is: `{"ids": ("batch",
        "length")}`. The others have the example's shape.
      lengths: the buckets of each symbolic dimension, ascending: `{"length": (16, 32, 64)}`. A
        request is padded to the smallest that holds it, and can be as long as the last.
      pads: the value that an input is padded with, where that is not 0. It is for the model to
        look away from it, by a mask or by the value itself.
      per_request: inputs that are one scalar for all rows of a request, as a temperature is. The
        model is given it once for each row, shape (rows,).
    """

    shapes: Mapping[str, Sequence[int | str]] = dataclasses.field(default_factory=dict)
    lengths: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    pads: Mapping[str, float] = dataclasses.field(default_factory=dict)
    per_request: Sequence[str] = ()

    @property
    def buckets(self) -> tuple[LengthBucket, ...]:
        """Every combination of lengths."""
        return tuple(itertools.product(*self.lengths.values()))

    def canonical(self, example: Arrays) -> dict[str, Array]:
        """The example in the dtypes that JAX computes in, scalars given to every row.

        float64 becomes float32, int64 int32.

        Raises:
          ConversionError: it has no rows or unequal ones, or values that do not fit.
        """
        if not example:
            raise ConversionError("the example holds no input: give one array for each argument")
        rows = max(
            [len(a) for name, a in example.items() if a.ndim and name not in self.per_request],
            default=1,
        )
        inputs: dict[str, Array] = {}
        for name, array in example.items():
            if name in self.per_request and array.size == 1:
                array = np.broadcast_to(array.reshape(()), (rows,))
            if array.ndim == 0 or len(array) == 0:
                raise ConversionError(
                    f"example input {name!r} has shape {list(array.shape)}, and needs a first "
                    f"dimension that counts at least one row"
                )
            inputs[name] = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
            if array.dtype.kind in "iu" and (inputs[name] != array).any():
                raise ConversionError(
                    f"example input {name!r} has {array.dtype} values that do not fit "
                    f"{inputs[name].dtype}, which JAX computes in: use smaller values"
                )
        if len({len(array) for array in inputs.values()}) > 1:
            sizes = ", ".join(f"{name!r} has {len(array)}" for name, array in inputs.items())
            raise ConversionError(f"example inputs must have the same number of rows: {sizes}")
        return inputs

    def specs(self, inputs: Arrays) -> tuple[TensorSpec, ...]:
        """The inputs' specs, for an example that is canonical.

        Raises:
          ConversionError: what is declared does not fit the example, or itself.
        """
        for field in ("shapes", "pads", "per_request"):
            unknown = [name for name in getattr(self, field) if name not in inputs]
            if unknown:
                raise ConversionError(
                    f"`{field}` names {unknown[0]!r}, and the example has {', '.join(inputs)}"
                )
        specs = tuple(self._spec(name, array) for name, array in inputs.items())
        used = {dim for spec in specs for dim in spec.axes.values()}
        for dim in used ^ set(self.lengths):
            raise ConversionError(
                f"dimension {dim!r} is to be in `shapes` and to have buckets in `lengths`, as in "
                f"Signature(shapes={{'ids': ('batch', 'length')}}, lengths={{'length': (16, 32)}})"
            )
        for dim, sizes in self.lengths.items():
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise ConversionError(
                    f"the lengths of {dim!r} must be positive and ascend, got {list(sizes)}"
                )
        return specs

    def _spec(self, name: str, array: Array) -> TensorSpec:
        shape = tuple(self.shapes.get(name, (BATCH, *array.shape[1:])))
        fits = len(shape) == array.ndim and all(
            isinstance(dim, str) or dim == size
            for dim, size in zip(shape[1:], array.shape[1:], strict=False)
        )
        if not fits or shape[0] != BATCH or BATCH in shape[1:]:
            raise ConversionError(
                f"input {name!r} is declared as {shape} and is {list(array.shape)} in the "
                f"example: name its axes, 'batch' first, with the example's sizes or a symbol"
            )
        if name in self.per_request and shape != (BATCH,):
            raise ConversionError(
                f"input {name!r} is to be one scalar per request, and has shape "
                f"{list(array.shape)} in the example: give a scalar, or one for each row"
            )
        pad = self.pads.get(name, 0)
        if not math.isfinite(pad) or np.asarray(pad).astype(array.dtype) != pad:
            raise ConversionError(f"input {name!r} is {array.dtype} and cannot be padded by {pad}")
        return TensorSpec(name=name, dtype=array.dtype.name, shape=shape)

    def witness(self, inputs: Arrays, bucket: LengthBucket, tile: int) -> dict[str, Array]:
        """The example's first rows at `bucket`, repeated until they fill whole tiles.

        A row that is too short is continued with itself; then the rows are cut in turn to every
        length that has this bucket, and padded as a request is.
        """
        rows = len(next(iter(inputs.values())))
        most = max(tile, MAX_WITNESS_ROWS // len(self.buckets))
        index = np.arange(math.ceil(min(rows, most) / tile) * tile)
        filled: dict[str, Array] = {}
        for spec in self.specs(inputs):
            array = inputs[spec.name][index % rows]
            for axis, dim in spec.axes.items():
                size = bucket[list(self.lengths).index(dim)]
                array = np.take(array, np.arange(size), axis=axis, mode="wrap")
                shorter = max((s for s in self.lengths[dim] if s < size), default=0)
                kept = size - index % (size - shorter)
                beyond = np.arange(size) >= kept[:, None]
                shape = [
                    len(index) if i == 0 else size if i == axis else 1 for i in range(array.ndim)
                ]
                pad = np.asarray(self.pads.get(spec.name, 0), array.dtype)
                array = np.where(beyond.reshape(shape), pad, array)
            filled[spec.name] = array
        return filled

    def sizes(self, bucket: LengthBucket) -> dict[str, int]:
        """The sizes of the symbolic dimensions in `bucket`, by name."""
        return dict(zip(self.lengths, bucket, strict=True))

    def output_specs(
        self, shapes: Callable[[LengthBucket], Mapping[str, jax.ShapeDtypeStruct]]
    ) -> tuple[TensorSpec, ...]:
        """The outputs' specs: an axis that changes with a dimension is that dimension.

        `shapes` gives the outputs' shapes at a bucket, which need not be one of this signature: a
        dimension with one bucket is traced at another size too.

        Raises:
          ConversionError: an axis is neither a constant nor a dimension's size.
        """
        traced = {bucket: shapes(bucket) for bucket in self._probes(shapes)}
        first = next(iter(traced.values()))
        return tuple(
            TensorSpec(
                name=name,
                dtype=struct.dtype.name,
                shape=(
                    BATCH,
                    *(
                        self._axis(name, axis, {b: s[name].shape[axis] for b, s in traced.items()})
                        for axis in range(1, len(struct.shape))
                    ),
                ),
            )
            for name, struct in first.items()
        )

    def _probes(self, shapes: Callable[[LengthBucket], object]) -> list[LengthBucket]:
        probes = list(self.buckets)
        for i, (dim, sizes) in enumerate(self.lengths.items()):
            if len(sizes) > 1:
                continue
            for other in (2 * sizes[0], max(1, sizes[0] // 2)):
                probe = (*self.buckets[0][:i], other, *self.buckets[0][i + 1 :])
                try:
                    shapes(probe)
                except Exception:  # whatever a model does at a size that it does not take
                    continue
                probes.append(probe)
                break
            else:
                raise ConversionError(
                    f"the model can be traced at {dim} {sizes[0]} alone, so that it is unknown "
                    f"which outputs have it: give another length, or a shape of plain sizes"
                )
        return probes

    def _axis(self, name: str, axis: int, sizes: Mapping[LengthBucket, int]) -> int | str:
        if len(set(sizes.values())) == 1:
            return next(iter(sizes.values()))
        for i, dim in enumerate(self.lengths):
            if all(size == bucket[i] for bucket, size in sizes.items()):
                return dim
        found = ", ".join(f"{size} at {bucket_name(self.sizes(b))}" for b, size in sizes.items())
        raise ConversionError(
            f"axis {axis} of the model's {name!r} is {found}: it must be a symbolic dimension "
            f"itself or not change with it, so that an answer can be cut back"
        )
