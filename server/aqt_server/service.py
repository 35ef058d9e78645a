"""The RPCs of inference and metadata: each a few lines between the wire and the repository."""

import asyncio
import dataclasses
import importlib.metadata
import logging
import time
from collections.abc import AsyncIterator

from aqt_engine import lengths
from aqt_protos import open_inference_pb2 as pb
from aqt_server import codec, outputs, parameters
from aqt_server.administration import Administration
from aqt_server.batcher import DEFAULT_PRIORITY, PRIORITY_LEVELS
from aqt_server.errors import RequestError
from aqt_server.model_config import PLATFORM
from aqt_server.rpc import Context, answered, status_of
from aqt_server.streaming import answer_in_order

_log = logging.getLogger(__name__)
_EXTENSIONS = (
    "classification",
    "logging",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
    "system_shared_memory",
    "trace",
)


class InferenceService(Administration):
    """`inference.GRPCInferenceService`, whole."""

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context):
        """Live as soon as it answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context):
        """Ready when every version that was to be loaded at the start is loaded or refused."""
        return pb.ServerReadyResponse(ready=self._repository.scanned)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context):
        """Ready when a request to this model would be computed; unknown models are not ready."""
        try:
            self._repository.get(request.name, request.version)
        except RequestError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context):
        """The server's name and version, and the extensions of the protocol that it has."""
        return pb.ServerMetadataResponse(
            name="aqt_server",
            version=importlib.metadata.version("aqt-engine"),
            extensions=_EXTENSIONS,
        )

    @answered
    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context):
        """A model's ready versions, and the signature of the one that is asked for."""
        servable = self._repository.get(request.name, request.version)
        return pb.ModelMetadataResponse(
            name=servable.name,
            versions=[str(s.version) for s in self._repository.ready() if s.name == servable.name],
            platform=PLATFORM,
            inputs=[
                _metadata(spec.name, codec.describe_input(spec, servable.manifest))
                for spec in servable.manifest.inputs
            ],
            outputs=[
                _metadata(spec.name, codec.describe(spec)) for spec in servable.manifest.outputs
            ],
        )

    @answered
    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context):
        """The model's answer to each row of the request."""
        return await self._infer(request, context)

    async def ModelStreamInfer(  # pyright: ignore[reportIncompatibleMethodOverride]
        # The stubs know only generators; gRPC also takes a coroutine that writes.
        self,
        request_iterator: AsyncIterator[pb.ModelInferRequest],
        context: Context,
    ) -> None:
        """The answers to a stream of requests, in their order; an error ends only its request."""

        async def answer(request: pb.ModelInferRequest) -> pb.ModelStreamInferResponse:
            try:
                response = await self._infer(request, context)
            except Exception as error:
                code, sentence = status_of(error)
                response = pb.ModelInferResponse(id=request.id)
                response.parameters["aqt_status"].string_param = code.name
                return pb.ModelStreamInferResponse(error_message=sentence, infer_response=response)
            # What clients of decoupled models wait for: here every response is its request's last.
            response.parameters["triton_final_response"].bool_param = True
            return pb.ModelStreamInferResponse(infer_response=response)

        await answer_in_order(request_iterator, answer, context.write)

    async def _infer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        servable = self._repository.get(request.model_name, request.model_version)
        arrived = time.monotonic_ns()
        with servable.statistics.failures_counted(arrived=arrived):
            schedule = _schedule(request, context)
            decoded = codec.decode(request, servable.manifest, self._regions)
            wants = outputs.wanted(request, servable.manifest, self._regions)
            answer = await servable.batcher.run(
                decoded.inputs,
                group=decoded.length_bucket,
                priority=schedule.priority,
                deadline=schedule.deadline,
            )
            found = answer.outputs
            if decoded.sizes:
                found = lengths.cut(servable.manifest, found, decoded.sizes)
            response = outputs.encode(request, wants, found)
        response.model_name = servable.name
        response.model_version = str(servable.version)
        response.parameters["aqt_exact"].bool_param = servable.exact
        response.parameters["aqt_mode"].string_param = servable.mode
        servable.statistics.succeeded(answer.times, arrived=arrived, rows=decoded.rows)
        self._tracer.trace(
            request,
            model=servable.name,
            version=servable.version,
            arrived=arrived,
            times=answer.times,
        )
        _log.debug("%s version %d answered %d rows", servable.name, servable.version, decoded.rows)
        return response


@dataclasses.dataclass(frozen=True, slots=True)
class _Schedule:
    priority: int
    deadline: float | None


def _schedule(request: pb.ModelInferRequest, context: Context) -> _Schedule:
    """When `request` has to be computed: its parameters, and the deadline of the call itself."""
    owner = "the request"
    priority = parameters.integer(request.parameters, "priority", owner, largest=PRIORITY_LEVELS)
    timeout_us = parameters.integer(request.parameters, "timeout", owner)
    remaining_s = context.time_remaining()
    limits_s = [timeout_us / 1e6] if timeout_us else []
    # The stub says float, and a call without a deadline has None.
    if remaining_s is not None:  # pyright: ignore[reportUnnecessaryComparison]
        limits_s.append(remaining_s)
    now = asyncio.get_running_loop().time()
    return _Schedule(
        priority=priority or DEFAULT_PRIORITY,
        deadline=now + min(limits_s) if limits_s else None,
    )


def _metadata(
    name: str, described: tuple[str, list[int]]
) -> pb.ModelMetadataResponse.TensorMetadata:
    datatype, shape = described
    return pb.ModelMetadataResponse.TensorMetadata(name=name, datatype=datatype, shape=shape)
