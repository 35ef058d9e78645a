"""The protocol against a real server process, spoken by a stock client and by raw messages."""

import grpc
import numpy as np
import pytest
import tritonclient.grpc as stock
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from aqt_protos import open_inference_pb2 as pb
from bundles import FEATURES, reference, write_linear
from engine.contractions import assert_same_bits
from server.messages import MODEL, request_of, x_of
from server_process import serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    for version in (1, 2, 10):
        write_linear(root / MODEL / str(version), seed=version)
    return root


@pytest.fixture(scope="module")
def server(repository, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serving(repository, "--queue-rows", "50", log=log) as running:
        yield running


def test_server_and_model_state(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")
    assert not client.is_model_ready(MODEL, "3")
    assert not client.is_model_ready("unknown")


def test_metadata(client):
    server = client.get_server_metadata()
    assert server.name == "aqt_server"
    assert "system_shared_memory" in server.extensions
    metadata = client.get_model_metadata(MODEL)
    assert list(metadata.versions) == ["1", "2", "10"]
    (x,), (y,) = metadata.inputs, metadata.outputs
    assert (x.name, x.datatype, list(x.shape)) == ("x", "FP32", [-1, FEATURES])
    assert (y.name, y.datatype, list(y.shape)) == ("y", "FP32", [-1, 4])


@pytest.mark.parametrize("version", ["", "1", "2", "10"])
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 33, 50])
def test_stock_client_gets_the_bits_of_training(client, repository, version, rows):
    x = x_of(rows)
    tensor = stock.InferInput("x", x.shape, "FP32")
    tensor.set_data_from_numpy(x)
    result = client.infer(MODEL, [tensor], model_version=version, request_id="an id")
    response = result.get_response()
    assert (response.model_name, response.model_version) == (MODEL, version or "10")
    assert response.id == "an id"
    assert response.parameters["aqt_exact"].bool_param
    expected = (
        reference(repository / MODEL / (version or "10"), x) if rows else np.zeros((0, 4), "f4")
    )
    assert_same_bits(result.as_numpy("y"), expected)


def test_typed_contents_come_back_typed_with_the_same_bits(stub):
    x = x_of(5)
    raw = stub.ModelInfer(request_of(x))
    request = request_of(x)
    request.ClearField("raw_input_contents")
    request.inputs[0].contents.fp32_contents.extend(x.ravel().tolist())
    typed = stub.ModelInfer(request)
    assert not typed.raw_output_contents
    found = np.array(typed.outputs[0].contents.fp32_contents, np.float32)
    assert_same_bits(found, np.frombuffer(raw.raw_output_contents[0], np.float32))


def test_requested_outputs_are_those_returned(stub):
    request = request_of(x_of(2))
    request.outputs.add(name="y")
    assert [o.name for o in stub.ModelInfer(request).outputs] == ["y"]


def _change_tensor(**changes):
    def change(request):
        for name, value in changes.items():
            if name == "shape":
                request.inputs[0].shape[:] = value
            else:
                setattr(request.inputs[0], name, value)

    return change


def _twice(request):
    request.inputs.append(request.inputs[0])
    request.raw_input_contents.append(request.raw_input_contents[0])


def _both_contents(request):
    request.inputs[0].contents.fp32_contents.extend([0.0] * (2 * FEATURES))


def _wrong_field(request):
    del request.raw_input_contents[:]
    request.inputs[0].contents.int_contents.extend([0] * (2 * FEATURES))


def _too_few_elements(request):
    del request.raw_input_contents[:]
    request.inputs[0].contents.fp32_contents.extend([0.0] * 3)


INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
WRONG_REQUESTS = {
    "model": (lambda r: setattr(r, "model_name", "nope"), MISSING, "no model 'nope'.*'linear'"),
    "version": (lambda r: setattr(r, "model_version", "7"), MISSING, "version '7'.*1, 2, 10"),
    "not a version": (lambda r: setattr(r, "model_version", "../1"), MISSING, "'../1'"),
    "name": (_change_tensor(name="z"), INVALID, "no input 'z'.*'x'"),
    "datatype": (_change_tensor(datatype="FP64"), INVALID, "'FP64'.*takes FP32"),
    "no datatype": (_change_tensor(datatype="FLOAT"), INVALID, "'FLOAT'.*takes FP32"),
    "rank": (_change_tensor(shape=[2, 3, 2]), INVALID, r"\[2, 3, 2\].*\[-1, 6\]"),
    "dimension": (_change_tensor(shape=[2, 5]), INVALID, r"\[2, 5\].*\[-1, 6\]"),
    "negative": (_change_tensor(shape=[-1, 6]), INVALID, r"\[-1, 6\]"),
    "huge": (_change_tensor(shape=[2**62, 6]), INVALID, "raw bytes, got 48"),
    "bytes": (_change_tensor(shape=[3, 6]), INVALID, "72 raw bytes, got 48"),
    "no inputs": (lambda r: r.ClearField("inputs"), INVALID, "input 'x' is missing"),
    "given twice": (_twice, INVALID, "'x' is given twice"),
    "raw missing": (lambda r: r.ClearField("raw_input_contents"), INVALID, "12 elements"),
    "raw twice": (lambda r: r.raw_input_contents.append(b""), INVALID, "2 raw contents for 1"),
    "raw and typed": (_both_contents, INVALID, "send one of them"),
    "wrong field": (_wrong_field, INVALID, "int_contents"),
    "too few elements": (_too_few_elements, INVALID, "got 3"),
    "output": (lambda r: r.outputs.add(name="z"), INVALID, "no output 'z'.*'y'"),
}


@pytest.mark.parametrize("name", WRONG_REQUESTS)
def test_a_wrong_request_gets_its_status_and_a_sentence(stub, name):
    change, code, message = WRONG_REQUESTS[name]
    request = request_of(x_of(2))
    change(request)
    with pytest.raises(grpc.RpcError, match=message) as raised:
        stub.ModelInfer(request)
    assert raised.value.code() is code
    assert stub.ModelInfer(request_of(x_of(2))).outputs[0].shape == [2, 4]


def test_more_rows_than_the_queue_holds_are_refused(stub):
    with pytest.raises(grpc.RpcError, match=r"51 rows.*at most 50") as raised:
        stub.ModelInfer(request_of(x_of(51)))
    assert raised.value.code() is INVALID


def test_a_message_that_is_too_large_is_refused(stub):
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(request_of(x_of(2), id="x" * (65 * 2**20)))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_metadata_of_an_unknown_model(stub):
    with pytest.raises(grpc.RpcError, match="no model 'nope'") as raised:
        stub.ModelMetadata(pb.ModelMetadataRequest(name="nope"))
    assert raised.value.code() is MISSING


def test_reflection_describes_every_service(server):
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) >= {
            "inference.GRPCInferenceService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        pool = DescriptorPool(database)
        service = pool.FindServiceByName("inference.GRPCInferenceService")
        infer = service.FindMethodByName("ModelInfer")
        assert "raw_input_contents" in infer.input_type.fields_by_name
        assert pool.FindServiceByName("grpc.health.v1.Health").methods
