"""The fast door: unary calls of gRPC, read and written by a compiled thread, in batches.

What came since the last look is taken at once, each call is answered by `Service.answer` in a task
of its own, and what was answered in one turn of the event loop is handed back at once. Of health it
has what probes ask; streams, reflection and TLS are for the other door of gRPC.
"""

import asyncio
import base64
import functools
import zlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2

from aqt_protos import SERVICE_NAME
from aqt_protos import open_inference_pb2 as pb
from aqt_server.call import Call
from aqt_server.errors import DeadlineExceeded, InvalidRequest, NotFound, NotSupported, TooLarge
from aqt_server.rpc import details_of, read, status_of
from aqt_server.security.authorization import Action, Guard
from aqt_server.service import Service
from aqt_server.settings import Settings

if TYPE_CHECKING:
    from aqt_server._door import Door

_HEADER_BYTES = 16 * 1024
_CALLS = 16 * 1024
_MESSAGES_HELD = 16
# What zlib takes for the two packings that gRPC knows: of a header of gzip or of zlib.
_PACKED = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_CLOSE_S = 1.0
_CHECK = f"/{health.SERVICE_NAME}/Check"
_CANCELLED: int = grpc.StatusCode.CANCELLED.value[0]


class NotCompiledError(Exception):
    """The compiled part is not in this installation."""


class FastDoor:
    """Listens on `port` of `host`, within the limits that `settings` have for gRPC.

    `checks` is the health servicer of the other door.

    Belongs to the event loop that it is made in.

    Raises:
      NotCompiledError: there is none in this installation.
      OSError: the port cannot be had.
    """

    def __init__(self, service: Service, guard: Guard, settings: Settings, checks: Any):
        self._service = service
        self._guard = guard
        self._checks = checks
        self._identify = guard.authenticator.identify
        self._most_bytes = settings.limits.max_message_bytes
        self._kinds: dict[str, tuple[str, type[Message]]] = {
            f"/{SERVICE_NAME}/{method.name}": (method.name, getattr(pb, method.input_type.name))
            for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
            if not method.client_streaming
        }
        self._kinds[_CHECK] = "Check", health_pb2.HealthCheckRequest
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._answers: list[tuple[int, int, str, bytes, bytes]] = []
        self._door = _open(settings, list(self._kinds))
        self.port = self._door.port()
        """Where it listens."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._door.fileno(), self._take)
        self._door.start()

    async def close(self) -> None:
        """Takes no more calls, and gives those that are answered now a second."""
        await asyncio.to_thread(self._door.close, _CLOSE_S)
        self._loop.remove_reader(self._door.fileno())
        for task in self._tasks.values():
            task.cancel()

    def _take(self) -> None:
        calls, gone = self._door.take()
        left = set(gone)
        for call in calls:
            number = call[0]
            if number in left:
                # Its task would be cancelled before it begins, and nothing in it would run.
                self._give(number, _CANCELLED)
            else:
                self._tasks[number] = self._loop.create_task(self._answer(*call))
        for number in gone:
            if task := self._tasks.get(number):
                task.cancel()

    async def _answer(
        self,
        number: int,
        path: str,
        block: bytes,
        peer: str,
        packed: int,
        packing: str,
        sent: bytes,
        timeout_s: float,
    ) -> None:
        """Answers one call, and only once, whatever comes of it."""
        status, sentence, trailers, answer = _CANCELLED, "", b"", b""
        try:
            rpc, kind = self._kinds[path]
            headers = _headers(block)
            call = Call(
                principal=self._identify(headers.get("authorization"), None),
                peer=peer,
                remaining_s=None if timeout_s < 0 else timeout_s,
                headers=headers,
            )
            request = read(kind, self._unpacked(sent, packing) if packed else sent)
            if path == _CHECK:
                self._guard.check(call.principal, Action.HEALTH)
                response = await self._checks.Check(request, _Asked())
            elif timeout_s < 0:
                response = await self._service.answer(rpc, request, call)
            else:
                response = await self._in_time(rpc, request, call, timeout_s)
            answer = response.SerializeToString()
            if len(answer) > self._most_bytes:
                raise self._too_large("Sent", len(answer))
            status = 0
        except Exception as error:
            code, sentence = status_of(error)
            status, trailers = code.value[0], _trailers(details_of(error))
        finally:
            del self._tasks[number]
            self._give(number, status, sentence, trailers, answer)

    async def _in_time(self, rpc: str, request: Message, call: Call, timeout_s: float) -> Message:
        time = asyncio.timeout(timeout_s)
        try:
            async with time:
                return await self._service.answer(rpc, request, call)
        except TimeoutError as error:
            if time.expired():
                raise DeadlineExceeded("the call's time was up before it was answered") from error
            raise

    def _give(
        self,
        number: int,
        status: int,
        sentence: str = "",
        trailers: bytes = b"",
        answer: bytes = b"",
    ) -> None:
        if not self._answers:
            self._loop.call_soon(self._hand_back)
        self._answers.append((number, status, sentence, trailers, answer))

    def _hand_back(self) -> None:
        answers, self._answers = self._answers, []
        self._door.answer(answers)

    def _unpacked(self, sent: bytes, packing: str) -> bytes:
        if packing not in _PACKED:
            raise NotSupported(f"messages are packed by {packing!r}: use {' or '.join(_PACKED)}")
        reading = zlib.decompressobj(_PACKED[packing])
        try:
            found = reading.decompress(sent, self._most_bytes)
        except zlib.error as error:
            raise InvalidRequest(f"the message is not packed by {packing}: {error}") from None
        if reading.unconsumed_tail:
            raise self._too_large("Received", len(found) + 1)
        if not reading.eof:
            raise InvalidRequest(f"the message ends before its packing by {packing} does")
        return found

    def _too_large(self, what: str, nbytes: int) -> TooLarge:
        # In gRPC's words, by which clients tell it from a server that is overloaded.
        return TooLarge(
            f"{what} message larger than max ({nbytes} vs. {self._most_bytes}): split the request, "
            f"or raise --max-message-bytes"
        )


class _Asked:
    """What the health servicer refuses a call with."""

    async def abort(self, *_: Any) -> NoReturn:
        raise NotFound("there is no service of that name: ask for the server's health without one")


def _open(settings: Settings, paths: list[str]) -> "Door":
    try:
        from aqt_server import _door
    except ImportError as error:
        raise NotCompiledError(
            f"--fast-port needs the compiled door, which is not in this installation ({error}): "
            f"install libnghttp2, and the package where it was compiled"
        ) from error
    limits, connections = settings.limits, settings.connections
    return _door.Door(
        settings.listen.host,
        str(settings.listen.fast_port),
        paths=paths,
        message_bytes=limits.max_message_bytes,
        buffered_bytes=_MESSAGES_HELD * limits.max_message_bytes,
        connections=connections.max_connections,
        calls=_CALLS,
        streams=connections.max_streams,
        header_bytes=_HEADER_BYTES,
        idle_s=connections.idle_s,
    )


# A client sends the same headers again and again.
@functools.lru_cache(maxsize=1024)
def _headers(block: bytes) -> Mapping[str, str]:
    parts = block.decode(errors="replace").split("\0")
    return MappingProxyType(dict(zip(parts[:-1:2], parts[1::2], strict=True)))


def _trailers(details: Sequence[tuple[str, bytes]]) -> bytes:
    return b"".join(
        name.encode() + b"\0" + base64.b64encode(value).rstrip(b"=") + b"\0"
        for name, value in details
    )
