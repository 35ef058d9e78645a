"""From arrays to the wire: the outputs that a request asks for, in the form that it asks for."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from aqt_engine.bundle import Arrays, Manifest
from aqt_protos import open_inference_pb2 as pb
from aqt_protos.tensors import Array, datatype_of, to_raw
from aqt_server import parameters
from aqt_server.codec import check_known
from aqt_server.shared_memory import Regions, Window


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One output that a request asks for.

    `classes` is how many of its largest values are wanted, 0 for the tensor itself. `window` is
    where in shared memory it is to be put, None for in the response.
    """

    name: str
    classes: int
    window: Window | None


def wanted(
    request: pb.ModelInferRequest, manifest: Manifest, regions: Regions
) -> tuple[Wanted, ...]:
    """The outputs that `request` asks for; all of them if it names none.

    Raises:
      InvalidRequest: the model has no such output, or a parameter has a wrong type or range.
      NotFound: one is to be put into a shared memory region that is not registered.
    """
    known = [spec.name for spec in manifest.outputs]
    if not request.outputs:
        return tuple(Wanted(name=name, classes=0, window=None) for name in known)
    check_known("output", [output.name for output in request.outputs], known)
    return tuple(
        Wanted(
            name=output.name,
            classes=parameters.integer(
                output.parameters, "classification", f"output {output.name!r}"
            ),
            window=regions.window(output.parameters, f"output {output.name!r}"),
        )
        for output in request.outputs
    )


def encode(
    request: pb.ModelInferRequest, wants: Sequence[Wanted], found: Arrays
) -> pb.ModelInferResponse:
    """The response to `request`, without what it says of the model.

    Outputs are raw, unless the request had typed contents and every output has a typed form. One
    that was put into shared memory has empty raw contents, as their order is all that names them.

    Raises:
      InvalidRequest: an output does not fit into its part of shared memory.
    """
    arrays = [
        _classified(found[want.name], want.classes) if want.classes else found[want.name]
        for want in wants
    ]
    kinds = [datatype_of(array.dtype) for array in arrays]
    as_typed = any(tensor.HasField("contents") for tensor in request.inputs) and all(
        kind.contents for kind in kinds
    )
    response = pb.ModelInferResponse(id=request.id)
    for want, array, kind in zip(wants, arrays, kinds, strict=True):
        tensor = response.outputs.add(name=want.name, datatype=kind.name, shape=array.shape)
        raw = b"" if as_typed and not want.window else to_raw(array)
        if want.window:
            want.window.write(raw)
            _describe_window(tensor, want.window, len(raw))
            raw = b""
        elif as_typed:
            getattr(tensor.contents, str(kind.contents)).extend(array.ravel().tolist())
        if not as_typed:
            response.raw_output_contents.append(raw)
    return response


def _describe_window(
    tensor: pb.ModelInferResponse.InferOutputTensor, window: Window, nbytes: int
) -> None:
    tensor.parameters["shared_memory_region"].string_param = window.region.name
    tensor.parameters["shared_memory_offset"].int64_param = window.offset
    tensor.parameters["shared_memory_byte_size"].int64_param = nbytes


def _classified(array: Array, classes: int) -> Array:
    """The largest values of each row as b"value:index", largest first, then lowest index.

    The shape is (rows, `classes`), or fewer where a row has fewer values; NaNs come last. A value
    is written with as many digits as its bits need, so that none are lost.
    """
    rows = len(array)
    values = array.reshape(rows, int(np.prod(array.shape[1:])))
    count = min(classes, values.shape[1])
    found = np.empty((rows, count), object)
    for row, of_row in enumerate(values):
        for place, index in enumerate(_descending(of_row)[:count]):
            found[row, place] = f"{_digits(of_row[index])}:{index}".encode()
    return found


def _descending(values: Array) -> Array:
    """Indices of `values`, largest first; equal ones by index, NaNs last."""
    if values.dtype.kind not in "iub":
        values = np.where(np.isnan(values), np.array(-np.inf, values.dtype), values)
    # Stable, and backwards twice: the ascending order of the reversed row, read from its end.
    return len(values) - 1 - np.argsort(values[::-1], kind="stable")[::-1]


def _digits(value: Any) -> str:
    return str(int(value)) if value.dtype.kind == "b" else str(value)
