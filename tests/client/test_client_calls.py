"""Both clients against a fake server: what is sent, what comes back, and many calls at once."""

import asyncio
import inspect
import subprocess
import sys

import grpc
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

import aqt_client
from aqt_protos import open_inference_pb2 as pb
from client.connecting import BOTH
from client.fake_server import BOUND_S, HANG, FakeServer

X = np.arange(6, dtype=np.float32).reshape(2, 3)

DTYPES = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BF16": ml_dtypes.bfloat16,
}


@pytest.fixture(scope="module")
def shared():
    with FakeServer() as server:
        yield server


def infer_calls(server):
    return [c for c in server.calls if c.rpc == "ModelInfer"]


@BOTH
def test_health_and_metadata(server, connect):
    server.model = pb.ModelMetadataResponse(
        name="identity", versions=["1", "3"], platform="jax", inputs=[{"name": "x"}]
    )
    server.model.outputs.add(name="y", datatype="FP32", shape=[-1, 4])
    with connect(server.address) as client:
        assert client.is_live() is True
        assert client.is_ready() is True
        assert client.is_model_ready("identity", "3") is True
        assert client.is_model_ready("other") is False
        assert client.server_metadata() == aqt_client.ServerMetadata(
            name="fake", version="1.2", extensions=("a", "b")
        )
        assert client.model_metadata("identity", "3") == aqt_client.ModelMetadata(
            name="identity",
            versions=("1", "3"),
            platform="jax",
            inputs=(aqt_client.TensorMetadata(name="x", datatype="", shape=()),),
            outputs=(aqt_client.TensorMetadata(name="y", datatype="FP32", shape=(-1, 4)),),
        )
    assert [c.request for c in server.calls[2:4]] == [
        pb.ModelReadyRequest(name="identity", version="3"),
        pb.ModelReadyRequest(name="other"),
    ]
    assert server.calls[-1].request == pb.ModelMetadataRequest(name="identity", version="3")


@BOTH
def test_a_version_that_is_not_ready_is_loading_or_was_refused(server, connect):
    told = [("identity", "1", "UNAVAILABLE", "it is damaged"), ("identity", "2", "LOADING", "")]
    for name, version, state, reason in (*told, ("other", "1", "READY", "")):
        server.index.models.add(name=name, version=version, state=state, reason=reason)
    with connect(server.address) as client:
        assert client.model_states("identity") == tuple(
            aqt_client.ModelState(version=version, state=state, reason=reason)
            for _, version, state, reason in told
        )
        assert client.model_states("unknown") == ()


@BOTH
def test_each_attempt_says_who_calls(server, connect):
    made = iter(["first", "second"])
    with connect(server.address, token=lambda: next(made)) as client:
        server.script.append((grpc.StatusCode.UNAVAILABLE, "not yet"))
        client.infer("identity", {"x": X})
    with connect(server.address, token="fixed") as client:
        client.is_live()
    with connect(server.address) as client:
        client.is_live()
    told = [call.metadata.get("authorization") for call in server.calls]
    assert told == ["Bearer first", "Bearer second", "Bearer fixed", None]


@BOTH
def test_an_answer_carries_what_the_server_says(server, connect):
    with connect(server.address) as client:
        result = client.infer(
            "identity", {"x": X, "z": [1, 2]}, version="1", outputs=["x"], request_id="r7"
        )
    assert (result.model_name, result.model_version, result.id) == ("identity", "1", "r7")
    assert result.exact is True
    assert result.parameters == {"aqt_exact": True, "rows": 5}
    assert list(result.outputs) == ["x"]
    assert result["x"].tobytes() == X.tobytes()
    with pytest.raises(KeyError, match=r"no output 'z' in the answer, which has \['x'\]"):
        result["z"]


def test_exact_is_none_where_the_server_does_not_say(server):
    server.answer = lambda request: pb.ModelInferResponse()
    with aqt_client.Client(server.address) as client:
        assert client.infer("m", {"x": X}).exact is None


@st.composite
def fixed_width_arrays(draw):
    name = draw(st.sampled_from(sorted(DTYPES)))
    dtype = np.dtype(DTYPES[name])
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    count = int(np.prod(shape, dtype=int))
    # Any bits, so that every NaN is among them.
    bits = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if name == "BOOL":
        bits = bytes(b & 1 for b in bits)
    return name, np.frombuffer(bits, dtype).reshape(shape)


@BOTH
def test_every_fixed_width_dtype_comes_back_in_every_bit(shared, connect):
    with connect(shared.address) as client:

        @hypothesis.given(fixed_width_arrays())
        def check(case):
            name, array = case
            found = client.infer("identity", {"x": array})["x"]
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert found.tobytes() == array.tobytes()
            (tensor,) = infer_calls(shared)[-1].request.inputs
            assert tensor.datatype == name

        check()


@BOTH
def test_bytes_come_back(shared, connect):
    with connect(shared.address) as client:

        @hypothesis.given(
            hnp.arrays(object, hnp.array_shapes(min_dims=0, min_side=0), elements=st.binary())
        )
        def check(array):
            found = client.infer("identity", {"x": array})["x"]
            assert found.dtype == object
            assert found.shape == array.shape
            assert found.tolist() == array.tolist()
            assert infer_calls(shared)[-1].request.inputs[0].datatype == "BYTES"

        check()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.array(["é", "b"]), ["é".encode(), b"b"]),
        (np.array([b"ab", b"c"]), [b"ab", b"c"]),
        (["text", "more"], [b"text", b"more"]),
        (np.array(["ö", b"\0"], object), ["ö".encode(), b"\0"]),
    ],
)
def test_strings_go_as_bytes(shared, value, expected):
    with aqt_client.Client(shared.address) as client:
        assert client.infer("identity", {"x": value})["x"].tolist() == expected


