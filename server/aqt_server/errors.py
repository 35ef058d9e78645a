"""What can be wrong with a request, and the gRPC status that says so.

RequestError
    InvalidRequest     INVALID_ARGUMENT    the request does not fit the model or the protocol
    NotFound           NOT_FOUND           there is no such model, version or region
    AlreadyExists      ALREADY_EXISTS      a region of that name is registered
    NotServable        FAILED_PRECONDITION the version was refused; asking again will not help
    NotPermitted       FAILED_PRECONDITION the server's settings do not allow it
    NotReady           UNAVAILABLE         the version is still loading, or the server is stopping
    Overloaded         RESOURCE_EXHAUSTED  a full queue, or too many calls; asking later helps
    OutOfMemory        RESOURCE_EXHAUSTED  a version, or a batch, does not fit into memory
    DeadlineExceeded   DEADLINE_EXCEEDED   its time was up before it was computed
    Unauthenticated    UNAUTHENTICATED     it is not known who calls
    PermissionDenied   PERMISSION_DENIED   who calls may not do this
    NotSupported       UNIMPLEMENTED       the protocol has it and this server does not

Anything else that escapes from a call is a defect of ours, and INTERNAL.
"""

import enum

import grpc


class FailureReason(enum.StrEnum):
    """How failed requests are counted, in the words of Triton's metrics."""

    REJECTED = "REJECTED"
    """Never computed: the queue was full, its time was up, or the version was going away."""
    CANCELED = "CANCELED"
    """The caller went away."""
    BACKEND = "BACKEND"
    """The computation itself failed."""
    OTHER = "OTHER"
    """The request was wrong."""


class RequestError(Exception):
    """A request that is answered with `code` and this error's sentence, and counted as `reason`."""

    code = grpc.StatusCode.UNKNOWN
    reason = FailureReason.OTHER
    retry_s: float | None = None
    """In how many seconds the same request may be answered, where that can be said."""


class InvalidRequest(RequestError):
    """The request does not fit the model's signature, the protocol or the limits."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(RequestError):
    """There is no such model, no such version of it, or no such shared memory region."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(RequestError):
    """A shared memory region of that name is registered."""

    code = grpc.StatusCode.ALREADY_EXISTS


class NotServable(RequestError):
    """The version is there and was refused at load."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class NotPermitted(RequestError):
    """The server was started with settings that do not allow it."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class NotReady(RequestError):
    """The version is still loading, or going away."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = FailureReason.REJECTED


class Overloaded(RequestError):
    """The model's queue is full, or the client calls too often; `retry_s` is when to come again."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = FailureReason.REJECTED

    def __init__(self, sentence: str, *, retry_s: float):
        super().__init__(sentence)
        self.retry_s = retry_s


class OutOfMemory(RequestError):
    """A version that was to be loaded, or a batch, does not fit into the memory that there is."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = FailureReason.BACKEND


class TooLarge(RequestError):
    """A message has more bytes than the server takes or sends."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class DeadlineExceeded(RequestError):
    """The request's time was up before it was computed, or was certain to be.

    `retry_s` is when others would be out of its way, if it has time enough without them.
    """

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = FailureReason.REJECTED

    def __init__(self, sentence: str, *, retry_s: float | None = None):
        super().__init__(sentence)
        self.retry_s = retry_s


class NotSupported(RequestError):
    """Part of the protocol that this server does not have."""

    code = grpc.StatusCode.UNIMPLEMENTED


class Unauthenticated(RequestError):
    """It is not known who calls, or what they show is not valid."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(RequestError):
    """Who calls is known, and may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED
