"""Tensors as the protocol carries them: the one table of datatypes, and arrays to bytes and back.

Raw contents are an array's elements in C order, little-endian and without gaps. BYTES is the
datatype of variable length: each element is its length in 4 bytes, little-endian, then its bytes;
its arrays have dtype object and elements of type `bytes`. Everything is checked to the byte, so
that a wrong length is an error here and not a wrong number later.
"""

import dataclasses
import math
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import ml_dtypes
import numpy as np

from aqt_protos.generated.open_inference_pb2 import InferTensorContents

if sys.byteorder != "little":  # numpy's bfloat16 has no byte order to convert from
    raise ImportError("aqt_protos needs a little-endian machine, as the wire is little-endian")

Array = np.ndarray[Any, Any]

_LENGTH = struct.Struct("<I")
_MAX_ELEMENT_NBYTES = 2**32 - 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Datatype:
    """One datatype of the protocol.

    `contents` is the field of InferTensorContents that holds its elements; None where there is
    no such field and the elements travel raw only.
    """

    name: str
    dtype: np.dtype[Any]
    contents: str | None


_TABLE: tuple[tuple[str, Any, str | None], ...] = (
    ("BOOL", np.bool_, "bool_contents"),
    ("UINT8", np.uint8, "uint_contents"),
    ("UINT16", np.uint16, "uint_contents"),
    ("UINT32", np.uint32, "uint_contents"),
    ("UINT64", np.uint64, "uint64_contents"),
    ("INT8", np.int8, "int_contents"),
    ("INT16", np.int16, "int_contents"),
    ("INT32", np.int32, "int_contents"),
    ("INT64", np.int64, "int64_contents"),
    ("FP16", np.float16, None),
    ("FP32", np.float32, "fp32_contents"),
    ("FP64", np.float64, "fp64_contents"),
    ("BF16", ml_dtypes.bfloat16, None),
    ("BYTES", np.object_, "bytes_contents"),
)

DATATYPES: Mapping[str, Datatype] = MappingProxyType(
    {
        name: Datatype(name=name, dtype=np.dtype(dtype), contents=contents)
        for name, dtype, contents in _TABLE
    }
)
"""Every datatype, by its name on the wire."""

_BY_DTYPE = {d.dtype: d for d in DATATYPES.values()}


def datatype(name: str) -> Datatype:
    """The datatype that the protocol calls `name`.

    Raises:
      ValueError: the protocol has no such datatype.
    """
    try:
        return DATATYPES[name]
    except KeyError:
        raise ValueError(
            f"{name!r} is not a datatype of the protocol: use one of {', '.join(DATATYPES)}"
        ) from None


def datatype_of(dtype: np.dtype[Any]) -> Datatype:
    """The datatype for arrays of `dtype`, of either byte order; BYTES for objects and strings.

    Raises:
      ValueError: the protocol has no datatype for it.
    """
    if dtype.kind in "OSUT":
        return DATATYPES["BYTES"]
    native = dtype if dtype.isnative else dtype.newbyteorder("=")
    try:
        return _BY_DTYPE[native]
    except KeyError:
        supported = ", ".join(str(d.dtype) for d in DATATYPES.values() if d.name != "BYTES")
        raise ValueError(
            f"dtype {dtype} has no datatype in the protocol: convert the array to one of "
            f"{supported}, or to an array of str or bytes"
        ) from None


def to_raw(array: Array) -> bytes:
    """The raw contents of `array`.

    Raises:
      ValueError: its dtype is not one of the protocol's, or an element is neither str nor bytes.
    """
    if datatype_of(array.dtype).name == "BYTES":
        return encode_bytes(array.ravel().tolist())
    native = array.dtype if array.dtype.isnative else array.dtype.newbyteorder("=")
    return array.astype(native, copy=False).tobytes()


def from_raw(raw: bytes, datatype: Datatype, shape: Sequence[int]) -> Array:
    """The array of `shape` whose raw contents are `raw`; read-only where it shares their memory.

    Raises:
      ValueError: `shape` has a negative dimension, or `raw` does not hold exactly its elements.
    """
    count = _count(shape)
    if datatype.name == "BYTES":
        return _objects(decode_bytes(raw, count), shape)
    expected = count * datatype.dtype.itemsize
    if len(raw) != expected:
        raise ValueError(
            f"{datatype.name} of shape {list(shape)} takes {expected} raw bytes, got {len(raw)}: "
            f"send {count} elements of {datatype.dtype.itemsize} bytes"
        )
    if datatype.name == "BOOL" and np.any(np.frombuffer(raw, np.uint8) > 1):
        raise ValueError("raw BOOL contents hold a byte other than 0 and 1: send 0 or 1 for each")
    return np.frombuffer(raw, datatype.dtype).reshape(tuple(shape))


