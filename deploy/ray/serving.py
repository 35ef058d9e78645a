"""A model repository behind Ray Serve: replicas of the server, each in a process of its own.

Ray Serve's proxy speaks our protocol over gRPC and gives each call to a replica. A replica loads
and proves the repository as `aqt serve` does, and answers by the same code.
"""

import asyncio
import contextlib
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, gRPCOptions
from ray.serve.grpc_util import RayServegRPCContext

from aqt_protos import open_inference_pb2 as pb
from aqt_server import compiled, configuration
from aqt_server.call import Call
from aqt_server.errors import RequestError
from aqt_server.logs import LogSettings
from aqt_server.policies import Policies
from aqt_server.repository import Repository
from aqt_server.security.authentication import ANONYMOUS
from aqt_server.security.authorization import Guard
from aqt_server.service import Service
from aqt_server.source import open_source
from aqt_server.spans import Spans
from aqt_server.tracing import Tracer

# A replica takes more calls at once than it has rows in a batch, so that batches fill.
_CALLS_AT_ONCE = 64


def grpc(port: int) -> gRPCOptions:
    """What `serve.start` needs for the proxy to speak our protocol."""
    added = (
        "aqt_protos.generated.open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"
    )
    return gRPCOptions(port=port, grpc_servicer_functions=[added])


def application(model_repository: str, *, replicas: int = 2, most_replicas: int = 8) -> Any:
    """The application that serves a repository, by `replicas` to `most_replicas` processes."""
    deployment = serve.deployment(
        Replica,
        max_ongoing_requests=_CALLS_AT_ONCE,
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas,
            max_replicas=most_replicas,
            target_ongoing_requests=_CALLS_AT_ONCE / 4,
        ),
        health_check_period_s=2,
        graceful_shutdown_timeout_s=40,
    )
    return deployment.bind(model_repository)


class Replica:
    """The server without its doors: those are Ray Serve's."""

    async def __init__(self, model_repository: str):
        flags = ["--model-repository", model_repository, "--model-control", "none"]
        settings = configuration.read(flags, {}).settings
        compiled.keep_in(settings.models.compilation_cache)
        source = open_source(model_repository, settings.serving.bundle_cache)
        policies = Policies(settings.serving.model_policies)
        self._repository = Repository(settings, source, policies)
        self._service = Service(
            repository=self._repository,
            guard=Guard(settings.access, settings.tls),
            tracer=Tracer(),
            logs=LogSettings(),
            limits=settings.limits,
            spans=Spans(settings.observe.otlp_endpoint, settings.observe.otlp_ratio),
        )
        # Under `none` it returns when everything is loaded or refused.
        await self._repository.watch(_nothing)

    async def ModelInfer(
        self, request: pb.ModelInferRequest, grpc_context: RayServegRPCContext
    ) -> pb.ModelInferResponse:
        return await self._answer("ModelInfer", request, grpc_context)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, grpc_context: RayServegRPCContext
    ) -> pb.ModelMetadataResponse:
        return await self._answer("ModelMetadata", request, grpc_context)

    async def ModelReady(
        self, request: pb.ModelReadyRequest, grpc_context: RayServegRPCContext
    ) -> pb.ModelReadyResponse:
        return await self._answer("ModelReady", request, grpc_context)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, grpc_context: RayServegRPCContext
    ) -> pb.ServerReadyResponse:
        return await self._answer("ServerReady", request, grpc_context)

    async def _answer(self, rpc: str, request: Any, context: RayServegRPCContext) -> Any:
        headers = {name.lower(): str(value) for name, value in context.invocation_metadata()}
        call = Call(principal=ANONYMOUS, peer=context.peer(), remaining_s=None, headers=headers)
        try:
            return await self._service.answer(rpc, request, call)
        except RequestError as error:
            context.set_code(error.code)
            context.set_details(str(error))
            raise

    async def __del__(self):
        with contextlib.suppress(AttributeError):
            await self._repository.close()


async def _nothing() -> None:
    await asyncio.sleep(0)
