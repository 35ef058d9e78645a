"""From the wire to arrays: checks the inputs of a request against a model's signature."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aqt_engine.bundle import Manifest, TensorSpec
from aqt_protos import open_inference_pb2 as pb
from aqt_protos.tensors import Datatype, datatype, datatype_of, from_contents, from_raw
from aqt_server.errors import InvalidRequest
from aqt_server.shared_memory import Regions

_Input = pb.ModelInferRequest.InferInputTensor


def decode(
    request: pb.ModelInferRequest, manifest: Manifest, regions: Regions
) -> dict[str, np.ndarray[Any, Any]]:
    """The inputs of `request` by name, in the signature's order, all with the same rows.

    Raises:
      InvalidRequest: they do not fit the signature; the message says which input and why.
      NotFound: one is in a shared memory region that is not registered.
    """
    _check_names(request, manifest)
    specs = {spec.name: spec for spec in manifest.inputs}
    raw = _raw_contents(request, regions)
    arrays = {tensor.name: _array(tensor, raw, specs[tensor.name]) for tensor in request.inputs}
    if len({len(array) for array in arrays.values()}) > 1:
        rows = ", ".join(f"{name!r} has {len(array)}" for name, array in arrays.items())
        raise InvalidRequest(f"inputs must have the same number of rows, and {rows}")
    return {spec.name: arrays[spec.name] for spec in manifest.inputs}


def describe(spec: TensorSpec) -> tuple[str, list[int]]:
    """The protocol's datatype and shape of `spec`, where -1 counts rows."""
    return datatype_of(np.dtype(spec.dtype)).name, [-1, *(int(d) for d in spec.shape[1:])]


def _check_names(request: pb.ModelInferRequest, manifest: Manifest) -> None:
    expected = [spec.name for spec in manifest.inputs]
    given = [tensor.name for tensor in request.inputs]
    check_known("input", given, expected)
    missing = [name for name in expected if name not in given]
    if missing:
        raise InvalidRequest(f"input {missing[0]!r} is missing: the model takes {_list(expected)}")


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


def _raw_contents(request: pb.ModelInferRequest, regions: Regions) -> dict[str, bytes]:
    """The raw contents of each input that has some, from shared memory or from the message.

    In the message they stand without names: one for each input that is not in shared memory.
    """
    raw: dict[str, bytes] = {}
    for tensor in request.inputs:
        window = regions.window(tensor.parameters, f"input {tensor.name!r}")
        if window:
            raw[tensor.name] = window.read()
    in_message = [tensor.name for tensor in request.inputs if tensor.name not in raw]
    contents = request.raw_input_contents
    if contents and len(contents) != len(in_message):
        raise InvalidRequest(
            f"got {len(contents)} raw contents for {len(in_message)} inputs: send one for each "
            f"that is not in shared memory, in their order, or none and the elements in `contents`"
        )
    return raw | dict(zip(in_message, contents, strict=False))


def _array(
    tensor: _Input, raw_contents: Mapping[str, bytes], spec: TensorSpec
) -> np.ndarray[Any, Any]:
    kind = _checked_datatype(tensor, spec)
    _check_shape(tensor.shape, spec)
    raw = raw_contents.get(spec.name)
    if raw is not None and tensor.HasField("contents"):
        raise InvalidRequest(
            f"input {spec.name!r} has its elements in `contents`, and has raw contents or is in "
            f"shared memory too: send one of them"
        )
    try:
        if raw is not None:
            return from_raw(raw, kind, tensor.shape)
        return from_contents(tensor.contents, kind, tensor.shape)
    except ValueError as error:
        raise InvalidRequest(f"input {spec.name!r}: {error}") from error


def _checked_datatype(tensor: _Input, spec: TensorSpec) -> Datatype:
    expected, _ = describe(spec)
    if tensor.datatype != expected:
        raise InvalidRequest(
            f"input {spec.name!r} has datatype {tensor.datatype!r}, and the model takes "
            f"{expected}: convert it before it is sent"
        )
    return datatype(expected)


def _check_shape(shape: Sequence[int], spec: TensorSpec) -> None:
    _, expected = describe(spec)
    fits = len(shape) == len(expected) and list(shape[1:]) == expected[1:] and shape[0] >= 0
    if not fits:
        raise InvalidRequest(
            f"input {spec.name!r} has shape {list(shape)}, and the model takes {expected}, where "
            f"-1 is any number of rows"
        )


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def rows_of(arrays: Mapping[str, np.ndarray[Any, Any]]) -> int:
    """The rows that all of `arrays` have."""
    return len(next(iter(arrays.values())))
