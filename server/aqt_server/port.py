"""A port of HTTP: how many connections it takes, and how slow they may be."""

import asyncio
import logging
import math
import socket
import ssl
import time
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler

from aqt_server.settings import Connections

_log = logging.getLogger(__name__)
# What clients send wrong would fill the log with tracebacks; `http` logs what is wrong here.
_QUIET = logging.getLogger(f"{__name__}.protocol")
_QUIET.setLevel(logging.CRITICAL)

HANDSHAKE_S = 10.0
"""That a client has to begin: with TLS, or with what HTTP/2 says first."""
_SEND_S = 60.0
_TELL_S = 60.0
_BACKLOG = 1024
_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: 0\r\n\r\n"
)


class Port:
    """A port on which an application listens, within `connections`.

    A connection is closed that sends no whole request in `idle_s`, or does not take its answer; one
    beyond `max_connections` is told 503.
    """

    def __init__(self, application: web.Application, connections: Connections):
        application.middlewares.insert(0, _taken_in_time)
        self._most = connections.max_connections
        self._told = -math.inf
        # A request whose client has gone away is cancelled, and leaves the queue.
        self._runner = web.AppRunner(
            application,
            handle_signals=False,
            handler_cancellation=True,
            access_log=None,
            logger=_QUIET,
            shutdown_timeout=1,
            keepalive_timeout=connections.idle_s,
        )
        self._listening: asyncio.Server | None = None

    async def listen(self, host: str, port: int, encryption: ssl.SSLContext | None) -> int:
        """The port that it listens on, which is `port` unless that is 0, for any.

        Raises:
          OSError: the port cannot be had.
        """
        await self._runner.setup()
        self._listening = await asyncio.get_running_loop().create_server(
            lambda: _Entrance(self._connected),
            host,
            port,
            ssl=encryption,
            ssl_handshake_timeout=HANDSHAKE_S if encryption else None,
            backlog=_BACKLOG,
        )
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # which Linux has
            for taken in self._listening.sockets:
                # The end of an answer waits in the kernel; connections inherit how long.
                taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(_SEND_S * 1e3))
        return self._listening.sockets[0].getsockname()[1]

    def _connected(self, transport: asyncio.Transport) -> None:
        server = self._runner.server
        assert server
        if len(server.connections) < self._most:
            protocol = server()
            transport.set_protocol(protocol)
            protocol.connection_made(transport)
            return
        transport.write(_TOO_MANY)
        transport.close()
        if (now := time.monotonic()) > self._told + _TELL_S:
            self._told = now
            _log.warning(
                "%d connections are open, and more are refused: see --max-connections", self._most
            )

    async def close(self) -> None:
        """Takes no more requests, and gives those that are answered now a second."""
        if self._listening:
            self._listening.close()
        await self._runner.cleanup()


class _Entrance(asyncio.Protocol):
    """Hands a connection over at the moment when it is made.

    Many that come at once are accepted before the first of them is made, and counted then.
    """

    def __init__(self, connected: Callable[[asyncio.Transport], None]):
        self._connected = connected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes or refuses it."""
        assert isinstance(transport, asyncio.Transport)
        self._connected(transport)


@web.middleware
async def _taken_in_time(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Sends what `handler` answers; who does not take it is cut off."""
    response = await handler(request)
    try:
        async with asyncio.timeout(_SEND_S):
            await response.prepare(request)
            await response.write_eof()
    except TimeoutError:
        if request.transport:
            request.transport.abort()
    return response
