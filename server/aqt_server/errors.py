"""What can be wrong with a request, and the gRPC status that says so.

RequestError
    InvalidRequest     INVALID_ARGUMENT    the request does not fit the model's signature
    NotFound           NOT_FOUND           there is no such model or version
    NotServable        FAILED_PRECONDITION the version was refused; asking again will not help
    NotReady           UNAVAILABLE         the version is still loading, or the server is stopping
    Overloaded         RESOURCE_EXHAUSTED  the queue is full; asking later may help
    NotSupported       UNIMPLEMENTED       the protocol has it and this server does not

Anything else that escapes from a call is a defect of ours, and INTERNAL.
"""

import grpc


class RequestError(Exception):
    """A request that is answered with `code` and this error's sentence."""

    code = grpc.StatusCode.UNKNOWN


class InvalidRequest(RequestError):
    """The request does not fit the model's signature or the limits."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(RequestError):
    """There is no such model, or no such version of it."""

    code = grpc.StatusCode.NOT_FOUND


class NotServable(RequestError):
    """The version is there and was refused at load."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class NotReady(RequestError):
    """The version is still loading, or going away."""

    code = grpc.StatusCode.UNAVAILABLE


class Overloaded(RequestError):
    """The model's queue is full."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class NotSupported(RequestError):
    """Part of the protocol that this server does not have."""

    code = grpc.StatusCode.UNIMPLEMENTED
