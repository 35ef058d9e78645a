"""What all that is served over HTTP has in common: who calls, bodies, errors, and the metrics.

It runs in the event loop of everything else. A request that a browser made for a page of elsewhere
is refused: a page must not unload a model because its reader can reach the server.
"""

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from aiohttp import web

from aqt_server.call import Call
from aqt_server.errors import InvalidRequest, RequestError
from aqt_server.metrics import Metrics
from aqt_server.port import SEND_S
from aqt_server.rpc import status_of
from aqt_server.security.authentication import Principal
from aqt_server.security.authorization import Action, Guard
from aqt_server.settings import Connections

# What clients send wrong would fill the log with tracebacks; what is wrong here is logged here.
_QUIET = logging.getLogger(f"{__name__}.protocol")
_QUIET.setLevel(logging.CRITICAL)
_BODY_S = 60.0
_STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}

OWN_PAGE: web.AppKey[Callable[[web.Request], bool]] = web.AppKey("own_page")
"""Of an application that serves a page: whether a request that a browser made is from that page."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def call_of(request: web.Request, guard: Guard) -> Call:
    """What is known of the call beside its body.

    Raises:
      Unauthenticated: what it shows of who calls is not valid.
    """
    return Call(
        principal=_principal(request, guard),
        peer=request.remote or "",
        remaining_s=None,
        headers={name.lower(): value for name, value in request.headers.items()},
    )


def _principal(request: web.Request, guard: Guard) -> Principal:
    name = None
    if guard.authenticator.by_certificate and request.transport:
        name = _name(request.transport.get_extra_info("peercert") or {})
    return guard.authenticator.identify(request.headers.get("authorization"), name)


def _name(certificate: dict[str, Any]) -> str | None:
    """The common name of a client's certificate, else its first alternative name."""
    common = [value for part in certificate.get("subject", ()) for key, value in part
              if key == "commonName"]  # fmt: skip
    names = [*common, *(value for _, value in certificate.get("subjectAltName", ()))]
    return names[0] if names else None


async def body_of(request: web.Request) -> bytes:
    """The body, unpacked; within the size that the application allows.

    Raises:
      InvalidRequest: it is not packed as its header says, or not whole.
    """
    try:
        async with asyncio.timeout(_BODY_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout from None
    except web.RequestPayloadError as error:
        raise InvalidRequest(
            "the body is not whole, or not packed as its header Content-Encoding says"
        ) from error


def _no_page(request: web.Request) -> bool:
    return False


def answer_in_json(document: Any, *, status: int = 200) -> web.Response:
    """A response of `document` as JSON."""
    return web.json_response(document, status=status, dumps=json.dumps)


@web.middleware
async def errors_in_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What `handler` answers; its errors as `{"error": sentence}` with their status."""
    if "Origin" in request.headers and not request.app.get(OWN_PAGE, _no_page)(request):
        return answer_in_json({"error": "requests of web pages are not answered here"}, status=403)
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        sentence = {
            404: f"there is nothing at {request.method} {request.path}",
            405: f"{request.path} cannot be asked with {request.method}",
            413: "the request is larger than --max-message-bytes allows: send less at once",
        }.get(error.status, error.reason)
        return answer_in_json({"error": sentence}, status=error.status)
    except Exception as error:
        code, sentence = status_of(error)
        response = answer_in_json({"error": sentence}, status=_STATUSES.get(code, 500))
        if isinstance(error, RequestError) and error.retry_s is not None:
            response.headers["Retry-After"] = str(math.ceil(error.retry_s))
        if response.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response


def runner(application: web.Application, connections: Connections) -> web.AppRunner:
    """Answers with `application`; a client that does not take its answer is cut off."""
    application.middlewares.insert(0, _taken_in_time)
    # A request whose client has gone away is cancelled, and leaves the queue.
    return web.AppRunner(
        application,
        handle_signals=False,
        handler_cancellation=True,
        access_log=None,
        logger=_QUIET,
        shutdown_timeout=1,
        keepalive_timeout=connections.idle_s,
    )


@web.middleware
async def _taken_in_time(request: web.Request, handler: Handler) -> web.StreamResponse:
    response = await handler(request)
    try:
        async with asyncio.timeout(SEND_S):
            await response.prepare(request)
            await response.write_eof()
    except TimeoutError:
        if request.transport:
            request.transport.abort()
    return response


def metrics_application(metrics: Metrics, guard: Guard) -> web.Application:
    """Serves `metrics` at /metrics."""

    async def answer(request: web.Request) -> web.StreamResponse:
        guard.check(call_of(request, guard).principal, Action.METRICS)
        body, content_type = await metrics.exposition(request.headers.get("accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    application = web.Application(middlewares=[errors_in_json])
    application.router.add_get("/metrics", answer)
    return application
