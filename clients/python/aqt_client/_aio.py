"""The asyncio client: the blocking one's methods, awaited."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from types import TracebackType
from typing import Self, TypeVar

import grpc
import tenacity
from grpc import aio

from aqt_client import _codec
from aqt_client._calls import Deadline, RetryPolicy, retry_arguments
from aqt_client._codec import Inputs, Outputs
from aqt_client._connection import Address, Token, channel_arguments, metadata
from aqt_client._errors import ClientError, Unavailable, from_rpc
from aqt_client._results import InferResult, ModelMetadata, ModelState, ServerMetadata
from aqt_client._shared_memory import Region
from aqt_protos import open_inference_pb2 as pb
from aqt_protos import open_inference_pb2_grpc as pb_grpc

Request = TypeVar("Request")
Response = TypeVar("Response")


class AsyncClient:
    """A connection to a server, for the event loop that it is created in.

    Arguments, results and errors are those of `Client`. A task that is cancelled while it awaits
    a call cancels the request at the server too.
    """

    def __init__(
        self,
        address: Address,
        *,
        timeout_s: float = 30.0,
        credentials: grpc.ChannelCredentials | None = None,
        token: Token | None = None,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen, so sharing it is safe
    ):
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "an AsyncClient belongs to the event loop that it is created in, and none runs: "
                "create it inside a coroutine"
            ) from None
        self._timeout_s = timeout_s
        self._retry = retry
        self._token = token
        self._address = address
        target, options = channel_arguments(address)
        self._channel = (
            aio.insecure_channel(target, options=options)
            if credentials is None
            else aio.secure_channel(target, credentials, options=options)
        )
        self._stub: pb_grpc.GRPCInferenceServiceAsyncStub = pb_grpc.GRPCInferenceServiceStub(
            self._channel
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; calls that still run are cancelled."""
        await self._channel.close()

    async def is_live(self) -> bool:
        """Whether the server runs. One that cannot be reached is an error, not a no."""
        return (await self._call(self._stub.ServerLive, pb.ServerLiveRequest())).live

    async def is_ready(self) -> bool:
        """Whether the server takes inference requests."""
        return (await self._call(self._stub.ServerReady, pb.ServerReadyRequest())).ready

    async def is_model_ready(self, name: str, version: str = "") -> bool:
        """Whether the model takes inference requests. No version: the one that would answer."""
        request = pb.ModelReadyRequest(name=name, version=version)
        return (await self._call(self._stub.ModelReady, request)).ready

    async def model_states(self, name: str) -> tuple[ModelState, ...]:
        """Each version of the model, where it is in its life, and why: loading, refused, ready.

        Empty where the server has none of that name.
        """
        request = pb.RepositoryIndexRequest()
        response = await self._call(self._stub.RepositoryIndex, request)
        return _codec.model_states(response, name)

    async def server_metadata(self) -> ServerMetadata:
        """What the server says of itself."""
        response = await self._call(self._stub.ServerMetadata, pb.ServerMetadataRequest())
        return _codec.server_metadata(response)

    async def model_metadata(self, name: str, version: str = "") -> ModelMetadata:
        """The model's signature. No version: that of the one that would answer.

        Raises:
          NotFound: the server has no such model or version.
        """
        request = pb.ModelMetadataRequest(name=name, version=version)
        return _codec.model_metadata(await self._call(self._stub.ModelMetadata, request))

    async def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = "",
        outputs: Outputs | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> InferResult:
        """The model's answer to `inputs`; all as in `Client.infer`."""
        request = _codec.infer_request(
            model, inputs, version=version, outputs=outputs, request_id=request_id
        )
        response = await self._call(self._stub.ModelInfer, request, timeout_s)
        return _codec.infer_result(response, outputs)

    async def stream(
        self,
        model: str,
        inputs: Iterable[Inputs] | AsyncIterable[Inputs],
        *,
        version: str = "",
        outputs: Outputs | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[InferResult | ClientError]:
        """The answers to all of `inputs`, in their order; all as in `Client.stream`.

        Who leaves the loop early closes the generator, as by `contextlib.aclosing`, and so cancels
        the rest.
        """
        timeout_s = None if timeout_s is None else Deadline(timeout_s).remaining_s()
        failed: list[Exception] = []

        async def requests() -> AsyncIterator[pb.ModelInferRequest]:
            try:
                async for one in _awaited(inputs):
                    yield _codec.infer_request(model, one, version=version, outputs=outputs)
            except Exception as error:  # gRPC would log it, and fail with another
                failed.append(error)

        call = self._stub.ModelStreamInfer(
            requests(), timeout=timeout_s, metadata=metadata(self._token)
        )
        try:
            async for answer in call:
                yield _codec.stream_answer(answer, outputs)
        except grpc.RpcError as error:
            found = from_rpc(error, timeout_s=timeout_s)
            # What gRPC makes of a write that found the stream over, before it read the status.
            if str(found) == "Internal error from Core":
                found = Unavailable(
                    "the server ended the stream while a request was sent",
                    code=grpc.StatusCode.UNAVAILABLE,
                )
            raise found from error
        finally:
            call.cancel()
        if failed:
            raise failed[0]

    @contextlib.asynccontextmanager
    async def shared_memory(self, nbytes: int) -> AsyncGenerator[Region]:
        """Shared memory that the server knows until the block ends; as `Client.shared_memory`."""
        region = Region(nbytes, self._address)
        try:
            await self._call(self._stub.SystemSharedMemoryRegister, _codec.register(region))
        finally:
            region.unlink()
        try:
            yield region
        finally:
            with contextlib.suppress(ClientError):
                name = pb.SystemSharedMemoryUnregisterRequest(name=region.name)
                await self._call(self._stub.SystemSharedMemoryUnregister, name)

    async def _call(
        self,
        method: "aio.UnaryUnaryMultiCallable[Request, Response]",  # generic only in its stub
        request: Request,
        timeout_s: float | None = None,
    ) -> Response:
        deadline = Deadline(self._timeout_s if timeout_s is None else timeout_s)

        async def attempt() -> Response:
            try:
                return await method(
                    request, timeout=deadline.remaining_s(), metadata=metadata(self._token)
                )
            except grpc.RpcError as error:
                raise deadline.error(error) from error

        return await tenacity.AsyncRetrying(**retry_arguments(self._retry, deadline))(attempt)


async def _awaited(inputs: Iterable[Inputs] | AsyncIterable[Inputs]) -> AsyncIterator[Inputs]:
    if isinstance(inputs, AsyncIterable):
        async for one in inputs:
            yield one
    else:
        for one in inputs:
            yield one
