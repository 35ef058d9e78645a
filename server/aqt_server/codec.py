"""From the wire to arrays: checks the inputs of a request against a model's signature."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aqt_engine import lengths
from aqt_engine.bundle import Arrays, LengthBucket, Manifest, TensorSpec
from aqt_protos import open_inference_pb2 as pb
from aqt_protos.tensors import Datatype, datatype, datatype_of, from_contents, from_raw
from aqt_server.errors import InvalidRequest
from aqt_server.shared_memory import Regions

_Input = pb.ModelInferRequest.InferInputTensor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A request's inputs as its program takes them, all with `rows` rows.

    Symbolic dimensions are padded from `sizes`, which the answer is cut back to, to
    `length_bucket`.
    """

    inputs: Arrays
    rows: int
    length_bucket: LengthBucket
    sizes: Mapping[str, int]


def decode(request: pb.ModelInferRequest, manifest: Manifest, regions: Regions) -> Decoded:
    """The inputs of `request`, in the signature's order.

    Raises:
      InvalidRequest: they do not fit the signature; the message says which input and why.
      NotFound: one is in a shared memory region that is not registered.
    """
    # Each is read once, as reading a part of a message makes an object for it.
    tensors = {tensor.name: tensor for tensor in request.inputs}
    _check_names(request, tensors, manifest)
    raw = _raw_contents(request, tensors, regions)
    arrays = {
        spec.name: _array(spec.name, tensors[spec.name], raw.get(spec.name), spec, manifest)
        for spec in manifest.inputs
    }
    counted = {k: len(array) for k, array in arrays.items() if k not in manifest.per_request}
    if len(set(counted.values())) > 1:
        rows = ", ".join(f"{name!r} has {count}" for name, count in counted.items())
        raise InvalidRequest(f"inputs must have the same number of rows, and {rows}")
    rows = next(iter(counted.values()), 1)
    for name in manifest.per_request:
        arrays[name] = np.broadcast_to(arrays[name].reshape(()), (rows,))
    try:
        sizes = lengths.lengths_of(manifest, arrays)
        bucket = lengths.smallest(manifest, sizes)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    if sizes:
        arrays = lengths.pad(manifest, arrays, bucket)
    return Decoded(inputs=arrays, rows=rows, length_bucket=bucket, sizes=sizes)


def describe(spec: TensorSpec) -> tuple[str, list[int]]:
    """The protocol's datatype and shape of `spec`; -1 is rows, or what a request chooses."""
    name = datatype_of(np.dtype(spec.dtype)).name
    return name, [-1 if isinstance(dim, str) else dim for dim in spec.shape]


def describe_input(spec: TensorSpec, manifest: Manifest) -> tuple[str, list[int]]:
    """The protocol's datatype and shape of an input: [1] for one scalar per request."""
    name, shape = describe(spec)
    return name, [1] if spec.name in manifest.per_request else shape


def _check_names(
    request: pb.ModelInferRequest, tensors: Mapping[str, _Input], manifest: Manifest
) -> None:
    expected = [spec.name for spec in manifest.inputs]
    if len(request.inputs) == len(expected) and all(name in tensors for name in expected):
        return
    check_known("input", [tensor.name for tensor in request.inputs], expected)
    missing = next(name for name in expected if name not in tensors)
    raise InvalidRequest(f"input {missing!r} is missing: the model takes {_list(expected)}")


def check_known(side: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Checks that each of `given`, the names of a "side" of a request, is in `known`, and is once.

    Raises:
      InvalidRequest: it is not.
    """
    for i, name in enumerate(given):
        if name not in known:
            raise InvalidRequest(f"the model has no {side} {name!r}: it has {_list(known)}")
        if name in given[:i]:
            raise InvalidRequest(f"{side} {name!r} is given twice: name each once")


def _raw_contents(
    request: pb.ModelInferRequest, tensors: Mapping[str, _Input], regions: Regions
) -> dict[str, bytes]:
    """The raw contents of each input that has some, from shared memory or from the message.

    In the message they stand without names: one for each input that is not in shared memory.
    """
    raw: dict[str, bytes] = {}
    for name, tensor in tensors.items():
        # Most have none, and to look for one costs as much as to read the tensor.
        if tensor.parameters and (window := regions.window(tensor.parameters, f"input {name!r}")):
            raw[name] = window.read()
    in_message = [name for name in tensors if name not in raw]
    contents = request.raw_input_contents
    if contents and len(contents) != len(in_message):
        raise InvalidRequest(
            f"got {len(contents)} raw contents for {len(in_message)} inputs: send one for each "
            f"that is not in shared memory, in their order, or none and the elements in `contents`"
        )
    return raw | dict(zip(in_message, contents, strict=False))


def _array(
    name: str, tensor: _Input, raw: bytes | None, spec: TensorSpec, manifest: Manifest
) -> np.ndarray[Any, Any]:
    expected, expected_shape = describe_input(spec, manifest)
    kind = _checked_datatype(name, tensor, expected)
    shape = list(tensor.shape)
    _check_shape(name, shape, expected_shape)
    if raw is not None and tensor.HasField("contents"):
        raise InvalidRequest(
            f"input {name!r} has its elements in `contents`, and has raw contents or is in "
            f"shared memory too: send one of them"
        )
    try:
        if raw is not None:
            return from_raw(raw, kind, shape)
        return from_contents(tensor.contents, kind, shape)
    except ValueError as error:
        raise InvalidRequest(f"input {name!r}: {error}") from error


def _checked_datatype(name: str, tensor: _Input, expected: str) -> Datatype:
    found = tensor.datatype
    if found != expected:
        raise InvalidRequest(
            f"input {name!r} has datatype {found!r}, and the model takes "
            f"{expected}: convert it before it is sent"
        )
    return datatype(expected)


def _check_shape(name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    fits = expected == [1] and shape == []
    fits |= len(shape) == len(expected) and all(
        found == size or (size == -1 and found >= 0)
        for found, size in zip(shape, expected, strict=True)
    )
    if not fits:
        meaning = "one value for all rows" if expected == [1] else "where -1 is any number of rows"
        if -1 in expected[1:]:
            meaning = "where the first -1 is any number of rows, and another any length"
        raise InvalidRequest(
            f"input {name!r} has shape {shape}, and the model takes {expected}, {meaning}"
        )


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def rows_of(arrays: Mapping[str, np.ndarray[Any, Any]]) -> int:
    """The rows that all of `arrays` have."""
    return len(next(iter(arrays.values())))
