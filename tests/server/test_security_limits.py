"""What a client may ask of the server, in bytes and rows, however it wraps it."""

import grpc
import pytest
import tritonclient.grpc as stock
import tritonclient.utils.shared_memory as shm

from aqt_protos import open_inference_pb2 as pb
from bundles import FEATURES, write_linear
from server.messages import MODEL, raises_status, request_of, stock_input, x_of
from server_process import WAIT_S, serving

pytestmark = pytest.mark.slow

FLAGS = ("--max-message-bytes", "100000", "--max-tensor-bytes", "2400", "--queue-rows", "200")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("limits")
    write_linear(root / "repository" / MODEL / "1")
    with serving(root / "repository", *FLAGS, log=root / "log") as running:
        yield running


def test_a_message_that_is_too_large_is_refused_and_the_server_lives(stub):
    with raises_status("RESOURCE_EXHAUSTED", "larger than max"):
        stub.ModelInfer(request_of(x_of(2), id="x" * 200_000), timeout=WAIT_S)
    assert stub.ModelInfer(request_of(x_of(2)), timeout=WAIT_S).outputs


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_what_is_small_only_while_packed_is_refused(stub, compression):
    """A few hundred kB on the wire, and 256 MB in memory."""
    request = request_of(x_of(2), id="x" * 2**28)
    with raises_status("RESOURCE_EXHAUSTED", "."):
        stub.ModelInfer(request, compression=compression, timeout=WAIT_S)
    packed = stub.ModelInfer(request_of(x_of(2)), compression=compression, timeout=WAIT_S)
    assert packed.outputs


def test_shapes_that_claim_more_than_there_is_take_no_memory(stub):
    request = request_of(x_of(2))
    request.inputs[0].shape[:] = [2**60, FEATURES]
    with raises_status("INVALID_ARGUMENT", "raw bytes, got 48"):
        stub.ModelInfer(request, timeout=WAIT_S)
    request = pb.ModelInferRequest(model_name=MODEL)
    for _ in range(3000):
        request.inputs.add(name="x", datatype="FP32")
    with raises_status("INVALID_ARGUMENT", "given twice"):
        stub.ModelInfer(request, timeout=WAIT_S)


def test_a_tensor_in_shared_memory_is_bounded_too(server, tmp_path):
    x = x_of(200)
    key = f"/aqt-{tmp_path.name}"
    region = shm.create_shared_memory_region("large", key, x.nbytes)
    try:
        shm.set_shared_memory_region(region, [x])
        with stock.InferenceServerClient(server.address) as client:
            client.register_system_shared_memory("large", key, x.nbytes)
            tensor = stock.InferInput("x", (100, FEATURES), "FP32")
            tensor.set_shared_memory("large", 2400)
            assert client.infer(MODEL, [tensor])
            tensor = stock.InferInput("x", x.shape, "FP32")
            tensor.set_shared_memory("large", x.nbytes)
            with raises_status("INVALID_ARGUMENT", "at most 2400 for a tensor"):
                client.infer(MODEL, [tensor])
            output = stock.InferRequestedOutput("y")
            output.set_shared_memory("large", x.nbytes)
            with raises_status("INVALID_ARGUMENT", "at most 2400 for a tensor"):
                client.infer(MODEL, [stock_input(x_of(2))], outputs=[output])
    finally:
        shm.destroy_shared_memory_region(region)


def test_more_rows_than_the_queue_ever_holds_are_refused(stub):
    with raises_status("INVALID_ARGUMENT", "201 rows, and the server takes at most 200"):
        stub.ModelInfer(request_of(x_of(201)), timeout=WAIT_S)
