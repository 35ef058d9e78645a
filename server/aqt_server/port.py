"""A port of HTTP: how many connections it takes, and how slow they may be.

What answers is imported when the first connection comes, as many a server is never asked.
"""

import asyncio
import logging
import math
import socket
import ssl
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from aqt_server.settings import Connections

if TYPE_CHECKING:
    from aiohttp import web

_log = logging.getLogger(__name__)

HANDSHAKE_S = 10.0
"""That a client has to begin: with TLS, or with what HTTP/2 says first."""
SEND_S = 60.0
"""That a client has to take an answer."""
_TELL_S = 60.0
_BACKLOG = 1024
_READ_BYTES = 256 * 1024
_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: 0\r\n\r\n"
)


class Port:
    """A port on which an application listens, within `connections`; it is made in a thread.

    A connection is closed that sends no whole request in `idle_s`, or does not take its answer; one
    beyond `max_connections` is told 503. Where the application cannot be made, the log says why,
    and the port is closed.
    """

    def __init__(self, application: "Callable[[], web.Application]", connections: Connections):
        self._application = application
        self._connections = connections
        self._told = -math.inf
        self._runner: web.AppRunner | None = None
        self._listening: asyncio.Server | None = None
        self._opening: asyncio.Task[None] | None = None

    async def listen(self, host: str, port: int, encryption: ssl.SSLContext | None) -> int:
        """The port that it listens on, which is `port` unless that is 0, for any.

        Raises:
          OSError: the port cannot be had.
        """
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_server(
            lambda: _Entrance(self._connected),
            host,
            port,
            ssl=encryption,
            ssl_handshake_timeout=HANDSHAKE_S if encryption else None,
            backlog=_BACKLOG,
            start_serving=False,
        )
        for taken in self._listening.sockets:
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # which Linux has
                # The end of an answer waits in the kernel; connections inherit how long.
                taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(SEND_S * 1e3))
            # Connections wait in the kernel; asyncio lets nobody call its socket's own `listen`.
            with taken.dup() as same:
                same.listen(_BACKLOG)
            loop.add_reader(taken.fileno(), self._asked)
        return self._listening.sockets[0].getsockname()[1]

    def _asked(self) -> None:
        assert self._listening
        for taken in self._listening.sockets:
            asyncio.get_running_loop().remove_reader(taken.fileno())
        self._opening = asyncio.create_task(self._open())

    async def _open(self) -> None:
        def made() -> "web.AppRunner":
            from aqt_server.http import runner

            return runner(self._application(), self._connections)

        assert self._listening
        try:
            # In a thread, since requests at other doors go on.
            self._runner = await asyncio.to_thread(made)
            await self._runner.setup()
            await self._listening.start_serving()
        except Exception:
            # Who connects would wait for ever.
            number = self._listening.sockets[0].getsockname()[1]
            self._listening.close()
            _log.exception("port %d is closed: what answers there could not be made", number)

    def _connected(self, transport: asyncio.Transport) -> asyncio.Protocol | None:
        """What talks on the connection `transport`; None if it is one too many."""
        assert self._runner
        server = self._runner.server
        assert server
        if len(server.connections) < self._connections.max_connections:
            protocol = server()
            protocol.connection_made(transport)
            return protocol
        transport.write(_TOO_MANY)
        transport.close()
        if (now := time.monotonic()) > self._told + _TELL_S:
            self._told = now
            _log.warning(
                "%d connections are open, and more are refused: see --max-connections",
                self._connections.max_connections,
            )
        return None

    async def close(self) -> None:
        """Takes no more requests, and gives those that are answered now a second."""
        if self._opening:
            await asyncio.wait({self._opening})
        if self._listening:
            self._listening.close()
        if self._runner:
            await self._runner.cleanup()


class _Entrance(asyncio.BufferedProtocol):
    """Hands a connection over at the moment when it is made, and then what comes from it.

    Many that come at once are accepted before the first of them is made, and counted then.

    What comes is read into one buffer for all, as asyncio would take 256 KiB of the heap for each
    read and give most of them back: over many requests the heap became larger by the pieces.
    """

    _buffer = bytearray(_READ_BYTES)
    """Of all connections, as what is in it is handed on before another is read."""

    def __init__(self, connected: Callable[[asyncio.Transport], asyncio.Protocol | None]):
        self._connected = connected
        self._protocol: asyncio.Protocol | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes or refuses it."""
        assert isinstance(transport, asyncio.Transport)
        self._protocol = self._connected(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Hands on that it has ended."""
        if self._protocol:
            self._protocol.connection_lost(exc)

    def eof_received(self) -> bool | None:
        """Hands on that no more comes."""
        return self._protocol.eof_received() if self._protocol else None

    def get_buffer(self, sizehint: int) -> bytearray:
        """Where it is read to."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Hands on so many bytes that were read."""
        if self._protocol:
            self._protocol.data_received(bytes(memoryview(self._buffer)[:nbytes]))

    def pause_writing(self) -> None:
        """Hands on that the client takes no more for now."""
        if self._protocol:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """Hands on that it does again."""
        if self._protocol:
            self._protocol.resume_writing()
