"""A server of the protocol that answers with what it was sent, or fails by script."""

import collections
import dataclasses
import threading
from concurrent import futures

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from aqt_protos import open_inference_pb2 as pb
from aqt_protos import open_inference_pb2_grpc as pb_grpc

BOUND_S = 30.0
"""Longer than any wait of a test that passes."""

HANG = object()
"""A step of the script: no answer until the caller has gone."""


@dataclasses.dataclass(frozen=True)
class Call:
    rpc: str
    request: object
    remaining_s: float
    metadata: dict


class FakeServer(pb_grpc.GRPCInferenceServiceServicer):
    """`script` says what happens to the next calls: HANG, or (status code, sentence, *metadata).

    One that is not `serving` says so to those who ask for its health, and answers all the same.
    """

    def __init__(self, *, port=0, max_request_nbytes=-1, credentials=None, serving=True):
        self.calls = []
        self.script = collections.deque()
        self.abandoned = threading.Event()
        self.model = pb.ModelMetadataResponse(name="identity", versions=["1", "3"])
        self.index = pb.RepositoryIndexResponse()
        self.answer = identity
        self.failures = {}
        self.streams_ended = threading.Event()
        self._pool = futures.ThreadPoolExecutor(4)
        # Only a port that a test has reserved is shared: a free one must not be anyone else's.
        options = [
            ("grpc.so_reuseport", int(port != 0)),
            ("grpc.max_receive_message_length", max_request_nbytes),
        ]
        self._server = grpc.server(self._pool, options=options)
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        if not serving:
            servicer = health.HealthServicer()
            servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
            health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        address = f"127.0.0.1:{port}"
        self.port = (
            self._server.add_insecure_port(address)
            if credentials is None
            else self._server.add_secure_port(address, credentials)
        )

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def __enter__(self):
        self._server.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        assert self._server.stop(0).wait(BOUND_S)
        self._pool.shutdown()

    def _step(self, rpc, request, context, response):
        self.calls.append(
            Call(rpc, request, context.time_remaining(), dict(context.invocation_metadata()))
        )
        step = self.script.popleft() if self.script else None
        if step is HANG:
            gone = threading.Event()
            if context.add_callback(gone.set):
                gone.wait(BOUND_S)
            self.abandoned.set()
        elif step is not None:
            code, sentence, *told = step
            context.set_trailing_metadata(told)
            context.abort(code, sentence)
        return response

    def ServerLive(self, request, context):
        return self._step("ServerLive", request, context, pb.ServerLiveResponse(live=True))

    def ServerReady(self, request, context):
        return self._step("ServerReady", request, context, pb.ServerReadyResponse(ready=True))

    def ModelReady(self, request, context):
        ready = request.name == self.model.name
        return self._step("ModelReady", request, context, pb.ModelReadyResponse(ready=ready))

    def ServerMetadata(self, request, context):
        response = pb.ServerMetadataResponse(name="fake", version="1.2", extensions=["a", "b"])
        return self._step("ServerMetadata", request, context, response)

    def ModelMetadata(self, request, context):
        return self._step("ModelMetadata", request, context, self.model)

    def RepositoryIndex(self, request, context):
        return self._step("RepositoryIndex", request, context, self.index)

    def ModelInfer(self, request, context):
        return self._step("ModelInfer", request, context, self.answer(request))

    def ModelStreamInfer(self, requests, context):
        """An answer to each; `failures` has the sentence and the status of the nth."""
        context.add_callback(self.streams_ended.set)
        for index, request in enumerate(requests):
            response = self._step("ModelStreamInfer", request, context, self.answer(request))
            if index not in self.failures:
                yield pb.ModelStreamInferResponse(infer_response=response)
                continue
            sentence, status = self.failures[index]
            failed = pb.ModelStreamInferResponse(error_message=sentence)
            if status:
                failed.infer_response.parameters["aqt_status"].string_param = status
            yield failed


def identity(request):
    """Each input as the output of its name, for those outputs that are wanted."""
    response = pb.ModelInferResponse(
        model_name=request.model_name, model_version=request.model_version or "3", id=request.id
    )
    response.parameters["aqt_exact"].bool_param = True
    response.parameters["rows"].int64_param = 5
    wanted = {o.name for o in request.outputs} or {i.name for i in request.inputs}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.name in wanted:
            response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            response.raw_output_contents.append(raw)
    return response
