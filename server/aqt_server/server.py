"""The server's life: listen, load, serve; on a signal stop accepting, drain, and end."""

import asyncio
import logging
import signal
from pathlib import Path
from typing import Any

import grpc
import jax
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from aqt_protos import POOL, SERVICE_NAME, open_inference_pb2_grpc
from aqt_server.repository import Repository
from aqt_server.service import InferenceService
from aqt_server.settings import Settings

_log = logging.getLogger(__name__)
# The stubs do not know that the module has `aio`.
_Health: Any = health.aio.HealthServicer  # pyright: ignore[reportAttributeAccessIssue]
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_REFUSING_S = 0.5


class StartError(Exception):
    """The server cannot start with these settings."""


def run(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, and returns when the accepted requests are answered.

    Raises:
      StartError: the repository is not there, or the port cannot be had.
    """
    if not settings.model_repository.is_dir():
        raise StartError(
            f"--model-repository {settings.model_repository} is no directory: give one that holds "
            f"bundles as NAME/VERSION/"
        )
    _use_compilation_cache(settings.compilation_cache)
    asyncio.run(_serve(settings))


def _use_compilation_cache(directory: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(directory.expanduser()))
    # The defaults leave out what compiles in under a second, as most buckets do.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


async def _serve(settings: Settings) -> None:
    repository = Repository(settings)
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", settings.max_message_bytes),
            # Else a second server on the same port starts, and takes half of the requests.
            ("grpc.so_reuseport", 0),
        ]
    )
    checks = _Health()
    open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
        InferenceService(repository), server
    )
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, pool=POOL)

    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    await _set_health(checks, _NOT_SERVING)
    address = f"{settings.host}:{settings.port}"
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartError(
            f"cannot listen on {address} ({error}): is the port taken? choose another with --port"
        ) from error
    await server.start()
    print(f"listening on {settings.host}:{port}", flush=True)

    async def settled() -> None:
        await _set_health(checks, _SERVING)

    watching = asyncio.create_task(repository.watch(settled))
    await stop.wait()
    _log.info("stopping: accepted requests have %g s to finish", settings.drain_s)
    watching.cancel()
    await _set_health(checks, _NOT_SERVING)
    # The door stays open while the accepted requests finish and a moment longer, so that new ones
    # hear UNAVAILABLE and go elsewhere: what arrives just as gRPC stops, it answers CANCELLED.
    try:
        await asyncio.wait_for(repository.close(), settings.drain_s)
    except TimeoutError:
        _log.error("requests were still computing after %g s and are cut off", settings.drain_s)
    await asyncio.sleep(_REFUSING_S)
    await server.stop(grace=1)


async def _set_health(checks: Any, status: int) -> None:
    for name in (health.OVERALL_HEALTH, SERVICE_NAME):
        await checks.set(name, status)
