"""The gRPC door: calls of the service to `Service.answer`, and its errors to statuses."""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from aqt_protos import SERVICE_NAME
from aqt_protos import open_inference_pb2 as pb
from aqt_server.call import Call
from aqt_server.errors import InvalidRequest, RequestError
from aqt_server.security.authorization import Action, Guard
from aqt_server.service import Service
from aqt_server.streaming import answer_in_order

_log = logging.getLogger(__name__)
_DEFECT = "the server failed to compute this request, which is a defect of it: its log says more"
_GUARDED = {
    "grpc.health.v1.Health": Action.HEALTH,
    "grpc.reflection.v1.ServerReflection": Action.REFLECTION,
    "grpc.reflection.v1alpha.ServerReflection": Action.REFLECTION,
}

_DETAILS = "grpc-status-details-bin"

_Message = TypeVar("_Message", bound=Message)
_Context = grpc.aio.ServicerContext[Any, Any]


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status and the sentence that answer `error`; one that is a defect of ours is logged."""
    if isinstance(error, RequestError):
        return error.code, str(error)
    _log.error("a request failed", exc_info=error)
    return grpc.StatusCode.INTERNAL, _DEFECT


class Door:
    """The RPCs of `inference.GRPCInferenceService`, as handlers for a gRPC server."""

    def __init__(self, service: Service, guard: Guard):
        self._service = service
        self._guard = guard

    def handlers(self) -> grpc.GenericRpcHandler:
        """A handler for each RPC."""
        service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME, {method.name: self._handler(method) for method in service.methods}
        )

    def _handler(self, method: MethodDescriptor) -> "grpc.RpcMethodHandler[Any, Any]":
        # What is no message is answered here: gRPC would log and answer it as a defect of ours.
        if method.client_streaming:
            return grpc.stream_stream_rpc_method_handler(self._stream, response_serializer=_write)
        kind = getattr(pb, method.input_type.name)
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method.name, kind), response_serializer=_write
        )

    def _unary(
        self, rpc: str, kind: type[Message]
    ) -> Callable[[bytes, _Context], Awaitable[Message]]:
        async def unary(sent: bytes, context: _Context) -> Message:
            try:
                request = read(kind, sent)
                return await self._service.answer(rpc, request, self._call(context))
            except Exception as error:
                code, sentence = status_of(error)
                details = details_of(error)
            try:
                await context.abort(code, sentence, details)
            except grpc.aio.InternalError:
                # The caller has gone meanwhile, and gRPC would log that as a defect of ours.
                raise asyncio.CancelledError from None

        return unary

    async def _stream(self, requests: AsyncIterator[bytes], context: _Context) -> None:
        """The answers to a stream of requests, in their order; an error ends only its request."""

        async def answer(sent: bytes) -> pb.ModelStreamInferResponse:
            request = pb.ModelInferRequest()
            try:
                request = read(pb.ModelInferRequest, sent)
                answered = await self._service.answer("ModelInfer", request, self._call(context))
            except Exception as error:
                code, sentence = status_of(error)
                response = pb.ModelInferResponse(id=request.id)
                response.parameters["aqt_status"].string_param = code.name
                return pb.ModelStreamInferResponse(error_message=sentence, infer_response=response)
            response = cast(pb.ModelInferResponse, answered)
            # What clients of decoupled models wait for: here every response is its request's last.
            response.parameters["triton_final_response"].bool_param = True
            return pb.ModelStreamInferResponse(infer_response=response)

        await answer_in_order(requests, answer, context.write)

    def _call(self, context: _Context) -> Call:
        headers = {name: _text(value) for name, value in context.invocation_metadata() or ()}
        name = None
        if self._guard.authenticator.by_certificate:
            shown = context.auth_context()
            names = [
                *shown.get("x509_common_name", ()),
                *shown.get("x509_subject_alternative_name", ()),
            ]
            name = _text(names[0]) if names else None
        return Call(
            principal=self._guard.authenticator.identify(headers.get("authorization"), name),
            peer=context.peer(),
            remaining_s=context.time_remaining(),
            headers=headers,
        )


class Interceptor(grpc.aio.ServerInterceptor):
    """Asks for the tokens of who calls health and reflection, which are not our own services.

    Without tokens there is nothing to ask: a client certificate was shown to the connection.
    """

    def __init__(self, guard: Guard):
        self._guard = guard

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """The handler of the call, or one that refuses it."""
        handler = await continuation(handler_call_details)
        service = (handler_call_details.method or "").removeprefix("/").partition("/")[0]
        action = _GUARDED.get(service)
        if handler is None or action is None:
            return handler
        headers = {n: _text(v) for n, v in handler_call_details.invocation_metadata or ()}
        try:
            principal = self._guard.authenticator.identify(headers.get("authorization"), None)
            self._guard.check(principal, action)
        except RequestError as error:
            return _refusing(handler, error)
        return handler


def _refusing(
    handler: "grpc.RpcMethodHandler[Any, Any]", error: RequestError
) -> "grpc.RpcMethodHandler[Any, Any]":
    async def refuse(_: Any, context: _Context) -> None:
        await context.abort(error.code, str(error))

    made = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return cast(Any, made)(refuse)


def details_of(error: Exception) -> tuple[tuple[str, bytes], ...]:
    """Metadata that says when to come again, as google.rpc has it; for other errors nothing."""
    if not isinstance(error, RequestError) or error.retry_s is None:
        return ()
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(math.ceil(error.retry_s * 1e3))
    status = status_pb2.Status(code=error.code.value[0], message=str(error))
    status.details.add().Pack(info)
    return ((_DETAILS, status.SerializeToString()),)


def read(kind: type[_Message], sent: bytes) -> _Message:
    """The message that was sent.

    Raises:
      InvalidRequest: it is none.
    """
    try:
        return kind.FromString(sent)
    except DecodeError:
        raise InvalidRequest(f"the request is no message {kind.DESCRIPTOR.full_name}") from None


def _write(message: Message) -> bytes:
    return message.SerializeToString()


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")