@pytest.mark.parametrize("array", [X.astype(">f4"), X.T, X[::-1, ::2], np.float32(2.5)])
def test_layout_and_byte_order_do_not_matter(shared, array):
    with aqt_client.Client(shared.address) as client:
        found = client.infer("identity", {"x": array})["x"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, array)


@BOTH
def test_more_than_grpc_takes_by_default_goes_both_ways(shared, connect):
    array = np.arange(2**21, dtype=np.float64)  # 16 MiB; the default is 4
    with connect(shared.address) as client:
        assert client.infer("identity", {"x": array})["x"].tobytes() == array.tobytes()


@BOTH
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(2, np.complex64), "input 'x' cannot be sent: dtype complex64 .*float32"),
        (np.array([1, None], object), "input 'x' cannot be sent: element 0 of .* is a int"),
        (np.zeros(2, "M8[s]"), "input 'x' cannot be sent: dtype datetime64"),
        ([[1], [1, 2]], "input 'x' cannot be sent"),
    ],
)
def test_what_cannot_be_sent_is_not(server, connect, value, message):
    with connect(server.address) as client, pytest.raises(ValueError, match=message):
        client.infer("identity", {"x": value})
    assert server.calls == []


def test_a_message_over_the_limit_is_not_sent(server, monkeypatch):
    monkeypatch.setattr("aqt_client._codec.MAX_MESSAGE_NBYTES", 20)
    with (
        aqt_client.Client(server.address) as client,
        pytest.raises(ValueError, match="a message holds at most 20: send fewer rows"),
    ):
        client.infer("identity", {"x": X})
    assert server.calls == []


def test_contents_by_type_are_read_too(server):
    def answer(request):
        response = pb.ModelInferResponse()
        a = response.outputs.add(name="a", datatype="INT8", shape=[2, 1])
        a.contents.int_contents.extend([-128, 127])
        b = response.outputs.add(name="b", datatype="BYTES", shape=[2])
        b.contents.bytes_contents.extend([b"\0", b""])
        return response

    server.answer = answer
    with aqt_client.Client(server.address) as client:
        result = client.infer("m", {})
    assert (result["a"].dtype, result["a"].tolist()) == (np.int8, [[-128], [127]])
    assert result["b"].tolist() == [b"\0", b""]


OUTPUT = {"name": "y", "datatype": "FP32", "shape": [2]}


@BOTH
@pytest.mark.parametrize(
    ("response", "message"),
    [
        (
            pb.ModelInferResponse(outputs=[OUTPUT], raw_output_contents=[b"", b""]),
            "it has 1 outputs and raw contents for 2",
        ),
        (
            pb.ModelInferResponse(outputs=[OUTPUT], raw_output_contents=[b"1234567"]),
            r"output 'y': FP32 of shape \[2\] takes 8 raw bytes, got 7",
        ),
        (
            pb.ModelInferResponse(outputs=[{"name": "y", "datatype": "FP8"}]),
            "output 'y': 'FP8' is not a",
        ),
        (pb.ModelInferResponse(outputs=[OUTPUT]), r"output 'y': shape \[2\] has 2 elements, got 0"),
    ],
)
def test_an_answer_that_breaks_the_protocol_is_a_server_error(server, connect, response, message):
    server.answer = lambda request: response
    with (
        connect(server.address) as client,
        pytest.raises(aqt_client.ServerError, match=f"breaks the protocol: {message}") as caught,
    ):
        client.infer("m", {})
    assert caught.value.code is grpc.StatusCode.INTERNAL
    assert len(server.calls) == 1


def test_a_cancelled_task_cancels_the_request(server):
    async def main():
        async with aqt_client.AsyncClient(server.address, timeout_s=BOUND_S) as client:
            server.script.append(HANG)
            task = asyncio.create_task(client.infer("identity", {"x": X}))
            while not server.calls:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.abandoned.wait, BOUND_S)
            return await client.infer("identity", {"x": X})

    assert asyncio.run(asyncio.wait_for(main(), BOUND_S)).exact
    assert len(server.calls) == 2


def test_many_at_once_on_one_connection(server):
    async def main():
        async with aqt_client.AsyncClient(server.address) as client:
            return await asyncio.gather(
                *(client.infer("identity", {"x": [i]}, request_id=str(i)) for i in range(50))
            )

    results = asyncio.run(main())
    assert [(r.id, r["x"].tolist()) for r in results] == [(str(i), [i]) for i in range(50)]


def test_an_async_client_needs_a_running_loop():
    with pytest.raises(RuntimeError, match="create it inside a coroutine"):
        aqt_client.AsyncClient("localhost:8001")


def test_both_clients_have_the_same_methods():
    def signatures(kind):
        return {
            name: list(inspect.signature(method).parameters.values())
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_") or name == "__init__"
        }

    blocking, awaited = signatures(aqt_client.Client), signatures(aqt_client.AsyncClient)
    # The asyncio client takes asynchronous inputs too.
    streams = [of.pop("stream") for of in (blocking, awaited)]
    assert [p.name for p in streams[0]] == [p.name for p in streams[1]]
    assert blocking == awaited


def test_the_exports_are_pinned():
    assert aqt_client.__all__ == sorted(aqt_client.__all__)
    public = {n for n in vars(aqt_client) if not n.startswith("_")} - {"files"}
    assert public == set(aqt_client.__all__)


def test_the_client_does_not_import_jax():
    code = (
        "import sys, aqt_client, aqt_client.files\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('jax', 'jaxlib', 'aqt_engine')])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=BOUND_S, check=True
    )
    assert found.stdout.strip() == "[]"
