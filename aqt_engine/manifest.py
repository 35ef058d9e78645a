"""What a bundle says of itself, and the form that it says it in.

The dataclasses are checked by pydantic when a manifest is read: nothing is missing, nothing is
added, and every value has its type.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal

import jax
import numpy as np
import pydantic
from pydantic import AfterValidator, ConfigDict, Field

from aqt_engine.provenance import Provenance

BATCH = "batch"
"""The symbolic dimension that counts rows."""

LengthBucket = tuple[int, ...]
"""Sizes of a manifest's symbolic dimensions, in the order of its `lengths`; () if it has none."""


def _known_dtype(name: str) -> str:
    try:
        np.dtype(name)
    except TypeError as error:
        raise ValueError(f"{name!r} is no dtype") from error
    return name


Role = Literal["qvalue", "scale", "bias", "float"]


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _rows_first(shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
    if shape[:1] != (BATCH,) or BATCH in shape[1:]:
        raise ValueError("a shape begins with 'batch', and has sizes after that")
    wrong = [d for d in shape if isinstance(d, str) and not _NAME.fullmatch(d)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no name of a dimension: use letters, digits and '_'")
    return shape


_STRICT = ConfigDict(strict=True, extra="forbid")
_Size = Annotated[int, Field(ge=0)]
_Seconds = Annotated[float, Field(gt=0)]
_Pad = bool | int | float
Axes = tuple[str | tuple[str, ...] | None, ...]
"""For each axis of an array the name that its trainer gave it, or the names; None without one."""

_NO_SIZES: Mapping[str, int] = {}
_DtypeName = Annotated[str, AfterValidator(_known_dtype)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, dtype and shape of one input or output.

    `dtype` is a numpy name ("float32", "bfloat16", "int32", "bool"). `shape` begins with `BATCH`;
    after it come sizes, and names of dimensions whose size a request chooses.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    dtype: _DtypeName
    shape: Annotated[tuple[str | _Size, ...], AfterValidator(_rows_first)]

    def with_rows(self, rows: int, sizes: Mapping[str, int] = _NO_SIZES) -> jax.ShapeDtypeStruct:
        """The concrete shape and dtype of `rows` rows, where symbolic dimensions have `sizes`."""
        shape = (rows, *(sizes[d] if isinstance(d, str) else d for d in self.shape[1:]))
        return _struct(shape, self.dtype)

    @property
    def axes(self) -> Mapping[int, str]:
        """The symbolic dimensions after the rows, by axis."""
        return {i: d for i, d in enumerate(self.shape) if isinstance(d, str) and i > 0}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """One array of the weights: its path in the model, its dtype and shape.

    `role` is "qvalue", "scale" or "bias" for a part of a quantized weight, "float" for the rest.
    `axes` are the names of the axes, as in a PartitionSpec, of what was trained with such: those
    along which it lay in shards, or which rules were to put there.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    dtype: _DtypeName
    shape: tuple[_Size, ...]
    role: Role
    axes: Axes | None = None

    @property
    def bits(self) -> int:
        """Bits of one value."""
        dtype = np.dtype(self.dtype)
        return 4 if self.dtype in ("int4", "uint4") else 8 * dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that the array takes in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    """What a file of the bundle must be: its sha256 (hex) and its size in bytes."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    sha256: str
    nbytes: _Size


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TileCost:
    """What a tile was measured to cost, in seconds: for a row alone, and for each row under load.

    `cost` is the one of the two that `aqt_engine.tiles` makes of them; the least is 1 or more.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    one_row_s: _Seconds
    per_row_s: _Seconds
    cost: _Seconds


def _ascending(buckets: tuple[int, ...]) -> tuple[int, ...]:
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
        raise ValueError("lengths are positive and ascend, and there is at least one")
    return buckets


_Buckets = Annotated[tuple[int, ...], AfterValidator(_ascending)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a bundle says of itself.

    `lengths` has the buckets of each symbolic dimension: sizes that requests are padded to, with
    the value in `pads` (0 for inputs that are not there). An input in `per_request` is one scalar
    for all rows of a request. `tile` is the number of rows at which the graphs compute;
    `tile_costs` is what each was measured to cost where it was chosen, and empty if it was given.
    With `portable`, the operations were found to give the same bits on every platform. `weights`
    stand in the order of the graphs' arguments; `inputs` follow them. `float_nbytes` is the size of
    the weights before conversion. `provenance` has the configurations that the weights were
    quantized by. `not_batched` says why there is no graph for any number of rows, where there is
    none and the bundle knows.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    lengths: Mapping[str, _Buckets]
    pads: Mapping[str, _Pad]
    per_request: tuple[str, ...]
    tile: _Size
    tile_costs: Mapping[str, TileCost]
    portable: bool
    weights: tuple[WeightSpec, ...]
    provenance: Provenance
    float_nbytes: _Size
    platforms: tuple[str, ...]
    tools: Mapping[str, str]
    files: Mapping[str, FileDigest]
    not_batched: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        return sum(w.nbytes for w in self.weights)

    @property
    def length_buckets(self) -> tuple[LengthBucket, ...]:
        """Every combination of the buckets of the symbolic dimensions, shortest first."""
        return tuple(itertools.product(*self.lengths.values()))

    def sizes(self, bucket: LengthBucket) -> dict[str, int]:
        """The sizes of the symbolic dimensions in `bucket`, by name."""
        return dict(zip(self.lengths, bucket, strict=True))


# Asked for several times for each batch, of which most have been seen before.
@functools.lru_cache(maxsize=4096)
def _struct(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype))


def bucket_name(sizes: Mapping[str, int]) -> str:
    """A length bucket in words, also its files' name: "length=16,width=8"."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def _consistent(manifest: Manifest) -> Manifest:
    """Checks what the fields say of each other."""

    def dims(specs: Iterable[TensorSpec]) -> set[str]:
        return {name for spec in specs for name in spec.axes.values()}

    if dims(manifest.inputs) != set(manifest.lengths) or not dims(manifest.outputs) <= set(
        manifest.lengths
    ):
        raise ValueError("the dimensions of inputs and outputs are not those of `lengths`")
    scalars = {spec.name for spec in manifest.inputs if spec.shape == (BATCH,)}
    if not set(manifest.per_request) <= scalars:
        raise ValueError("an input in `per_request` is not there, or has more axes than the rows")
    if not set(manifest.pads) <= {spec.name for spec in manifest.inputs}:
        raise ValueError("an input in `pads` is not there")
    wrong = [w.name for w in manifest.weights if w.axes and len(w.axes) != len(w.shape)]
    if wrong:
        raise ValueError(f"{wrong[0]} has not as many axes as `axes` names")
    tensors = {w.name.rpartition("/")[0] for w in manifest.weights if w.role != "float"}
    if not set(manifest.provenance.tensors) <= tensors:
        raise ValueError("a tensor in `provenance` is not among the weights")
    return manifest


MANIFEST_FORM = pydantic.TypeAdapter(Annotated[Manifest, AfterValidator(_consistent)])
"""Reads a manifest from JSON, or raises `pydantic.ValidationError`; configurations unchecked."""
