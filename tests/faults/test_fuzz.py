"""Requests that no client means are refused, whatever they are; `make fuzz` sends a million."""

import asyncio

import grpc
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from aqt_protos import open_inference_pb2 as pb
from bundles import FEATURES, write_linear
from faults.amount import amount
from faults.fuzz import fuzz_bodies, fuzz_inside
from faults.inside import REFUSALS, Context, inside
from faults.mutations import seeds

pytestmark = pytest.mark.slow

PARAMETERS = st.builds(
    pb.InferParameter,
    int64_param=st.none() | st.integers(-(2**63), 2**63 - 1),
    string_param=st.none() | st.text(max_size=4),
)
TENSORS = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=st.sampled_from(["x", "y", ""]),
    datatype=st.sampled_from(["FP32", "FP16", "BYTES", "fp32", ""]),
    shape=st.lists(st.sampled_from([0, 1, 2, FEATURES, -1, 2**62]), max_size=3),
    parameters=st.dictionaries(
        st.sampled_from(["shared_memory_region", "shared_memory_offset", "a"]), PARAMETERS
    ),
    contents=st.none()
    | st.builds(
        pb.InferTensorContents, fp32_contents=st.lists(st.floats(width=32), max_size=2 * FEATURES)
    ),
)
OUTPUTS = st.builds(
    pb.ModelInferRequest.InferRequestedOutputTensor,
    name=st.sampled_from(["y", "x"]),
    parameters=st.dictionaries(st.sampled_from(["classification"]), PARAMETERS),
)
REQUESTS = st.builds(
    pb.ModelInferRequest,
    model_name=st.sampled_from(["linear", ""]),
    model_version=st.sampled_from(["", "1", "2"]),
    parameters=st.dictionaries(st.sampled_from(["priority", "timeout"]), PARAMETERS),
    inputs=st.lists(TENSORS, max_size=2),
    outputs=st.lists(OUTPUTS, max_size=2),
    raw_input_contents=st.lists(st.sampled_from([b"", bytes(4 * FEATURES), b"a"]), max_size=2),
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    write_linear(root / "linear" / "1")
    return root


def test_mutated_requests_get_a_status_and_take_no_memory(repository):
    x = np.ones((3, FEATURES), np.float32)
    originals = seeds([("linear", [("x", "FP32", x)])])
    memory = []
    count = amount(4000, 100_000)
    told = asyncio.run(
        fuzz_inside(repository, originals, count, 0, lambda _, rss: memory.append(rss))
    )
    assert not told["wrong"], [sent.hex() for sent in told["wrong"][:3]]
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= told["statuses"].keys()
    assert memory[-1] < memory[len(memory) // 10] * 1.1


def test_drawn_messages_get_a_status(repository):
    async def check():
        async with inside(repository) as door:
            loop = asyncio.get_running_loop()

            @hypothesis.given(REQUESTS)
            def one(request):
                sent = request.SerializeToString()
                status = asyncio.run_coroutine_threadsafe(door.send(sent), loop).result(60)
                assert status == "OK" or status in REFUSALS

            await asyncio.to_thread(one)

    asyncio.run(check())


def test_who_has_gone_when_it_is_refused_is_no_defect(repository):
    class Gone(Context):
        async def abort(self, code, sentence, details=()):
            raise grpc.aio.InternalError("the call was cancelled")

    async def check():
        async with inside(repository) as door:
            with pytest.raises(asyncio.CancelledError):
                await door.infer(b"\xff", Gone())

    asyncio.run(check())


def test_mutated_bodies_of_http_are_read_or_refused():
    assert fuzz_bodies(amount(2000, 100_000), seed=0) == []
