"""Tensors in system shared memory, put there and read from there by a stock client's own tools."""

import asyncio
import contextlib
import os
import uuid
from pathlib import Path

import grpc
import jax.numpy as jnp
import numpy as np
import pytest
import tritonclient.grpc as stock
from tritonclient.utils import shared_memory as shm

import aqt_client
from aqt_protos import open_inference_pb2 as pb
from aqt_protos import open_inference_pb2_grpc as pb_grpc
from aqt_protos.tensors import DATATYPES, from_raw
from bundles import CLASSES, reference
from engine.contractions import assert_same_bits
from server.messages import MODEL, raises_status, request_of, x_of
from server.odd_bundles import ARRAY_DATATYPES, WIDTH
from server_process import WAIT_S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="the system has no /dev/shm"),
]

X = x_of(5)
PAGE = 4096


@pytest.fixture
def client(server):
    with stock.InferenceServerClient(server.address) as connected:
        yield connected
        connected.unregister_system_shared_memory()


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(server.address) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)


@contextlib.contextmanager
def created(nbytes=PAGE):
    """A shared memory object of the stock client's, and its key."""
    key = f"/aqt-test-{uuid.uuid4().hex}"
    handle = shm.create_shared_memory_region("region", key, nbytes, create_only=True)
    try:
        yield handle, key
    finally:
        shm.destroy_shared_memory_region(handle)


def in_region(region, nbytes, offset=0):
    tensor = stock.InferInput("x", X.shape, "FP32")
    tensor.set_shared_memory(region, nbytes, offset)
    return tensor


def out_region(region, nbytes, offset=0):
    output = stock.InferRequestedOutput("y")
    output.set_shared_memory(region, nbytes, offset)
    return output


def test_input_and_output_in_shared_memory_have_the_bits_of_training(client, repository):
    expected = reference(repository / MODEL / "1", X)
    with created() as (inputs, input_key), created() as (outputs, output_key):
        shm.set_shared_memory_region(inputs, [X], offset=64)
        client.register_system_shared_memory("in", input_key, PAGE - 32, offset=32)
        client.register_system_shared_memory("out", output_key, PAGE)
        result = client.infer(
            MODEL,
            [in_region("in", X.nbytes, offset=32)],
            outputs=[out_region("out", expected.nbytes, offset=128)],
        )
        (output,) = result.get_response().outputs
        assert output.parameters["shared_memory_region"].string_param == "out"
        assert output.parameters["shared_memory_offset"].int64_param == 128
        assert output.parameters["shared_memory_byte_size"].int64_param == expected.nbytes
        assert list(result.get_response().raw_output_contents) == [b""]
        found = shm.get_contents_as_numpy(outputs, np.float32, list(output.shape), offset=128)
        assert_same_bits(np.array(found), expected)
        # Not one byte before or after.
        whole = np.array(shm.get_contents_as_numpy(outputs, np.uint8, [PAGE]))
        assert not whole[:128].any()
        assert not whole[128 + expected.nbytes :].any()


def test_what_is_written_later_is_what_is_read(client, repository):
    with created() as (handle, key):
        client.register_system_shared_memory("in", key, X.nbytes)
        for seed in (1, 2):
            x = x_of(5, seed)
            shm.set_shared_memory_region(handle, [x])
            found = client.infer(MODEL, [in_region("in", X.nbytes)]).as_numpy("y")
            assert_same_bits(found, reference(repository / MODEL / "1", x))


