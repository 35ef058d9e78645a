"""Requests and responses of inference as HTTP carries them: JSON, and tensors after it in binary.

The header Inference-Header-Content-Length says how long the JSON is where binary tensors follow it:
one after the other, in the order of the inputs or outputs that have a `binary_data_size`. Inside of
the server both forms are the messages of gRPC, so that they are checked and answered by the same
code.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from aqt_protos import open_inference_pb2 as pb
from aqt_protos.tensors import Datatype, datatype, encode_bytes, from_raw, to_raw
from aqt_server.errors import InvalidRequest

LENGTH_HEADER = "Inference-Header-Content-Length"
_Document = Mapping[str, Any]
_FIELDS = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}


def read_request(
    body: bytes, header_length: str | None, *, model: str, version: str, max_json_bytes: int
) -> tuple[pb.ModelInferRequest, frozenset[str] | None]:
    """The message that `body` is, and which of its outputs are wanted in binary, None for all.

    Raises:
      InvalidRequest: the body does not have the form of the protocol.
    """
    length = _header_length(header_length, len(body))
    document = read_document(body[:length], max_json_bytes)
    binary = memoryview(body)[length:]
    request = pb.ModelInferRequest(
        model_name=model, model_version=version, id=_typed(document, "id", str, "")
    )
    given = dict(_typed(document, "parameters", dict, {}))
    all_binary = given.pop("binary_data_output", False)
    _set_parameters(request.parameters, given, "the request")
    for tensor in _tensors(document, "inputs"):
        binary = _add_input(request, tensor, binary)
    if binary:
        raise InvalidRequest(
            f"{len(binary)} bytes follow the tensors: each input in binary says its size in "
            f"`binary_data_size`"
        )
    in_binary: set[str] = set()
    for tensor in _tensors(document, "outputs"):
        name = _typed(tensor, "name", str)
        parameters = dict(_typed(tensor, "parameters", dict, {}))
        if parameters.pop("binary_data", all_binary):
            in_binary.add(name)
        _set_parameters(request.outputs.add(name=name).parameters, parameters, f"output {name!r}")
    return request, None if all_binary and not request.outputs else frozenset(in_binary)


def write_response(
    response: pb.ModelInferResponse, in_binary: frozenset[str] | None
) -> tuple[bytes, int | None]:
    """The body of `response`, and how long its JSON is if binary tensors follow, else None."""
    outputs: list[dict[str, Any]] = []
    tensors: list[bytes] = []
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        parameters = _parameters(tensor.parameters)
        document: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
        }
        if "shared_memory_region" in parameters:
            pass
        elif in_binary is None or tensor.name in in_binary:
            parameters["binary_data_size"] = len(raw)
            tensors.append(raw)
        else:
            array = from_raw(raw, datatype(tensor.datatype), tensor.shape)
            document["data"] = [_plain(e) for e in array.ravel().tolist()]
        if parameters:
            document["parameters"] = parameters
        outputs.append(document)
    head = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id:
        head["id"] = response.id
    text = json.dumps(
        {**head, "parameters": _parameters(response.parameters), "outputs": outputs}
    ).encode()
    return b"".join((text, *tensors)), len(text) if tensors else None


def read_document(body: bytes, max_json_bytes: int) -> dict[str, Any]:
    """The JSON object that `body` is; an empty one is {}.

    Raises:
      InvalidRequest: it is none, or is longer than JSON may be.
    """
    if len(body) > max_json_bytes:
        raise InvalidRequest(
            f"the JSON has {len(body)} bytes, and the server takes at most {max_json_bytes}, as it "
            f"takes many times that much memory: send tensors in binary"
        )
    try:
        document = json.loads(body) if body else {}
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidRequest("the body is no JSON object")
    return cast(dict[str, Any], document)


def _header_length(text: str | None, whole: int) -> int:
    if text is None:
        return whole
    length = int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else -1
    if not 0 <= length <= whole:
        raise InvalidRequest(f"{LENGTH_HEADER} is {text!r}, and the body has {whole} bytes")
    return length


def _tensors(document: _Document, side: str) -> list[_Document]:
    tensors = _typed(document, side, list, [])
    if not all(isinstance(tensor, dict) for tensor in tensors):
        raise InvalidRequest(f"`{side}` is a list of objects with a name")
    return cast(list[_Document], tensors)


def _add_input(request: pb.ModelInferRequest, tensor: _Document, binary: memoryview) -> memoryview:
    """Adds `tensor` to `request`, and returns what is left of `binary`."""
    name = _typed(tensor, "name", str)
    shape = _typed(tensor, "shape", list)
    if not all(type(d) is int and abs(d) < 2**63 for d in shape):
        raise InvalidRequest(f"the shape of input {name!r} is a list of whole numbers")
    kind = _typed(tensor, "datatype", str)
    added = request.inputs.add(name=name, datatype=kind, shape=shape)
    parameters = dict(_typed(tensor, "parameters", dict, {}))
    size = parameters.pop("binary_data_size", None)
    _set_parameters(added.parameters, parameters, f"input {name!r}")
    if size is not None:
        if type(size) is not int or not 0 <= size <= len(binary):
            raise InvalidRequest(
                f"`binary_data_size` of input {name!r} is {size!r}, and {len(binary)} bytes are "
                f"left"
            )
        if "data" in tensor:
            raise InvalidRequest(f"input {name!r} has `data` and binary data: send one of them")
        request.raw_input_contents.append(bytes(binary[:size]))
        return binary[size:]
    if "data" in tensor:
        try:
            raw = _raw(_typed(tensor, "data", list), datatype(kind))
        except ValueError as error:
            raise InvalidRequest(f"input {name!r}: {error}") from error
        request.raw_input_contents.append(raw)
    elif "shared_memory_region" not in parameters:
        raise InvalidRequest(f"input {name!r} has no `data`, and no other place to find it in")
    return binary


def _raw(data: Sequence[Any], kind: Datatype) -> bytes:
    """The raw contents of `data`, numbers or text in nested lists, in C order."""
    if kind.name == "BYTES":
        return encode_bytes(np.array(data, object).ravel().tolist())
    if kind.dtype.kind in "iub":
        # As objects: of integers that fit into different types, numpy would make floats.
        elements = np.array(data, object).ravel().tolist()
        if any(type(e) is not (bool if kind.name == "BOOL" else int) for e in elements):
            raise ValueError(f"`data` has elements that are no {kind.name}")
        try:
            return to_raw(np.array(elements, kind.dtype))
        except OverflowError as error:
            raise ValueError(f"`data` has an element outside of {kind.name}") from error
    array = np.array(data)
    if array.size and array.dtype.kind not in "iuf":
        raise ValueError(f"`data` has elements that are no {kind.name}")
    with np.errstate(over="ignore"):
        made = array.astype(kind.dtype)
    if not np.all(np.isfinite(made) | ~np.isfinite(array)):
        raise ValueError(f"`data` has an element outside of {kind.name}")
    return to_raw(made)


def _plain(element: Any) -> Any:
    return element.decode(errors="replace") if isinstance(element, bytes) else element


def _set_parameters(parameters: Any, given: Mapping[str, Any], owner: str) -> None:
    for name, value in given.items():
        field = _FIELDS.get(type(value))
        if field is None or (field == "int64_param" and abs(value) >= 2**63):
            raise InvalidRequest(f"parameter {name!r} of {owner} is no text, number or boolean")
        setattr(parameters[name], field, value)


def _parameters(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "string_param")
        for name, value in parameters.items()
    }


_MISSING: Any = object()


def _typed(document: _Document, name: str, kind: type, default: Any = _MISSING) -> Any:
    value = document.get(name, default)
    if value is _MISSING:
        raise InvalidRequest(f"`{name}` is missing: the request needs one")
    if not isinstance(value, kind):
        raise InvalidRequest(
            f"`{name}` is {json.dumps(value)[:80]}, and a {kind.__name__} is needed"
        )
    return value
