"""The RPCs of the Open Inference Protocol: each a few lines between the wire and the repository."""

import importlib.metadata
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc

from aqt_engine.bundle import TensorSpec
from aqt_protos import open_inference_pb2 as pb
from aqt_protos import open_inference_pb2_grpc as pb_grpc
from aqt_server import codec
from aqt_server.errors import RequestError
from aqt_server.repository import Repository

_log = logging.getLogger(__name__)
_Response = TypeVar("_Response")
_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(pb_grpc.GRPCInferenceServiceServicer):
    """`inference.GRPCInferenceService`; what it does not define answers UNIMPLEMENTED."""

    def __init__(self, repository: Repository):
        self._repository = repository

    async def ServerLive(self, request: pb.ServerLiveRequest, context: _Context):
        """Live as soon as it answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: _Context):
        """Ready when every version that was there at the start is loaded or refused."""
        return pb.ServerReadyResponse(ready=self._repository.scanned)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: _Context):
        """Ready when a request to this model would be computed; unknown models are not ready."""
        try:
            self._repository.get(request.name, request.version)
        except RequestError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: _Context):
        """The server's name and version; it has no extensions yet."""
        return pb.ServerMetadataResponse(
            name="aqt_server", version=importlib.metadata.version("aqt-engine")
        )

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: _Context):
        """A model's ready versions, and the signature of the one that is asked for."""

        async def answer() -> pb.ModelMetadataResponse:
            servable = self._repository.get(request.name, request.version)
            return pb.ModelMetadataResponse(
                name=servable.name,
                versions=map(str, self._repository.ready_versions(servable.name)),
                platform="aqt_stablehlo",
                inputs=map(_metadata, servable.manifest.inputs),
                outputs=map(_metadata, servable.manifest.outputs),
            )

        return await _answered(answer, context)

    async def ModelInfer(self, request: pb.ModelInferRequest, context: _Context):
        """The model's answer to each row of the request."""

        async def answer() -> pb.ModelInferResponse:
            servable = self._repository.get(request.model_name, request.model_version)
            inputs = codec.decode(request, servable.manifest)
            outputs = await servable.batcher.run(inputs)
            return codec.encode(
                request,
                outputs,
                model=servable.name,
                version=str(servable.version),
                exact=servable.exact,
            )

        return await _answered(answer, context)


def _metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    datatype, shape = codec.describe(spec)
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=datatype, shape=shape)


async def _answered(answer: Callable[[], Awaitable[_Response]], context: _Context) -> _Response:
    """The response, or the status that its error stands for."""
    try:
        return await answer()
    except RequestError as error:
        await context.abort(error.code, str(error))
    except Exception:
        _log.exception("a request failed")
        await context.abort(
            grpc.StatusCode.INTERNAL,
            "the server failed to compute this request, which is a defect of it: its log says more",
        )
