"""Between the wire and arrays: checks a request against a signature, and builds the response."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aqt_engine.bundle import Arrays, Manifest, TensorSpec
from aqt_protos import open_inference_pb2 as pb
from aqt_protos.tensors import Datatype, datatype, datatype_of, from_contents, from_raw, to_raw
from aqt_server.errors import InvalidRequest, NotSupported

_UNSUPPORTED = ("shared_memory_region", "classification")


def decode(request: pb.ModelInferRequest, manifest: Manifest) -> dict[str, np.ndarray[Any, Any]]:
    """The inputs of `request` by name, in the signature's order, all with the same rows.

    Raises:
      InvalidRequest: they do not fit the signature; the message says which input and why.
      NotSupported: they refer to shared memory, or ask for classification.
    """
    for tensor in (*request.inputs, *request.outputs):
        for parameter in _UNSUPPORTED:
            if parameter in tensor.parameters:
                raise NotSupported(
                    f"tensor {tensor.name!r} asks for {parameter!r}, which this server does not "
                    f"have: send and receive tensors in the messages"
                )
    _check_names(request, manifest)
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            f"got {len(raw)} raw contents for {len(request.inputs)} inputs: send one for each, in "
            f"their order, or none and the elements in `contents`"
        )
    specs = {spec.name: spec for spec in manifest.inputs}
    arrays = {
        tensor.name: _array(tensor, raw[i] if raw else None, specs[tensor.name])
        for i, tensor in enumerate(request.inputs)
    }
    if len({len(array) for array in arrays.values()}) > 1:
        rows = ", ".join(f"{name!r} has {len(array)}" for name, array in arrays.items())
        raise InvalidRequest(f"inputs must have the same number of rows, and {rows}")
    return {spec.name: arrays[spec.name] for spec in manifest.inputs}


def encode(
    request: pb.ModelInferRequest, outputs: Arrays, *, model: str, version: str, exact: bool
) -> pb.ModelInferResponse:
    """The response to `request`, with the outputs that it asks for, or all of them.

    Outputs are raw, unless the request had typed contents and every output has a typed form.
    """
    wanted = [output.name for output in request.outputs] or list(outputs)
    chosen = [(name, outputs[name], datatype_of(outputs[name].dtype)) for name in wanted]
    response = pb.ModelInferResponse(model_name=model, model_version=version, id=request.id)
    response.parameters["aqt_exact"].bool_param = exact
    as_typed = not request.raw_input_contents and all(kind.contents for _, _, kind in chosen)
    for name, array, kind in chosen:
        tensor = response.outputs.add(name=name, datatype=kind.name, shape=array.shape)
        if as_typed:
            getattr(tensor.contents, str(kind.contents)).extend(array.ravel().tolist())
        else:
            response.raw_output_contents.append(to_raw(array))
    return response


def describe(spec: TensorSpec) -> tuple[str, list[int]]:
    """The protocol's datatype and shape of `spec`, where -1 counts rows."""
    return datatype_of(np.dtype(spec.dtype)).name, [-1, *(int(d) for d in spec.shape[1:])]


def _check_names(request: pb.ModelInferRequest, manifest: Manifest) -> None:
    expected = [spec.name for spec in manifest.inputs]
    given = [tensor.name for tensor in request.inputs]
    _check_known("input", given, expected)
    missing = [name for name in expected if name not in given]
    if missing:
        raise InvalidRequest(f"input {missing[0]!r} is missing: the model takes {_list(expected)}")
    _check_known(
        "output", [output.name for output in request.outputs], [o.name for o in manifest.outputs]
    )


def _check_known(side: str, given: Sequence[str], known: Sequence[str]) -> None:
    for i, name in enumerate(given):
        if name not in known:
            raise InvalidRequest(f"the model has no {side} {name!r}: it has {_list(known)}")
        if name in given[:i]:
            raise InvalidRequest(f"{side} {name!r} is given twice: name each once")


def _array(
    tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None, spec: TensorSpec
) -> np.ndarray[Any, Any]:
    kind = _checked_datatype(tensor, spec)
    _check_shape(tensor.shape, spec)
    if raw is not None and tensor.HasField("contents"):
        raise InvalidRequest(
            f"input {spec.name!r} has its elements in `contents`, and the request has raw "
            f"contents too: send one of them"
        )
    try:
        if raw is not None:
            return from_raw(raw, kind, tensor.shape)
        return from_contents(tensor.contents, kind, tensor.shape)
    except ValueError as error:
        raise InvalidRequest(f"input {spec.name!r}: {error}") from error


def _checked_datatype(tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec) -> Datatype:
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
