"""The server's life: listen, load, serve; on a signal stop accepting, drain, and end."""

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIServer

import grpc
import jax
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from aqt_protos import POOL, SERVICE_NAME, open_inference_pb2_grpc
from aqt_server import metrics
from aqt_server.logs import LogSettings
from aqt_server.repository import Repository
from aqt_server.service import InferenceService
from aqt_server.settings import Settings
from aqt_server.shared_memory import Regions
from aqt_server.tracing import Tracer

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

    Where some had to be cut off, it does not return: the process ends, with exit code 1.

    Raises:
      StartError: the repository or a model of it is not there, or a port cannot be had.
    """
    root = settings.models.model_repository
    if not root.is_dir():
        raise StartError(
            f"--model-repository {root} is no directory: give one that holds bundles as "
            f"NAME/VERSION/"
        )
    for name in settings.models.load_model:
        if name != "*" and not (root / name).is_dir():
            raise StartError(
                f"--load-model {name} is not in {root}: name a directory of it, or leave it out"
            )
    _use_compilation_cache(settings.models.compilation_cache)
    asyncio.run(_serve(settings))


def _use_compilation_cache(directory: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(directory.expanduser()))
    # The defaults leave out what compiles in under a second, as most buckets do.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


async def _serve(settings: Settings) -> None:
    repository = Repository(settings)
    checks = _Health()
    server = _grpc_server(settings, repository, checks)
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    await _set_health(checks, _NOT_SERVING)
    port = _listen(server, f"{settings.listen.host}:{settings.listen.port}")
    metrics_server = _serve_metrics(settings, repository)
    await server.start()
    print(f"listening on {settings.listen.host}:{port}", flush=True)
    if metrics_server:
        print(
            f"metrics on http://{settings.listen.host}:{metrics_server.server_port}/metrics",
            flush=True,
        )

    async def settled() -> None:
        await _set_health(checks, _SERVING)

    watching = asyncio.create_task(repository.watch(settled))
    await stop.wait()
    _log.info("stopping: accepted requests have %g s to finish", settings.batching.drain_s)
    watching.cancel()
    await _set_health(checks, _NOT_SERVING)
    # The door stays open while the accepted requests finish and a moment longer, so that new ones
    # hear UNAVAILABLE and go elsewhere: what arrives just as gRPC stops, it answers CANCELLED.
    answered = await repository.close()
    if not answered:
        _log.error(
            "requests were still computing after %g s and are cut off", settings.batching.drain_s
        )
    await asyncio.sleep(_REFUSING_S)
    await server.stop(grace=1)
    if not answered or repository.loading:
        # A thread that computes or compiles cannot be ended, and Python would wait for it.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0 if answered else 1)


def _grpc_server(settings: Settings, repository: Repository, checks: Any) -> grpc.aio.Server:
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", settings.limits.max_message_bytes),
            ("grpc.max_send_message_length", settings.limits.max_message_bytes),
            # Else a second server on the same port starts, and takes half of the requests.
            ("grpc.so_reuseport", 0),
        ]
    )
    logs = LogSettings()
    for handler in logging.getLogger().handlers:
        handler.addFilter(logs)
    service = InferenceService(repository=repository, regions=Regions(), tracer=Tracer(), logs=logs)
    open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, pool=POOL)
    return server


def _listen(server: grpc.aio.Server, address: str) -> int:
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartError(
            f"cannot listen on {address} ({error}): is the port taken? choose another with --port"
        ) from error


def _serve_metrics(settings: Settings, repository: Repository) -> WSGIServer | None:
    host, port = settings.listen.host, settings.listen.metrics_port
    if port < 0:
        return None
    try:
        return metrics.serve(repository, host=host, port=port)
    except OSError as error:
        raise StartError(
            f"cannot listen on {host}:{port} for metrics ({error}): is the port taken? choose "
            f"another with --metrics-port, or -1 for none"
        ) from error


async def _set_health(checks: Any, status: int) -> None:
    for name in (health.OVERALL_HEALTH, SERVICE_NAME):
        await checks.set(name, status)
