"""Every datatype into and out of a real server, in every form that the protocol has for it."""

import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as stock

from aqt_protos import open_inference_pb2 as pb
from aqt_protos.tensors import DATATYPES, from_contents, from_raw
from bundles import write_linear
from engine.contractions import assert_same_bits
from server.messages import MODEL, raises_status, request_of, x_of
from server.odd_bundles import ARRAY_DATATYPES, TYPED_DATATYPES, WIDTH, write_identity
from server_process import serving

pytestmark = pytest.mark.slow

ROWS = 5


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    write_identity(root / "identity" / "1")
    write_identity(root / "typed" / "1", TYPED_DATATYPES)
    write_linear(root / MODEL / "1")
    with serving(root, log=tmp_path_factory.mktemp("log") / "log") as running:
        yield running


def values(datatype, seed=0):
    """Values all over the range of a datatype, its extremes and its odd ones among them."""
    dtype = DATATYPES[datatype].dtype
    shape = (ROWS, WIDTH)
    rng = np.random.default_rng(seed)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        array = rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
        array[0, :2] = limits.min, limits.max
        return array
    limits = ml_dtypes.finfo(dtype)
    array = rng.normal(size=shape).astype(dtype)
    array[0] = -0.0, np.nan, np.inf
    array[1] = limits.max, limits.tiny, limits.smallest_subnormal
    return array


def inputs():
    return {name: values(name) for name in ARRAY_DATATYPES}


def raw_request():
    request = pb.ModelInferRequest(model_name="identity")
    for name, array in inputs().items():
        request.inputs.add(name=name, datatype=name, shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    return request


def typed_request(model, datatypes):
    request = pb.ModelInferRequest(model_name=model)
    for name in datatypes:
        array = values(name)
        tensor = request.inputs.add(name=name, datatype=name, shape=array.shape)
        # FP16 and BF16 have no field of their own, so they are in a wrong one.
        field = DATATYPES[name].contents or "fp32_contents"
        getattr(tensor.contents, field).extend(array.ravel().tolist())
    return request


def test_raw_contents_of_every_datatype_come_back_bit_for_bit(stub):
    response = stub.ModelInfer(raw_request())
    found = dict(zip((o.name for o in response.outputs), response.raw_output_contents, strict=True))
    for tensor in response.outputs:
        name = tensor.datatype
        assert tensor.name == f"OUT_{name}"
        assert_same_bits(from_raw(found[tensor.name], DATATYPES[name], tensor.shape), values(name))
    assert [t.datatype for t in response.outputs] == ARRAY_DATATYPES


def test_a_stock_client_sends_and_gets_every_datatype(server):
    with stock.InferenceServerClient(server.address) as client:
        tensors = []
        for name, array in inputs().items():
            tensor = stock.InferInput(name, array.shape, name)
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        result = client.infer("identity", tensors)
        for name, array in inputs().items():
            assert_same_bits(result.as_numpy(f"OUT_{name}"), array)


def test_typed_contents_of_every_datatype_come_back_typed_bit_for_bit(stub):
    response = stub.ModelInfer(typed_request("typed", TYPED_DATATYPES))
    assert not response.raw_output_contents
    assert [t.datatype for t in response.outputs] == TYPED_DATATYPES
    for tensor in response.outputs:
        name = tensor.datatype
        assert_same_bits(
            from_contents(tensor.contents, DATATYPES[name], tensor.shape), values(name)
        )


def test_a_datatype_without_typed_contents_is_asked_for_raw(stub):
    with raises_status("INVALID_ARGUMENT", "input 'FP16'.*no field in `contents`"):
        stub.ModelInfer(typed_request("identity", ARRAY_DATATYPES))


def test_small_integers_in_typed_contents_are_in_range(stub):
    request = typed_request("typed", TYPED_DATATYPES)
    (int8,) = (t for t in request.inputs if t.name == "INT8")
    int8.contents.int_contents[3] = 128
    with raises_status("INVALID_ARGUMENT", "input 'INT8'.*outside of INT8"):
        stub.ModelInfer(request)


def test_metadata_and_configuration_name_every_datatype(stub):
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="identity"))
    assert [t.datatype for t in metadata.inputs] == ARRAY_DATATYPES
    config = stub.ModelConfig(pb.ModelConfigRequest(name="identity")).config
    assert [pb.DataType.Name(t.data_type) for t in config.input] == [
        f"TYPE_{name}" for name in ARRAY_DATATYPES
    ]


def test_bytes_do_not_fit_a_model_of_numbers(stub):
    request = request_of(x_of(1))
    request.inputs[0].datatype = "BYTES"
    with raises_status("INVALID_ARGUMENT", "datatype 'BYTES', and the model takes FP32"):
        stub.ModelInfer(request)


def test_bytes_come_back_typed_where_the_request_was_typed(stub):
    request = request_of(x_of(2))
    request.outputs.add(name="y").parameters["classification"].int64_param = 2
    raw = stub.ModelInfer(request)
    expected = from_raw(raw.raw_output_contents[0], DATATYPES["BYTES"], [2, 2])
    del request.raw_input_contents[:]
    request.inputs[0].contents.fp32_contents.extend(x_of(2).ravel().tolist())
    (typed,) = stub.ModelInfer(request).outputs
    assert (typed.datatype, list(typed.shape)) == ("BYTES", [2, 2])
    found = from_contents(typed.contents, DATATYPES["BYTES"], [2, 2])
    assert found.tolist() == expected.tolist()