def test_every_datatype_in_shared_memory_and_in_messages_mixed(stub, client):
    """Every second input and every third output is in shared memory."""
    arrays = {
        name: np.arange(2 * WIDTH).reshape(2, WIDTH).astype(DATATYPES[name].dtype)
        for name in ARRAY_DATATYPES
    }
    request = pb.ModelInferRequest(model_name="identity")
    with created() as (inputs, input_key), created() as (outputs, output_key):
        client.register_system_shared_memory("in", input_key, PAGE)
        client.register_system_shared_memory("out", output_key, PAGE)
        content = np.zeros(PAGE, np.uint8)
        for i, (name, array) in enumerate(arrays.items()):
            tensor = request.inputs.add(name=name, datatype=name, shape=array.shape)
            output = request.outputs.add(name=f"OUT_{name}")
            if i % 2:
                _place(tensor.parameters, "in", 64 * i, array.nbytes)
                content[64 * i : 64 * i + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
            else:
                request.raw_input_contents.append(array.tobytes())
            if i % 3 == 2:
                _place(output.parameters, "out", 64 * i, 64)
        shm.set_shared_memory_region(inputs, [content])
        response = stub.ModelInfer(request)
        written = np.array(shm.get_contents_as_numpy(outputs, np.uint8, [PAGE]))
    assert len(response.raw_output_contents) == len(arrays)
    for i, (name, array) in enumerate(arrays.items()):
        raw = response.raw_output_contents[i]
        if i % 3 == 2:
            assert raw == b""
            raw = written[64 * i : 64 * i + array.nbytes].tobytes()
        assert_same_bits(from_raw(raw, DATATYPES[name], array.shape), array)


def _place(parameters, region, offset, nbytes):
    parameters["shared_memory_region"].string_param = region
    parameters["shared_memory_offset"].int64_param = offset
    parameters["shared_memory_byte_size"].int64_param = nbytes


def test_classification_into_shared_memory(client, stub):
    # The stock client refuses to ask for it.
    request = request_of(X)
    output = request.outputs.add(name="y")
    output.parameters["classification"].int64_param = 2
    _place(output.parameters, "out", 0, PAGE)
    with created() as (handle, key):
        client.register_system_shared_memory("out", key, PAGE)
        (found,) = stub.ModelInfer(request).outputs
        assert (found.datatype, list(found.shape)) == ("BYTES", [5, 2])
        nbytes = found.parameters["shared_memory_byte_size"].int64_param
        raw = np.array(shm.get_contents_as_numpy(handle, np.uint8, [nbytes])).tobytes()
        assert all(b":" in value for value in from_raw(raw, DATATYPES["BYTES"], [5, 2]).ravel())


def test_status_lists_what_is_registered(client):
    assert not client.get_system_shared_memory_status().regions
    with created() as (_, key):
        client.register_system_shared_memory("a", key, 100, offset=10)
        client.register_system_shared_memory("b", key, PAGE)
        assert set(client.get_system_shared_memory_status().regions) == {"a", "b"}
        (a,) = client.get_system_shared_memory_status("a").regions.values()
        assert (a.name, a.key, a.offset, a.byte_size) == ("a", key, 10, 100)
        with raises_status("NOT_FOUND", "no shared memory region 'c'.*'a', 'b'"):
            client.get_system_shared_memory_status("c")
        with raises_status("ALREADY_EXISTS", "'a' is registered"):
            client.register_system_shared_memory("a", key, PAGE)
        client.unregister_system_shared_memory("a")
        client.unregister_system_shared_memory("never registered")
        assert set(client.get_system_shared_memory_status().regions) == {"b"}
        client.unregister_system_shared_memory()
        assert not client.get_system_shared_memory_status().regions


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, PAGE + 1), (1, PAGE), (PAGE, 1), (0, 0), (2**63, 2**63), (5, 2**64 - 6)],
)
def test_a_region_is_within_its_object(client, offset, nbytes):
    with created() as (_, key), raises_status("INVALID_ARGUMENT", f"has {PAGE}"):
        client.register_system_shared_memory("region", key, nbytes, offset=offset)


@pytest.mark.parametrize("key", ["", "/", ".", "..", "/..", "../etc/passwd", "//x", "/a/b", "a\0b"])
def test_a_key_is_a_name_and_not_a_path(client, key):
    with raises_status("INVALID_ARGUMENT", "is no key of a shared memory object"):
        client.register_system_shared_memory("region", key, 1)


def test_what_is_no_shared_memory_object_is_refused(client, tmp_path):
    name = f"aqt-test-{uuid.uuid4().hex}"
    with raises_status("INVALID_ARGUMENT", "cannot be opened .No such file"):
        client.register_system_shared_memory("region", name, 1)
    link, directory = Path("/dev/shm") / name, Path("/dev/shm") / f"{name}-directory"
    (tmp_path / "elsewhere").write_bytes(b"secret")
    link.symlink_to(tmp_path / "elsewhere")
    directory.mkdir()
    try:
        for key in (link.name, directory.name):
            with raises_status("INVALID_ARGUMENT", "cannot be opened"):
                client.register_system_shared_memory("region", key, 1)
    finally:
        link.unlink()
        directory.rmdir()
    with raises_status("INVALID_ARGUMENT", "needs a name"):
        client.register_system_shared_memory("", name, 1)


def test_a_tensor_is_within_its_region(client):
    with created() as (_, key):
        client.register_system_shared_memory("region", key, 200)
        for nbytes, offset in ((201, 0), (200, 1), (1, 200), (2**62, 2**62)):
            with raises_status("INVALID_ARGUMENT", "input 'x'.*which has 200: stay within"):
                client.infer(MODEL, [in_region("region", nbytes, offset)])
        with raises_status("INVALID_ARGUMENT", "takes 120 raw bytes, got 80"):
            client.infer(MODEL, [in_region("region", 80)])
        output = out_region("region", 4 * CLASSES)
        with raises_status("INVALID_ARGUMENT", r"'y' takes 80 bytes, and its part .* has 16"):
            client.infer(MODEL, [in_region("region", X.nbytes)], outputs=[output])
        with raises_status("NOT_FOUND", "no shared memory region 'other'"):
            client.infer(MODEL, [in_region("other", 80)])


