"""The server without its sockets, in this process: bytes into the gRPC door, answers out of it."""

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import grpc

from aqt_protos import SERVICE_NAME
from aqt_server.logs import LogSettings
from aqt_server.policies import Policies
from aqt_server.repository import Repository
from aqt_server.rpc import Door
from aqt_server.security.authorization import Guard
from aqt_server.service import Service
from aqt_server.settings import ModelControl, Models, Settings
from aqt_server.source import open_source
from aqt_server.spans import Spans
from aqt_server.tracing import Tracer

REFUSALS = {"INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED"}
"""What a request that is wrong may be told; one of no time at all may be told the last."""


class Details(NamedTuple):
    """What gRPC says of a call when it asks for its handler."""

    method: str
    invocation_metadata: tuple = ()


class _Aborted(Exception):
    pass


class Context:
    """What gRPC gives a handler with a call."""

    def invocation_metadata(self):
        return ()

    def peer(self):
        return "ipv4:127.0.0.1:1"

    def time_remaining(self):
        return None

    async def abort(self, code, sentence, details=()):
        self.code = code
        raise _Aborted


class Inside:
    """Answers bytes as the gRPC door does, and counts the statuses."""

    def __init__(self, door: Door):
        handlers = door.handlers()
        self.infer = handlers.service(Details(f"/{SERVICE_NAME}/ModelInfer")).unary_unary
        self.statuses = collections.Counter[str]()

    async def send(self, sent: bytes) -> str:
        """The status that answers `sent`."""
        context = Context()
        try:
            (await self.infer(sent, context)).SerializeToString()
            status = grpc.StatusCode.OK.name
        except _Aborted:
            status = context.code.name
        self.statuses[status] += 1
        return status


@contextlib.asynccontextmanager
async def inside(repository: Path) -> AsyncIterator[Inside]:
    """Everything that a server of `repository` is, without its sockets."""
    models = Models(model_repository=str(repository), model_control=ModelControl.NONE, proof_s=0)
    settings = Settings(models=models)
    source = open_source(str(repository), repository)
    known = Repository(settings, source, Policies(None))
    guard = Guard(settings.access, settings.tls)
    service = Service(
        repository=known,
        guard=guard,
        tracer=Tracer(),
        logs=LogSettings(),
        limits=settings.limits,
        spans=Spans(None, 1.0),
    )
    await known.watch(lambda: asyncio.sleep(0))
    yield Inside(Door(service, guard))
    await known.close()
