"""What parameters ask of the server: classification, priority, timeout, and what it ignores."""

import numpy as np
import pytest
import tritonclient.grpc as stock

from aqt_protos import open_inference_pb2 as pb
from aqt_protos.tensors import DATATYPES, from_raw
from bundles import CLASSES, reference
from engine.contractions import assert_same_bits
from server.messages import MODEL, raises_status, request_of, stock_input, x_of
from server.odd_bundles import WIDTH

pytestmark = pytest.mark.slow

X = x_of(5)


@pytest.mark.parametrize("count", [1, 3, CLASSES, CLASSES + 5])
def test_classification_gives_the_largest_values_and_their_indices(client, repository, count):
    expected = reference(repository / MODEL / "1", X)
    output = stock.InferRequestedOutput("y", class_count=count)
    found = client.infer(MODEL, [stock_input(X)], outputs=[output]).as_numpy("y")
    assert found.shape == (5, min(count, CLASSES))
    for row, values in zip(found, expected, strict=True):
        indices = [int(value.split(b":")[1]) for value in row]
        assert indices == np.argsort(-values)[: len(indices)].tolist()
        # Every bit of the value is in its digits.
        assert_same_bits(np.array([v.split(b":")[0] for v in row], np.float32), values[indices])


ROWS = {
    "FP32": ([1.5, np.nan, 1.5], [b"1.5:0", b"1.5:2", b"nan:1"]),
    "FP64": ([-np.inf, 0.1, -0.0], [b"0.1:1", b"-0.0:2", b"-inf:0"]),
    "FP16": ([6.5, np.inf, -1], [b"inf:1", b"6.5:0", b"-1.0:2"]),
    "BF16": ([0.5, 0.75, 0.25], [b"0.75:1", b"0.5:0", b"0.25:2"]),
    "INT8": ([-128, 127, 0], [b"127:1", b"0:2", b"-128:0"]),
    "UINT64": (
        [0, 2**64 - 1, 2**63],
        [b"18446744073709551615:1", b"9223372036854775808:2", b"0:0"],
    ),
    "BOOL": ([False, True, True], [b"1:1", b"1:2", b"0:0"]),
}


@pytest.mark.parametrize("name", ROWS)
def test_classification_orders_every_kind_of_datatype(stub, name):
    row, expected = ROWS[name]
    request = pb.ModelInferRequest(model_name="identity")
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="identity"))
    for tensor in metadata.inputs:
        array = np.zeros((1, WIDTH), DATATYPES[tensor.name].dtype)
        if tensor.name == name:
            array[0] = np.array(row, array.dtype)
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    request.outputs.add(name=f"OUT_{name}").parameters["classification"].int64_param = 3
    (raw,) = stub.ModelInfer(request).raw_output_contents
    assert from_raw(raw, DATATYPES["BYTES"], [1, 3])[0].tolist() == expected


def test_classification_of_no_rows(client):
    output = stock.InferRequestedOutput("y", class_count=2)
    response = client.infer(MODEL, [stock_input(X[:0])], outputs=[output]).get_response()
    assert list(response.outputs[0].shape) == [0, 2]


def test_a_stock_client_sends_priority_and_timeout(client, repository):
    result = client.infer(
        MODEL, [stock_input(X)], priority=1, timeout=60_000_000, parameters={"mine": "anything"}
    )
    assert_same_bits(result.as_numpy("y"), reference(repository / MODEL / "1", X))


def test_parameters_that_are_not_reserved_are_ignored(stub):
    request = request_of(X)
    for parameters in (request.parameters, request.inputs[0].parameters):
        parameters["color"].string_param = "green"
        parameters["sequence_id"].int64_param = 7
        parameters["empty"].SetInParent()
    request.outputs.add(name="y").parameters["binary_data"].bool_param = False
    plain = stub.ModelInfer(request_of(X))
    assert stub.ModelInfer(request).raw_output_contents == plain.raw_output_contents


WRONG = {
    "priority": [
        ("string_param", "1", "`string_param`: send a whole number in `int64_param` or `uint64"),
        ("bool_param", True, "`bool_param`"),
        ("int64_param", -1, "is -1: send a number from 0 to 10"),
        ("uint64_param", 11, "is 11: send a number from 0 to 10"),
    ],
    "timeout": [
        ("double_param", 1.5, "`double_param`"),
        ("int64_param", -5, "is -5"),
        ("uint64_param", 2**63, "from 0 to"),
    ],
}


@pytest.mark.parametrize(
    ("name", "field", "value", "match"),
    [(name, *case) for name, cases in WRONG.items() for case in cases],
)
def test_a_reserved_parameter_of_a_wrong_type_is_refused(stub, name, field, value, match):
    request = request_of(X)
    setattr(request.parameters[name], field, value)
    with raises_status("INVALID_ARGUMENT", f"'{name}' of the request.*{match}"):
        stub.ModelInfer(request)


def test_a_reserved_parameter_without_a_value_is_refused(stub):
    request = request_of(X)
    request.parameters["timeout"].SetInParent()
    with raises_status("INVALID_ARGUMENT", "`no field`"):
        stub.ModelInfer(request)


def test_a_classification_that_is_no_number_is_refused(stub):
    request = request_of(X)
    request.outputs.add(name="y").parameters["classification"].string_param = "two"
    with raises_status("INVALID_ARGUMENT", "'classification' of output 'y'"):
        stub.ModelInfer(request)
