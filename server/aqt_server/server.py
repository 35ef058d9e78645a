"""The server's life: listen, load, serve; on a signal stop accepting, drain, and end."""

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from aqt_engine.layout import Layout
from aqt_protos import POOL, SERVICE_NAME
from aqt_server import compiled
from aqt_server.fast_rpc import FastDoor, NotCompiledError
from aqt_server.logs import LogSettings
from aqt_server.policies import Policies, PolicyFileError
from aqt_server.port import HANDSHAKE_S, Port
from aqt_server.repository import Repository
from aqt_server.rpc import Door, Interceptor
from aqt_server.security.authentication import AccessFileError
from aqt_server.security.authorization import Guard
from aqt_server.security.tls import CertificateError, Certificates
from aqt_server.service import Service
from aqt_server.settings import Settings
from aqt_server.source import Source, SourceError, open_source
from aqt_server.spans import NoSdkError, Spans
from aqt_server.tracing import Tracer

if TYPE_CHECKING:
    from aiohttp import web

    from aqt_server.hosts import Leader

_log = logging.getLogger(__name__)
# The stubs do not know that the module has `aio`.
_Health: Any = health.aio.HealthServicer  # pyright: ignore[reportAttributeAccessIssue]
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_REFUSING_S = 0.5
_ASK_AFTER_S = 60.0
_ANSWER_S = 20.0
_OTHER_FILES = 256


class StartError(Exception):
    """The server cannot start with these settings."""


def run(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, and returns when the accepted requests are answered.

    A host that follows another serves that one, until it ends.

    Where some had to be cut off, it does not return: the process ends, with exit code 1.

    Raises:
      StartError: the repository or a model of it is not there, or a port cannot be had.
    """
    root = settings.models.model_repository
    try:
        source = open_source(root, settings.serving.bundle_cache)
        asked = set(settings.models.load_model) - {"*"}
        there = {name for name, _ in source.versions()} if asked else set[str]()
    except (SourceError, OSError) as error:
        raise StartError(f"--model-repository {error}") from error
    if missing := sorted(asked - there):
        raise StartError(
            f"--load-model {missing[0]} is not in {root}: name a model that has versions there, or "
            f"leave it out"
        )
    compiled.keep_in(settings.models.compilation_cache)
    _allow_connections(settings)
    devices = settings.devices
    layout = Layout(copies=devices.copies, shards=devices.shards)
    try:
        leader = _hosts(settings, source, layout) if devices.hosts > 1 else None
        if devices.host_index:
            return
        layout.mesh()
    except ValueError as error:
        raise StartError(f"--copies and --shards: {error}") from error
    asyncio.run(_serve(settings, source, layout, leader))


def _hosts(settings: Settings, source: Source, layout: Layout) -> "Leader | None":
    """The leader of several hosts; None when this is one that has followed another to its end."""
    # It takes connections of `multiprocessing`, which one host has no use for.
    from aqt_server.hosts import HostsError, Leader, follow

    try:
        if settings.devices.host_index:
            follow(settings.devices, source, layout)
            return None
        return Leader(settings.devices)
    except HostsError as error:
        raise StartError(f"--hosts: {error}") from error


def _allow_connections(settings: Settings) -> None:
    """As many open files as the system lets this process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # macOS has no limit, and does not take that for one
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    listen = settings.listen
    more = (listen.fast_port, listen.http_port, listen.metrics_port)
    ports = 1 + sum(port >= 0 for port in more)
    needed = ports * settings.connections.max_connections + _OTHER_FILES
    if most != resource.RLIM_INFINITY and most < needed:
        _log.warning(
            "this process may open %d files, and --max-connections on %d ports and what else it "
            "opens take %d: raise that limit, or lower the setting",
            most,
            ports,
            needed,
        )


async def _serve(
    settings: Settings, source: Source, layout: Layout, leader: "Leader | None"
) -> None:
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    try:
        policies = Policies(settings.serving.model_policies)
    except PolicyFileError as error:
        raise StartError(str(error)) from error
    repository = Repository(settings, source, policies, layout=layout, leader=leader)
    checks = _Health()
    await _set_health(checks, _NOT_SERVING)
    doors = await _open(settings, repository, checks)

    async def settled() -> None:
        # What is there by now stays: to look through it again and again takes a tenth of the time
        # that a request does.
        gc.collect()
        gc.freeze()
        await _set_health(checks, _SERVING)

    watching = asyncio.create_task(repository.watch(settled))
    await stop.wait()
    _log.info("stopping: accepted requests have %g s to finish", settings.batching.drain_s)
    watching.cancel()
    await _set_health(checks, _NOT_SERVING)
    # The doors stay open while the accepted requests finish and a moment longer, so that new ones
    # hear UNAVAILABLE and go elsewhere: what arrives just as gRPC stops, it answers CANCELLED.
    answered = await repository.close()
    if not answered:
        _log.error(
            "requests were still computing after %g s and are cut off", settings.batching.drain_s
        )
    await asyncio.sleep(_REFUSING_S)
    await doors.close()
    if leader:
        leader.end()
    if not answered or repository.busy:
        # A thread that computes, compiles or reads cannot be ended, and Python would wait for it.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0 if answered else 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Doors:
    """What the server listens with."""

    rpc: grpc.aio.Server
    fast: FastDoor | None
    http: Sequence[Port]
    spans: Spans

    async def close(self) -> None:
        """Answers what is under way within a second, and takes no more."""
        fast = [self.fast.close()] if self.fast else []
        await asyncio.gather(self.rpc.stop(grace=1), *fast, *(port.close() for port in self.http))
        await asyncio.to_thread(self.spans.close)


async def _open(settings: Settings, repository: Repository, checks: Any) -> _Doors:
    """Opens each door and prints where it is."""
    listen, limits = settings.listen, settings.limits
    try:
        guard = Guard(settings.access, settings.tls)
        certificates = Certificates(settings.tls) if settings.tls.tls_certificate else None
        spans = Spans(settings.observe.otlp_endpoint, settings.observe.otlp_ratio)
    except (AccessFileError, CertificateError, NoSdkError) as error:
        raise StartError(str(error)) from error
    logs = LogSettings()
    for handler in logging.getLogger().handlers:
        handler.addFilter(logs)
    service = Service(
        repository=repository,
        guard=guard,
        tracer=Tracer(),
        logs=logs,
        limits=limits,
        spans=spans,
    )
    server = _grpc_server(settings, checks, Door(service, guard), guard)
    port = _listen(server, f"{listen.host}:{listen.port}", certificates)
    told = [f"listening on {listen.host}:{port}"]
    fast = _open_fast(settings, service, guard, checks) if listen.fast_port >= 0 else None
    if fast:
        told.append(f"fast on {listen.host}:{fast.port}")
    ports: list[Port] = []
    if listen.http_port >= 0:
        application = _http(settings, service, repository, guard)
        ports.append(Port(lambda: application, settings.connections))
        taken = (listen.host, listen.http_port)
        url = await _listen_http(ports[-1], *taken, "http", certificates)
        told.append(f"http on {url}")
        if settings.observe.status_page:
            told.append(f"status page on {url}/status")
    if listen.metrics_port >= 0:
        cache = compiled.CacheEvents()
        ports.append(
            Port(lambda: _metrics(repository, service, guard, cache), settings.connections)
        )
        taken = (listen.host, listen.metrics_port)
        url = await _listen_http(ports[-1], *taken, "metrics", certificates)
        told.append(f"metrics on {url}/metrics")
    # Last, as a server that was started and is not stopped complains.
    await server.start()
    print("\n".join(told), flush=True)
    return _Doors(rpc=server, fast=fast, http=ports, spans=spans)


def _http(
    settings: Settings, service: Service, repository: Repository, guard: Guard
) -> "web.Application":
    # Imported with the door, as its first request is not to wait for that.
    from aqt_server import rest
    from aqt_server.page.routes import add_page
    from aqt_server.profiling import Profiler

    observe = settings.observe
    profiler = Profiler(observe.profile_directory, observe.profile_max_s)
    application = rest.application(service, guard, settings.limits, profiler)
    if observe.status_page:
        add_page(application, repository, guard)
    return application


def _metrics(
    repository: Repository, service: Service, guard: Guard, cache: compiled.CacheEvents
) -> "web.Application":
    from aqt_server.http import metrics_application
    from aqt_server.metrics import Metrics

    return metrics_application(Metrics(repository, service.calls, cache), guard)


def _grpc_server(settings: Settings, checks: Any, door: Door, guard: Guard) -> grpc.aio.Server:
    limits, connections = settings.limits, settings.connections
    server = grpc.aio.server(
        # Only where it has something to ask, as it is in the way of every call.
        interceptors=[Interceptor(guard)] if guard.authenticator.by_token else None,
        options=[
            ("grpc.max_receive_message_length", limits.max_message_bytes),
            ("grpc.max_send_message_length", limits.max_message_bytes),
            ("grpc.max_allowed_incoming_connections", connections.max_connections),
            ("grpc.max_concurrent_streams", connections.max_streams),
            ("grpc.max_connection_idle_ms", _ms(connections.idle_s)),
            ("grpc.server_handshake_timeout_ms", _ms(HANDSHAKE_S)),
            # Asks a silent client whether it is there: one whose machine has gone says nothing.
            ("grpc.keepalive_time_ms", _ms(_ASK_AFTER_S)),
            ("grpc.keepalive_timeout_ms", _ms(_ANSWER_S)),
            # Else a second server on the same port starts, and takes half of the requests.
            ("grpc.so_reuseport", 0),
        ],
    )
    server.add_generic_rpc_handlers((door.handlers(),))
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, pool=POOL)
    return server


