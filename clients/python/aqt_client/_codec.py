"""Arguments to request messages, and response messages to results."""

from collections.abc import Mapping, Sequence

import grpc
import numpy as np
from numpy.typing import ArrayLike

from aqt_client._calls import MAX_MESSAGE_NBYTES
from aqt_client._errors import ServerError
from aqt_client._results import (
    InferResult,
    ModelMetadata,
    ModelState,
    ServerMetadata,
    TensorMetadata,
)
from aqt_protos import open_inference_pb2 as pb
from aqt_protos import tensors


def infer_request(
    model: str,
    inputs: Mapping[str, ArrayLike],
    *,
    version: str,
    outputs: Sequence[str] | None,
    request_id: str,
) -> pb.ModelInferRequest:
    """The request for `inputs`, as raw contents.

    Raises:
      ValueError: an input cannot be sent as any datatype of the protocol, or all together are too
        large for one message.
    """
    request = pb.ModelInferRequest(model_name=model, model_version=version, id=request_id)
    for name, value in inputs.items():
        try:
            array = np.asarray(value)
            datatype = tensors.datatype_of(array.dtype)
            raw = tensors.to_raw(array)
        except ValueError as error:
            raise ValueError(f"input {name!r} cannot be sent: {error}") from error
        request.inputs.add(name=name, datatype=datatype.name, shape=array.shape)
        request.raw_input_contents.append(raw)
    for name in outputs or ():
        request.outputs.add(name=name)
    # gRPC would refuse it too, but only after it is serialized, and without saying what to do.
    if request.ByteSize() > MAX_MESSAGE_NBYTES:
        raise ValueError(
            f"the request has {request.ByteSize()} bytes and a message holds at most "
            f"{MAX_MESSAGE_NBYTES}: send fewer rows in each request"
        )
    return request


def infer_result(response: pb.ModelInferResponse) -> InferResult:
    """The result that a response stands for, from raw or typed contents.

    Raises:
      ServerError: the response breaks the protocol.
    """
    raw = response.raw_output_contents
    if raw and len(raw) != len(response.outputs):
        raise _broken(f"it has {len(response.outputs)} outputs and raw contents for {len(raw)}")
    arrays: dict[str, tensors.Array] = {}
    for index, output in enumerate(response.outputs):
        try:
            datatype = tensors.datatype(output.datatype)
            arrays[output.name] = (
                tensors.from_raw(raw[index], datatype, output.shape)
                if raw
                else tensors.from_contents(output.contents, datatype, output.shape)
            )
        except ValueError as error:
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


def _broken(reason: str) -> ServerError:
    return ServerError(
        f"the server's answer breaks the protocol: {reason}", code=grpc.StatusCode.INTERNAL
    )
