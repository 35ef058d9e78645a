"""Requests to the linear model, as messages and as a stock client makes them."""

import contextlib

import grpc
import numpy as np
import pytest
import tritonclient.grpc as stock

from aqt_protos import open_inference_pb2 as pb
from bundles import FEATURES

MODEL = "linear"


def x_of(rows, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, FEATURES)).astype(np.float32)


def request_of(x, **fields):
    request = pb.ModelInferRequest(**{"model_name": MODEL, **fields})
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    request.raw_input_contents.append(x.tobytes())
    return request


def stock_input(array, name="x", datatype="FP32"):
    tensor = stock.InferInput(name, array.shape, datatype)
    tensor.set_data_from_numpy(array)
    return tensor


@contextlib.contextmanager
def raises_status(code, match):
    """The block fails with `code`, whichever client it calls, and a message that matches."""
    with pytest.raises((grpc.RpcError, stock.InferenceServerException), match=match) as raised:
        yield
    error = raised.value
    found = error.code().name if isinstance(error, grpc.RpcError) else error.status()
    assert found.removeprefix("StatusCode.") == code, error