def from_contents(contents: InferTensorContents, datatype: Datatype, shape: Sequence[int]) -> Array:
    """The array of `shape` whose elements stand in the field of `contents` for `datatype`.

    Raises:
      ValueError: the datatype has no such field, another field is filled, the number of elements
        is not the shape's, or an element is out of the datatype's range.
    """
    if datatype.contents is None:
        raise ValueError(f"{datatype.name} has no field in `contents`: send it as raw contents")
    wrong = [f.name for f, _ in contents.ListFields() if f.name != datatype.contents]
    if wrong:
        raise ValueError(
            f"{datatype.name} elements stand in `{datatype.contents}`, "
            f"but `{wrong[0]}` is filled: send them in `{datatype.contents}`"
        )
    elements = cast(Sequence[Any], getattr(contents, datatype.contents))
    count = _count(shape)
    if len(elements) != count:
        raise ValueError(
            f"shape {list(shape)} has {count} elements, "
            f"got {len(elements)} in `{datatype.contents}`"
        )
    if datatype.name == "BYTES":
        return _objects(list(elements), shape)
    try:
        return np.array(elements, datatype.dtype).reshape(tuple(shape))
    except OverflowError as error:
        raise ValueError(
            f"`{datatype.contents}` has an element outside of {datatype.name}: {error}"
        ) from error


def encode_bytes(elements: Iterable[object]) -> bytes:
    """The raw contents of BYTES elements; a str stands for its UTF-8 bytes.

    Raises:
      ValueError: an element is neither str nor bytes, or is 4 GiB or longer.
    """
    parts: list[bytes] = []
    for index, element in enumerate(elements):
        if isinstance(element, str):
            element = element.encode()
        if not isinstance(element, bytes):
            raise ValueError(
                f"element {index} of a BYTES tensor is a {type(element).__name__}: "
                f"each must be str or bytes"
            )
        if len(element) > _MAX_ELEMENT_NBYTES:
            raise ValueError(
                f"element {index} of a BYTES tensor has {len(element)} bytes: its length must "
                f"fit in 4 bytes, so split it"
            )
        parts += (_LENGTH.pack(len(element)), element)
    return b"".join(parts)


def decode_bytes(raw: bytes, count: int) -> list[bytes]:
    """The `count` elements that stand in the raw contents of a BYTES tensor.

    Raises:
      ValueError: `raw` does not hold exactly `count` elements.
    """
    elements: list[bytes] = []
    position = 0
    while position < len(raw) and len(elements) < count:
        start = position + _LENGTH.size
        if start > len(raw):
            raise ValueError(
                f"raw BYTES contents end in the length of element {len(elements)}: "
                f"it takes 4 bytes, got {len(raw) - position}"
            )
        (length,) = _LENGTH.unpack_from(raw, position)
        position = start + length
        if position > len(raw):
            raise ValueError(
                f"raw BYTES contents end in element {len(elements)}: "
                f"its length says {length} bytes, got {len(raw) - start}"
            )
        elements.append(raw[start:position])
    if len(elements) != count:
        raise ValueError(
            f"raw BYTES contents hold {len(elements)} elements, the shape says {count}"
        )
    if position != len(raw):
        raise ValueError(
            f"raw BYTES contents go on for {len(raw) - position} bytes after the {count} elements "
            f"of the shape"
        )
    return elements


def _count(shape: Sequence[int]) -> int:
    """Elements of an array of `shape`, in Python integers, which do not overflow."""
    if any(d < 0 for d in shape):
        raise ValueError(f"shape {list(shape)} has a negative dimension: give each its size")
    return math.prod(shape)


def _objects(elements: list[bytes], shape: Sequence[int]) -> Array:
    # Filled after its creation: numpy would make an array of byte strings of the list itself,
    # and cut the zero bytes at their ends.
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(tuple(shape))