def _listen(server: grpc.aio.Server, address: str, certificates: Certificates | None) -> int:
    try:
        if certificates:
            return server.add_secure_port(address, certificates.for_grpc())
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartError(
            f"cannot listen on {address} ({error}): is the port taken, or --host not of this "
            f"machine? choose another with --port"
        ) from error


def _open_fast(settings: Settings, service: Service, guard: Guard, checks: Any) -> FastDoor:
    try:
        return FastDoor(service, guard, settings, checks)
    except NotCompiledError as error:
        raise StartError(str(error)) from error
    except (OSError, RuntimeError) as error:
        raise StartError(
            f"cannot listen on {settings.listen.host}:{settings.listen.fast_port} ({error}): is "
            f"the port taken? choose another with --fast-port, or -1 for none"
        ) from error


async def _listen_http(
    door: Port, host: str, port: int, purpose: str, certificates: Certificates | None
) -> str:
    """The URL at which `door` listens, for `purpose`: metrics or http."""
    try:
        encryption = certificates.for_http() if certificates else None
        taken = await door.listen(host, port, encryption)
    except OSError as error:
        raise StartError(
            f"cannot listen on {host}:{port} for {purpose} ({error}): is the port taken? choose "
            f"another with --{purpose}-port, or -1 for none"
        ) from error
    return f"{'https' if certificates else 'http'}://{host}:{taken}"


def _ms(seconds: float) -> int:
    return round(min(seconds * 1e3, 2**31 - 1))


async def _set_health(checks: Any, status: int) -> None:
    for name in (health.OVERALL_HEALTH, SERVICE_NAME):
        await checks.set(name, status)
