"""What a bundle says of itself, and the form that it says it in.

The dataclasses are checked by pydantic when a manifest is read: nothing is missing, nothing is
added, and every value has its type.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import jax
import numpy as np
import pydantic
from pydantic import AfterValidator, ConfigDict, Field

BATCH = "batch"
"""The symbolic dimension that counts rows."""


def _known_dtype(name: str) -> str:
    try:
        np.dtype(name)
    except TypeError as error:
        raise ValueError(f"{name!r} is no dtype") from error
    return name


Role = Literal["qvalue", "scale", "bias", "float"]


def _rows_first(shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
    if shape[:1] != ("batch",) or "batch" in shape[1:]:
        raise ValueError("a shape begins with 'batch', and has sizes after that")
    return shape


_STRICT = ConfigDict(strict=True, extra="forbid")
_Size = Annotated[int, Field(ge=0)]
_DtypeName = Annotated[str, AfterValidator(_known_dtype)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, dtype and shape of one input or output.

    `dtype` is a numpy name ("float32", "bfloat16", "int32", "bool"). `shape` begins with `BATCH`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    dtype: _DtypeName
    shape: Annotated[tuple[Literal["batch"] | _Size, ...], AfterValidator(_rows_first)]

    def with_rows(self, rows: int) -> jax.ShapeDtypeStruct:
        """The concrete shape and dtype of `rows` rows."""
        shape = (rows, *(int(d) for d in self.shape[1:]))
        return jax.ShapeDtypeStruct(shape, np.dtype(self.dtype))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """One array of the weights: its path in the model, its dtype and shape.

    `role` is "qvalue", "scale" or "bias" for a part of a quantized weight, "float" for the rest.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    dtype: _DtypeName
    shape: tuple[_Size, ...]
    role: Role

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
class Manifest:
    """What a bundle says of itself.

    `tile` is the number of rows at which the graph computes. `weights` stand in the order of the
    graph's arguments; `inputs` follow them. `float_nbytes` is the size of the weights before
    conversion.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tile: _Size
    weights: tuple[WeightSpec, ...]
    float_nbytes: _Size
    platforms: tuple[str, ...]
    tools: Mapping[str, str]
    files: Mapping[str, FileDigest]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        return sum(w.nbytes for w in self.weights)


MANIFEST_FORM = pydantic.TypeAdapter(Manifest)
"""Reads a manifest from JSON, or raises `pydantic.ValidationError`."""
