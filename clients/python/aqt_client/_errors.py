"""What a call can fail with.

    ClientError
    ├── InvalidRequest    INVALID_ARGUMENT, OUT_OF_RANGE    the request is wrong (a ValueError)
    ├── NotFound          NOT_FOUND                         no such model or version
    ├── AccessDenied      UNAUTHENTICATED, PERMISSION_DENIED
    ├── Unavailable       UNAVAILABLE, CANCELLED            retried
    ├── Overloaded        RESOURCE_EXHAUSTED                retried
    ├── MessageTooLarge   RESOURCE_EXHAUSTED                from gRPC itself
    ├── DeadlineExceeded  DEADLINE_EXCEEDED                 no answer in time (a TimeoutError)
    └── ServerError       every other code, and answers that break the protocol

Arguments that cannot be sent at all are plain ValueErrors, raised before anything is sent. A call
that its caller cancels ends as asyncio's cancellation does; one that `Client.close` cuts off, as a
plain ClientError.
"""

from typing import cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2


class ClientError(Exception):
    """A call failed; the text is the server's sentence.

    `code` is the gRPC status of the last attempt, and `retry_s` after how many seconds the server
    would have it repeated, 0 where it does not say.
    """

    def __init__(self, message: str, *, code: grpc.StatusCode, retry_s: float = 0.0):
        super().__init__(message)
        self.code = code
        self.retry_s = retry_s

    def __reduce__(self):  # an exception is otherwise rebuilt without its keyword arguments
        return _rebuild, (type(self), str(self), self.code, self.retry_s)


class InvalidRequest(ClientError, ValueError):
    """The server refused the request: a name, a datatype, a shape or a value is wrong."""


class NotFound(ClientError):
    """The server has no such model or version."""


class AccessDenied(ClientError):
    """The server does not know the caller, or does not let it do this."""


class Unavailable(ClientError):
    """The server cannot be reached, or does not take requests now."""


class Overloaded(ClientError):
    """The server has more requests than it takes."""


class MessageTooLarge(ClientError):
    """The request is larger than the server takes, or the answer larger than the client does."""


class DeadlineExceeded(ClientError, TimeoutError):
    """There was no answer within the call's time."""


class ServerError(ClientError):
    """The server failed, or its answer breaks the protocol."""


_BY_CODE: dict[grpc.StatusCode, type[ClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    # What a server that stops answers to requests that arrive at that moment.
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


def from_rpc(error: grpc.RpcError, *, timeout_s: float | None) -> ClientError:
    """The error of the tree that stands for what gRPC raised in a call with `timeout_s`."""
    call = cast(grpc.Call, error)  # what a failed call raises is a Call too
    code = call.code()
    message = call.details() or f"the server gave no reason for {code.name}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and timeout_s is not None:
        message = f"no answer within {timeout_s:g} s: {message}"
    # gRPC gives it the code of an overloaded server; only the text tells that to repeat is vain.
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "message larger than max" in message:
        return MessageTooLarge(message, code=code)
    return _BY_CODE.get(code, ServerError)(message, code=code, retry_s=_retry_s(call))


def from_answer(message: str, status: object) -> ClientError:
    """The error that stands for an answer of a stream that says `message`, and its gRPC status."""
    code = grpc.StatusCode.__members__.get(str(status), grpc.StatusCode.UNKNOWN)
    return _BY_CODE.get(code, ServerError)(message, code=code)


def _retry_s(call: grpc.Call) -> float:
    """What google.rpc.RetryInfo in the status says; 0 without one."""
    for name, value in call.trailing_metadata() or ():
        if name != "grpc-status-details-bin" or isinstance(value, str):
            continue
        info = error_details_pb2.RetryInfo()
        try:
            details = status_pb2.Status.FromString(value).details
            if any(detail.Unpack(info) for detail in details):
                return max(0.0, info.retry_delay.ToTimedelta().total_seconds())
        except (DecodeError, ValueError, OverflowError):
            return 0.0
    return 0.0


def _rebuild(
    kind: type[ClientError], message: str, code: grpc.StatusCode, retry_s: float
) -> ClientError:
    return kind(message, code=code, retry_s=retry_s)
