"""Arguments to request messages, and response messages to results."""

from collections.abc import Mapping, MutableMapping, Sequence

import grpc
import numpy as np
from numpy.typing import ArrayLike

from aqt_client._calls import MAX_MESSAGE_NBYTES
from aqt_client._errors import ClientError, ServerError, from_answer
from aqt_client._results import (
    InferResult,
    ModelMetadata,
    ModelState,
    ServerMetadata,
    TensorMetadata,
)
from aqt_client._shared_memory import Region, SharedTensor
from aqt_protos import open_inference_pb2 as pb
from aqt_protos import tensors

Inputs = Mapping[str, ArrayLike | SharedTensor]
Outputs = Sequence[str] | Mapping[str, SharedTensor | None]


def infer_request(
    model: str,
    inputs: Inputs,
    *,
    version: str,
    outputs: Outputs | None,
    request_id: str = "",
) -> pb.ModelInferRequest:
    """The request for `inputs`, as raw contents, or by where they are in shared memory.

    Raises:
      ValueError: an input cannot be sent as any datatype of the protocol, or all together are too
        large for one message.
    """
    request = pb.ModelInferRequest(model_name=model, model_version=version, id=request_id)
    for name, value in inputs.items():
        if isinstance(value, SharedTensor):
            datatype = tensors.datatype_of(value.array.dtype)
            tensor = request.inputs.add(name=name, datatype=datatype.name, shape=value.array.shape)
            _place(tensor.parameters, value)
            continue
        try:
            array = np.asarray(value)
            datatype = tensors.datatype_of(array.dtype)
            raw = tensors.to_raw(array)
        except ValueError as error:
            raise ValueError(f"input {name!r} cannot be sent: {error}") from error
        request.inputs.add(name=name, datatype=datatype.name, shape=array.shape)
        request.raw_input_contents.append(raw)
    for name in outputs or ():
        wanted = request.outputs.add(name=name)
        if (place := _places(outputs).get(name)) is not None:
            _place(wanted.parameters, place)
    # gRPC would refuse it too, but only after it is serialized, and without saying what to do.
    if request.ByteSize() > MAX_MESSAGE_NBYTES:
        raise ValueError(
            f"the request has {request.ByteSize()} bytes and a message holds at most "
            f"{MAX_MESSAGE_NBYTES}: send fewer rows in each request"
        )
    return request


def infer_result(response: pb.ModelInferResponse, outputs: Outputs | None) -> InferResult:
    """The result that a response stands for, from raw or typed contents, or from shared memory.

    Raises:
      ServerError: the response breaks the protocol.
    """
    raw = response.raw_output_contents
    if raw and len(raw) != len(response.outputs):
        raise _broken(f"it has {len(response.outputs)} outputs and raw contents for {len(raw)}")
    places = _places(outputs)
    arrays: dict[str, tensors.Array] = {}
    for index, output in enumerate(response.outputs):
        try:
            datatype = tensors.datatype(output.datatype)
            if "shared_memory_region" in output.parameters:
                arrays[output.name] = places[output.name].read(datatype, output.shape)
                continue
            arrays[output.name] = (
                tensors.from_raw(raw[index], datatype, output.shape)
                if raw
                else tensors.from_contents(output.contents, datatype, output.shape)
            )
        except (ValueError, KeyError) as error:
            raise _broken(f"output {output.name!r}: {error}") from error
    return InferResult(
        outputs=arrays,
        model_name=response.model_name,
        model_version=response.model_version,
        id=response.id,
        parameters={
            name: getattr(parameter, choice)
            for name, parameter in response.parameters.items()
            if (choice := parameter.WhichOneof("parameter_choice"))
        },
    )


def stream_answer(
    response: pb.ModelStreamInferResponse, outputs: Outputs | None
) -> InferResult | ClientError:
    """The result or the error that an answer of a stream stands for."""
    if not response.error_message:
        return infer_result(response.infer_response, outputs)
    status = response.infer_response.parameters.get("aqt_status", pb.InferParameter())
    return from_answer(response.error_message, status.string_param)


def register(region: Region) -> pb.SystemSharedMemoryRegisterRequest:
    """The request that lets the server into `region`."""
    return pb.SystemSharedMemoryRegisterRequest(
        name=region.name, key=region.key, offset=0, byte_size=region.nbytes
    )


def server_metadata(response: pb.ServerMetadataResponse) -> ServerMetadata:
    """The result that a response stands for."""
    return ServerMetadata(
        name=response.name, version=response.version, extensions=tuple(response.extensions)
    )


def model_metadata(response: pb.ModelMetadataResponse) -> ModelMetadata:
    """The result that a response stands for."""
    return ModelMetadata(
        name=response.name,
        versions=tuple(response.versions),
        platform=response.platform,
        inputs=tuple(_tensor_metadata(t) for t in response.inputs),
        outputs=tuple(_tensor_metadata(t) for t in response.outputs),
    )


def model_states(response: pb.RepositoryIndexResponse, name: str) -> tuple[ModelState, ...]:
    """What a response says of the versions of the model `name`."""
    return tuple(
        ModelState(version=m.version, state=m.state, reason=m.reason)
        for m in response.models
        if m.name == name
    )


def _tensor_metadata(tensor: pb.ModelMetadataResponse.TensorMetadata) -> TensorMetadata:
    return TensorMetadata(name=tensor.name, datatype=tensor.datatype, shape=tuple(tensor.shape))


def _places(outputs: Outputs | None) -> Mapping[str, SharedTensor]:
    if not isinstance(outputs, Mapping):
        return {}
    return {name: place for name, place in outputs.items() if place is not None}


def _place(parameters: MutableMapping[str, pb.InferParameter], tensor: SharedTensor) -> None:
    parameters["shared_memory_region"].string_param = tensor.region
    parameters["shared_memory_offset"].int64_param = tensor.offset
    parameters["shared_memory_byte_size"].int64_param = tensor.array.nbytes


def _broken(reason: str) -> ServerError:
    return ServerError(
        f"the server's answer breaks the protocol: {reason}", code=grpc.StatusCode.INTERNAL
    )