def test_parameters_of_a_wrong_kind_are_refused(stub):
    def change(name, field, value):
        request = request_of(X)
        setattr(request.inputs[0].parameters[name], field, value)
        return request

    for request, match in (
        (change("shared_memory_region", "int64_param", 1), "'shared_memory_region'.*a string"),
        (change("shared_memory_offset", "string_param", "1"), "'shared_memory_offset'.*whole"),
        (change("shared_memory_byte_size", "double_param", 1.0), "'shared_memory_byte_size'"),
        (change("shared_memory_offset", "int64_param", -1), "is -1"),
        (change("shared_memory_offset", "int64_param", 1), "no region"),
    ):
        with raises_status("INVALID_ARGUMENT", match):
            stub.ModelInfer(request)


def test_an_object_that_is_cut_short_ends_the_request_and_not_the_server(client, stub):
    with created() as (_, key):
        client.register_system_shared_memory("region", key, PAGE)
        os.truncate(f"/dev/shm{key}", 8)
        with raises_status("INVALID_ARGUMENT", "became shorter than input 'x' needs"):
            client.infer(MODEL, [in_region("region", X.nbytes)])
        request = request_of(X)
        _place(request.outputs.add(name="y").parameters, "region", 0, PAGE)
        with raises_status("INVALID_ARGUMENT", "became shorter than output 'y' needs"):
            stub.ModelInfer(request)
        assert os.stat(f"/dev/shm{key}").st_size == 8
        os.truncate(f"/dev/shm{key}", PAGE)
    assert client.is_server_live()


def test_the_server_keeps_no_object_open_that_is_not_registered(client, server):
    def open_objects():
        descriptors = Path(f"/proc/{server.process.pid}/fd")
        return sum("/dev/shm/aqt-test" in os.readlink(d) for d in descriptors.iterdir())

    with created() as (_, key):
        client.register_system_shared_memory("region", key, PAGE)
        assert open_objects() == 1
        with raises_status("INVALID_ARGUMENT", "has 4096"):
            client.register_system_shared_memory("other", key, 2 * PAGE)
        client.infer(MODEL, [in_region("region", X.nbytes)])
        client.unregister_system_shared_memory("region")
        assert open_objects() == 0


def test_cuda_shared_memory_is_not_there_and_says_so(client):
    for call in (
        lambda: client.register_cuda_shared_memory("region", b"aGFuZGxl", 0, 100),
        client.get_cuda_shared_memory_status,
        client.unregister_cuda_shared_memory,
    ):
        with raises_status("UNIMPLEMENTED", "use system shared memory"):
            call()


def objects():
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith("aqt-client")}


def test_our_client_puts_tensors_there_and_reads_them(server, repository):
    before = objects()
    with (
        aqt_client.Client(server.address) as client,
        client.shared_memory(PAGE) as memory,
    ):
        assert objects() == before  # nothing is left if this process is killed
        x, y = memory.put(jnp.asarray(X)), memory.empty((8, CLASSES), np.float32)
        result = client.infer(MODEL, {"x": x}, outputs={"y": y})
        assert_same_bits(result["y"], reference(repository / MODEL / "1", X))
        assert np.shares_memory(result["y"], y.array)
        assert not result["y"].flags.writeable
        # Written again where it is, and the answer in the message.
        x.array[...] = x_of(5, 2)
        found = client.infer(MODEL, {"x": x}, outputs={"y": None})["y"]
        assert_same_bits(found, reference(repository / MODEL / "1", x.array))
        (streamed,) = client.stream(MODEL, [{"x": x}], outputs={"y": y}, timeout_s=WAIT_S)
        assert_same_bits(streamed["y"], found)
        small = memory.empty((1, CLASSES), np.float32)
        with pytest.raises(aqt_client.InvalidRequest, match="give it a larger one"):
            client.infer(MODEL, {"x": x}, outputs={"y": small})
        with pytest.raises(ValueError, match="ask for more"):
            memory.empty((PAGE,), np.uint8)
        with pytest.raises(ValueError, match="send it in the message"):
            memory.put(["text"])
    with (
        aqt_client.Client(server.address) as client,
        pytest.raises(aqt_client.NotFound, match="no shared memory region"),
    ):
        client.infer(MODEL, {"x": x})
    assert_same_bits(y.array[:5], found)  # the memory is there while its arrays are


def test_our_asyncio_client_does_too(server, repository):
    async def ask():
        async with (
            aqt_client.AsyncClient(server.address) as client,
            client.shared_memory(PAGE) as memory,
        ):
            x, y = memory.put(X), memory.empty((5, CLASSES), np.float32)
            return await client.infer(MODEL, {"x": x}, outputs={"y": y})

    assert_same_bits(asyncio.run(ask())["y"], reference(repository / MODEL / "1", X))
