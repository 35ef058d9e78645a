"""Requests of every length, scalars per request and odd dtypes, from a stock client to the bits."""

import concurrent.futures

import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as stock

import sequences
from aqt_engine.kernels import library
from engine.contractions import assert_same_bits
from sequences import LENGTHS, inputs_of
from server.messages import raises_status
from server_process import serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    sequences.write(root / "tagger" / "1")
    return root


@pytest.fixture(scope="module")
def training():
    return sequences.Training()


@pytest.fixture(scope="module")
def client(repository, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    with (
        serving(repository, "--max-batch-rows", "8", log=log) as server,
        stock.InferenceServerClient(server.address) as connected,
    ):
        yield connected


def asked(client, inputs, temperature_shape=(1,)):
    scalar = inputs["temperature"][:1].reshape(temperature_shape)
    tensors = []
    for name, datatype, array in (
        ("ids", "INT32", inputs["ids"]),
        ("temperature", "FP32", scalar),
        ("bias", "FP32", inputs["bias"]),
    ):
        tensors.append(stock.InferInput(name, array.shape, datatype))
        tensors[-1].set_data_from_numpy(array)
    return client.infer("tagger", tensors)


def answers_of(result):
    """By name; BF16 from its raw bytes, as the stock client makes float32 of it."""
    response = result.get_response()
    raw = response.raw_output_contents[[o.name for o in response.outputs].index("mean")]
    outputs = {o.name: result.as_numpy(o.name) for o in response.outputs}
    return {**outputs, "mean": np.frombuffer(raw, ml_dtypes.bfloat16).reshape(-1, 4)}


def assert_trained(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert_same_bits(found[name], array)


@pytest.mark.parametrize(("rows", "length"), [(1, 0), (1, 1), (5, 3), (2, 4), (20, 6)])
def test_every_length_gets_the_bits_of_training_at_its_own_bucket(client, training, rows, length):
    inputs = inputs_of(rows, length, seed=length)
    result = asked(client, inputs, () if rows == 5 else (1,))
    assert_trained(answers_of(result), training(inputs))
    parameters = result.get_response().parameters
    assert parameters["aqt_exact"].bool_param
    assert parameters["aqt_mode"].string_param == "exact"


def test_requests_of_all_lengths_and_temperatures_at_once(client, training):
    requests = [
        inputs_of(1 + i % 3, 1 + i % LENGTHS[-1], seed=i, temperature=1 + i % 2) for i in range(48)
    ]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda inputs: asked(client, inputs), requests))
    for inputs, result in zip(requests, results, strict=True):
        assert_trained(answers_of(result), training(inputs))


def test_the_signature_as_clients_see_it(client):
    metadata = client.get_model_metadata("tagger")
    assert {t.name: (t.datatype, list(t.shape)) for t in metadata.inputs} == {
        "ids": ("INT32", [-1, -1]),
        "bias": ("FP32", [-1]),
        "temperature": ("FP32", [1]),
    }
    assert {t.name: (t.datatype, list(t.shape)) for t in metadata.outputs} == {
        "any": ("BOOL", [-1]),
        "best": ("INT32", [-1]),
        "logits": ("FP32", [-1, -1, 4]),
        "mean": ("BF16", [-1, 4]),
    }
    config = client.get_model_config("tagger").config
    assert {t.name: list(t.dims) for t in config.input}["ids"] == [-1]
    told = {name: parameter.string_value for name, parameter in config.parameters.items()}
    assert told.pop("aqt_verdict").startswith("exact: no bit differs in ")
    assert told.pop("aqt_kernel") in ("none", *library.INSTRUCTION_SETS)
    assert told == {
        "aqt_exact": "true",
        "aqt_mode": "exact",
        "aqt_tile": "4",
        "aqt_lengths_length": "3,6",
        "aqt_per_request": "temperature",
    }


def test_what_does_not_fit_is_refused_with_the_limit(client):
    with raises_status("INVALID_ARGUMENT", "length is 7, and the model takes at most 6"):
        asked(client, inputs_of(1, 7))
    inputs = inputs_of(3, 2)
    with raises_status("INVALID_ARGUMENT", "takes .1., one value for all rows"):
        two = stock.InferInput("temperature", [3], "FP32")
        two.set_data_from_numpy(inputs["temperature"])
        others = [stock.InferInput("ids", [3, 2], "INT32"), stock.InferInput("bias", [3], "FP32")]
        others[0].set_data_from_numpy(inputs["ids"])
        others[1].set_data_from_numpy(inputs["bias"])
        client.infer("tagger", [two, *others])
    with raises_status("INVALID_ARGUMENT", "'ids' has 3, 'bias' has 2"):
        asked(client, {**inputs, "bias": inputs["bias"][:2]})
    flat = {**inputs, "ids": inputs["ids"].ravel()}
    with raises_status("INVALID_ARGUMENT", r"takes .-1, -1., where the first -1 is any number"):
        asked(client, flat)
