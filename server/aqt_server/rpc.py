"""From an error inside of a call to the status that its caller sees."""

import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, cast

import grpc

from aqt_server.errors import RequestError

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_Response = TypeVar("_Response")

Context = grpc.aio.ServicerContext[Any, Any]


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status and the sentence that answer `error`; one that is a defect of ours is logged."""
    if isinstance(error, RequestError):
        return error.code, str(error)
    _log.error("a request failed", exc_info=error)
    return (
        grpc.StatusCode.INTERNAL,
        "the server failed to compute this request, which is a defect of it: its log says more",
    )


def answered(
    method: Callable[_P, Awaitable[_Response]],
) -> Callable[_P, Coroutine[Any, Any, _Response]]:
    """`method`, an RPC of (self, request, context), that answers its errors as statuses."""

    @functools.wraps(method)
    async def call(*args: _P.args, **kwargs: _P.kwargs) -> _Response:
        try:
            return await method(*args, **kwargs)
        except Exception as error:
            code, sentence = status_of(error)
        context = cast(Context, args[2])
        await context.abort(code, sentence)

    return call
