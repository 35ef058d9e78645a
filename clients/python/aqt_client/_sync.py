"""The blocking client."""

import contextlib
from collections.abc import Generator, Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

import grpc
import tenacity

from aqt_client import _codec
from aqt_client._calls import Deadline, RetryPolicy, retry_arguments
from aqt_client._codec import Inputs, Outputs
from aqt_client._connection import Address, Token, channel_arguments, metadata
from aqt_client._errors import ClientError, from_rpc
from aqt_client._results import InferResult, ModelMetadata, ModelState, ServerMetadata
from aqt_client._shared_memory import Region
from aqt_protos import open_inference_pb2 as pb
from aqt_protos import open_inference_pb2_grpc as pb_grpc

Request = TypeVar("Request")
Response = TypeVar("Response")


class Client:
    """A connection to a server; may be used by many threads at once.

    `address` is "host:port", or several of them, which take calls in turn: a server that is down,
    loading or stopping is left out, and calls that it had go to another. In a list of one,
    "dns:///host:port" stands for all that the name resolves to. Of several the IPs are looked up
    once, and their certificates must have the name of the first.

    `timeout_s` is the time that a call has for all of its attempts together. Without `credentials`
    the connection is not encrypted; `grpc.ssl_channel_credentials` makes them. `token` says who
    calls, or a function gives it for each attempt; do not send one unencrypted beyond your own
    machine. Nothing is connected before the first call.

    Every method raises the errors of `ClientError`'s tree, of which Unavailable, Overloaded and
    DeadlineExceeded can happen to any call.
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
        self._timeout_s = timeout_s
        self._retry = retry
        self._closed = False
        self._token = token
        self._address = address
        target, options = channel_arguments(address)
        self._channel = (
            grpc.insecure_channel(target, options=options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options=options)
        )
        self._stub = pb_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; calls that still run end with an error."""
        self._closed = True
        self._channel.close()

    def is_live(self) -> bool:
        """Whether the server runs. One that cannot be reached is an error, not a no."""
        return self._call(self._stub.ServerLive, pb.ServerLiveRequest()).live

    def is_ready(self) -> bool:
        """Whether the server takes inference requests."""
        return self._call(self._stub.ServerReady, pb.ServerReadyRequest()).ready

    def is_model_ready(self, name: str, version: str = "") -> bool:
        """Whether the model takes inference requests. No version: the one that would answer.

        `model_states` says whether one that does not is still loading, or was refused and why.
        """
        request = pb.ModelReadyRequest(name=name, version=version)
        return self._call(self._stub.ModelReady, request).ready

    def model_states(self, name: str) -> tuple[ModelState, ...]:
        """Each version of the model, where it is in its life, and why: loading, refused, ready.

        Empty where the server has none of that name.
        """
        request = pb.RepositoryIndexRequest()
        response = self._call(self._stub.RepositoryIndex, request)
        return _codec.model_states(response, name)

    def server_metadata(self) -> ServerMetadata:
        """What the server says of itself."""
        response = self._call(self._stub.ServerMetadata, pb.ServerMetadataRequest())
        return _codec.server_metadata(response)

    def model_metadata(self, name: str, version: str = "") -> ModelMetadata:
        """The model's signature. No version: that of the one that would answer.

        Raises:
          NotFound: the server has no such model or version.
        """
        request = pb.ModelMetadataRequest(name=name, version=version)
        return _codec.model_metadata(self._call(self._stub.ModelMetadata, request))

    def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = "",
        outputs: Outputs | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> InferResult:
        """The model's answer to `inputs`, which are arrays by name, the batch dimension first.

        Arrays are NumPy's, JAX's, or what NumPy makes one of; those of str, bytes or object go as
        BYTES. `outputs` names those that are wanted, None wants all; a mapping says too to which
        places in shared memory they go, None to none. `timeout_s` replaces the client's for this
        call. Where the server is unavailable or overloaded the request is sent again, within the
        same time.

        Raises:
          ValueError: an input cannot be sent; nothing was.
          InvalidRequest: the server refused the inputs.
          NotFound: the server has no such model or version.
        """
        request = _codec.infer_request(
            model, inputs, version=version, outputs=outputs, request_id=request_id
        )
        return _codec.infer_result(self._call(self._stub.ModelInfer, request, timeout_s), outputs)

    def stream(
        self,
        model: str,
        inputs: Iterable[Inputs],
        *,
        version: str = "",
        outputs: Outputs | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[InferResult | ClientError]:
        """The answers to all of `inputs`, in their order, over one stream.

        Requests are sent while answers are read, in a thread, no faster than the server takes them;
        it computes many at the same time. One that fails has its error in the place of its result,
        and ends no other. Who leaves the loop cancels the rest. Nothing is sent again, and without
        `timeout_s` there is no end to the stream's time.

        Raises:
          ClientError: the stream itself failed.
          ValueError: an input cannot be sent; it and whatever else `inputs` raises comes after the
            answers to those before.
        """
        timeout_s = None if timeout_s is None else Deadline(timeout_s).remaining_s()
        failed: list[Exception] = []

        def requests() -> Iterator[pb.ModelInferRequest]:
            try:
                for one in inputs:
                    yield _codec.infer_request(model, one, version=version, outputs=outputs)
            except Exception as error:  # gRPC would log it, and fail with another
                failed.append(error)

        call = self._stub.ModelStreamInfer(
            requests(), timeout=timeout_s, metadata=metadata(self._token)
        )
        try:
            for answer in call:
                yield _codec.stream_answer(answer, outputs)
        except grpc.RpcError as error:
            raise self._was_closed() or from_rpc(error, timeout_s=timeout_s) from error
        finally:
            call.cancel()
        if failed:
            raise failed[0]

    @contextlib.contextmanager
    def shared_memory(self, nbytes: int) -> Generator[Region]:
        """Shared memory of `nbytes` bytes that the server knows until the block ends.

            with client.shared_memory(2**20) as memory:
                image = memory.put(images)
                logits = memory.empty((32, 10), np.float32)
                result = client.infer("digits", {"image": image}, outputs={"logits": logits})

        For a server on this machine that runs as this user. One that restarts forgets it, which
        calls are told as NotFound.

        Raises:
          ValueError: the client has several addresses, and one server would know it.
          OSError: the system has not so much shared memory.
          ClientError: the server has none, or cannot open it.
        """
        region = Region(nbytes, self._address)
        try:
            self._call(self._stub.SystemSharedMemoryRegister, _codec.register(region))
        finally:
            region.unlink()
        try:
            yield region
        finally:
            # A server that is gone, or does not answer, has forgotten it or will.
            with contextlib.suppress(ClientError):
                name = pb.SystemSharedMemoryUnregisterRequest(name=region.name)
                self._call(self._stub.SystemSharedMemoryUnregister, name)

    def _was_closed(self) -> ClientError | None:
        if not self._closed:
            return None
        return ClientError(
            "the client was closed while the call ran", code=grpc.StatusCode.CANCELLED
        )

    def _call(
        self,
        method: "grpc.UnaryUnaryMultiCallable[Request, Response]",  # generic only in its stub
        request: Request,
        timeout_s: float | None = None,
    ) -> Response:
        deadline = Deadline(self._timeout_s if timeout_s is None else timeout_s)

        def attempt() -> Response:
            try:
                return method(
                    request, timeout=deadline.remaining_s(), metadata=metadata(self._token)
                )
            except grpc.RpcError as error:
                raise self._was_closed() or deadline.error(error) from error

        return tenacity.Retrying(**retry_arguments(self._retry, deadline))(attempt)
