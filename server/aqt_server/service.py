"""The RPCs of inference and metadata: each a few lines between the wire and the repository.

They know nothing of the door that a call comes through; each door calls `Service.answer`.
"""

import asyncio
import dataclasses
import functools
import importlib.metadata
import logging
import time
from typing import Any

from google.protobuf.message import Message

from aqt_engine import lengths
from aqt_protos import open_inference_pb2 as pb
from aqt_server import codec, outputs, parameters
from aqt_server.administration import Administration
from aqt_server.call import Call
from aqt_server.errors import RequestError
from aqt_server.model_config import PLATFORM
from aqt_server.queue import DEFAULT_PRIORITY, PRIORITY_LEVELS, Outputs
from aqt_server.records import about
from aqt_server.security.authorization import Action, needed
from aqt_server.servable import Servable
from aqt_server.statistics import Times

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


class Service(Administration):
    """`inference.GRPCInferenceService`, whole."""

    async def answer(self, rpc: str, request: Message, call: Call) -> Message:
        """The response of `rpc` to `request`, if who calls may have it.

        Raises:
          RequestError: it is refused, for whatever reason.
        """
        action, model = needed(rpc, request)
        asked = {
            "rpc": rpc,
            "model": model,
            "principal": call.principal.name,
            "request_id": getattr(request, "id", "") or call.headers.get("x-request-id", ""),
        }
        status = "OK"
        try:
            with self._spans.request(call.headers, asked), about(asked):
                try:
                    self._guard.check(call.principal, action, model)
                    if action is not Action.HEALTH:
                        self._rates.check(call)
                    method: Any = getattr(self, rpc)
                    return await method(request, call)
                except BaseException as error:
                    status = _status(error)
                    _log.debug("refused with %s: %s", status, error)
                    raise
        finally:
            self.calls[rpc, status] += 1

    async def ServerLive(self, request: pb.ServerLiveRequest, call: Call):
        """Live as soon as it answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, call: Call):
        """Ready when every version that was to be loaded at the start is loaded or refused."""
        return pb.ServerReadyResponse(ready=self._repository.scanned)

    async def ModelReady(self, request: pb.ModelReadyRequest, call: Call):
        """Ready when a request to this model would be computed; unknown models are not ready."""
        try:
            servable = self._repository.get(request.name, request.version)
        except RequestError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=not servable.batcher.hung)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, call: Call):
        """The server's name and version, and the extensions of the protocol that it has."""
        return pb.ServerMetadataResponse(
            name="aqt_server",
            version=importlib.metadata.version("aqt-engine"),
            extensions=_EXTENSIONS,
        )

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, call: Call):
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

    async def ModelInfer(self, request: pb.ModelInferRequest, call: Call):
        """The model's answer to each row of the request."""
        servable = self._repository.get(
            request.model_name, request.model_version, request_id=request.id
        )
        arrived = time.monotonic_ns()
        with servable.statistics.failures_counted(arrived=arrived):
            schedule = _schedule(request, call)
            regions = self._regions[call.principal]
            decoded = codec.decode(request, servable.manifest, regions)
            wants = outputs.wanted(request, servable.manifest, regions)
            found, times = await _answer(servable, decoded, schedule)
            if decoded.sizes:
                found = lengths.cut(servable.manifest, found, decoded.sizes)
            response = outputs.encode(request, wants, found)
        response.model_name = servable.name
        response.model_version = str(servable.version)
        response.parameters["aqt_exact"].bool_param = servable.exact
        response.parameters["aqt_mode"].string_param = servable.mode
        servable.statistics.succeeded(times, arrived=arrived, rows=decoded.rows)
        self._spans.stages(arrived=arrived, times=times, rows=decoded.rows)
        self._tracer.trace(
            request,
            model=servable.name,
            version=servable.version,
            arrived=arrived,
            times=times,
        )
        _log.debug("%s version %d answered %d rows", servable.name, servable.version, decoded.rows)
        return response


def _status(error: BaseException) -> str:
    if isinstance(error, RequestError):
        return error.code.name
    return "CANCELLED" if isinstance(error, asyncio.CancelledError) else "INTERNAL"


@dataclasses.dataclass(frozen=True, slots=True)
class _Schedule:
    priority: int
    deadline: float | None
    answer_by: float | None


def _schedule(request: pb.ModelInferRequest, call: Call) -> _Schedule:
    """When `request` has to be computed: its parameters, and the deadline of the call itself."""
    owner = "the request"
    priority = parameters.integer(request.parameters, "priority", owner, largest=PRIORITY_LEVELS)
    timeout_us = parameters.integer(request.parameters, "timeout", owner)
    limits_s = [timeout_us / 1e6] if timeout_us else []
    if call.remaining_s is not None:
        limits_s.append(call.remaining_s)
    now = asyncio.get_running_loop().time()
    return _Schedule(
        priority=priority or DEFAULT_PRIORITY,
        deadline=now + min(limits_s) if limits_s else None,
        answer_by=None if call.remaining_s is None else now + call.remaining_s,
    )


async def _answer(
    servable: Servable, decoded: codec.Decoded, schedule: _Schedule
) -> tuple[Outputs, Times | None]:
    """The outputs, and when they were computed: None if they come from the cache."""
    compute = functools.partial(
        servable.batcher.run,
        decoded.inputs,
        group=decoded.length_bucket,
        priority=schedule.priority,
        deadline=schedule.deadline,
        answer_by=schedule.answer_by,
    )
    if servable.cache:
        return await servable.cache.answer(
            decoded.inputs, compute, priority=schedule.priority, deadline=schedule.deadline
        )
    answer = await compute()
    return answer.outputs, answer.times


def _metadata(
    name: str, described: tuple[str, list[int]]
) -> pb.ModelMetadataResponse.TensorMetadata:
    datatype, shape = described
    return pb.ModelMetadataResponse.TensorMetadata(name=name, datatype=datatype, shape=shape)
