"""The fast door answers as the other door of gRPC does, to stock clients and under load."""

import asyncio
import time

import grpc
import numpy as np
import pytest
import tritonclient.grpc as stock
from grpc_health.v1 import health_pb2, health_pb2_grpc

import forked
from aqt_client import AsyncClient, Client
from aqt_protos import SERVICE_NAME
from aqt_protos import open_inference_pb2 as pb
from aqt_protos import open_inference_pb2_grpc as pb_grpc
from bundles import reference, write_linear
from compiled_door import compiled_door
from server.messages import MODEL, raises_status, request_of, stock_input, x_of
from server_process import WAIT_S, serving

pytestmark = pytest.mark.slow

FLAGS = ("--max-message-bytes", "2000000", "--queue-rows", "100000", "--rate-per-s", "100000")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    compiled_door()
    root = tmp_path_factory.mktemp("fast") / "repository"
    write_linear(root / MODEL / "1")
    return root


@pytest.fixture(scope="module")
def server(repository):
    log = repository.parent / "log"
    with serving(repository, "--fast-port", "0", *FLAGS, log=log) as running:
        yield running


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(server.fast_address) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)


def test_a_stock_client_gets_the_bits_of_training(server, repository):
    x = x_of(5)
    with stock.InferenceServerClient(server.fast_address) as client:
        assert client.is_server_ready()
        assert client.get_model_metadata(MODEL).inputs[0].name == "x"
        answer = client.infer(MODEL, [stock_input(x)], request_id="seven")
    assert answer.as_numpy("y").tobytes() == reference(repository / MODEL / "1", x).tobytes()
    assert answer.get_response().id == "seven"


def test_both_doors_answer_the_same(server, stub):
    with grpc.insecure_channel(server.address) as channel:
        other = pb_grpc.GRPCInferenceServiceStub(channel)
        for rpc, request in (
            ("ModelInfer", request_of(x_of(3), id="a")),
            ("ServerMetadata", pb.ServerMetadataRequest()),
            ("ModelConfig", pb.ModelConfigRequest(name=MODEL)),
            ("RepositoryIndex", pb.RepositoryIndexRequest()),
        ):
            answers = [getattr(s, rpc)(request, timeout=WAIT_S) for s in (stub, other)]
            assert answers[0] == answers[1]


def test_probes_ask_for_health_as_on_the_other_door(server):
    for address in (server.fast_address, server.address):
        with grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ("", SERVICE_NAME):
                asked = health_pb2.HealthCheckRequest(service=service)
                found = stub.Check(asked, timeout=WAIT_S)
                assert found.status == health_pb2.HealthCheckResponse.SERVING
            with raises_status("NOT_FOUND", ".*"):
                stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=WAIT_S)


def test_many_connections_and_calls_each_get_their_own_answer(server, repository):
    xs = [x_of(1 + seed % 7, seed) for seed in range(200)]
    expected = reference(repository / MODEL / "1", np.concatenate(xs))
    parts = np.split(expected, np.cumsum([len(x) for x in xs])[:-1])

    async def ask():
        clients = [AsyncClient(server.fast_address) for _ in range(4)]
        calls = [clients[i % 4].infer(MODEL, {"x": x}) for i, x in enumerate(xs)]
        answers = await asyncio.gather(*calls)
        for client in clients:
            await client.close()
        return answers

    for answer, part in zip(asyncio.run(ask()), parts, strict=True):
        assert answer["y"].tobytes() == part.tobytes()


def test_a_message_of_many_frames_and_windows(server, repository):
    x = x_of(80_000)
    with Client(server.fast_address, timeout_s=WAIT_S) as client:
        answer = client.infer(MODEL, {"x": x})["y"]
    assert answer.tobytes() == reference(repository / MODEL / "1", x).tobytes()


def test_errors_have_the_status_and_sentence_of_the_other_door(stub):
    with raises_status("NOT_FOUND", "no model 'other'"):
        stub.ModelInfer(request_of(x_of(1), model_name="other"), timeout=WAIT_S)
    with raises_status("INVALID_ARGUMENT", "given twice"):
        request = request_of(x_of(1))
        request.inputs.add(name="x", datatype="FP32")
        stub.ModelInfer(request, timeout=WAIT_S)
    with raises_status("RESOURCE_EXHAUSTED", "larger than max"):
        stub.ModelInfer(request_of(x_of(1), id="x" * 4_000_000), timeout=WAIT_S)
    with raises_status("UNIMPLEMENTED", "ModelStreamInfer"):
        list(stub.ModelStreamInfer(iter([request_of(x_of(1))]), timeout=WAIT_S))


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
def test_packed_messages(server, packing):
    x = x_of(2)
    large = [stock_input(x_of(2**20))]
    for address in (server.fast_address, server.address):
        with stock.InferenceServerClient(address) as client:
            packed = client.infer(MODEL, [stock_input(x)], compression_algorithm=packing)
            plain = client.infer(MODEL, [stock_input(x)])
            assert packed.get_response() == plain.get_response()
            # By what comes out, as zeros pack well.
            large[0].set_data_from_numpy(np.zeros((2**20, x.shape[1]), np.float32))
            with raises_status("RESOURCE_EXHAUSTED", "larger than max"):
                client.infer(MODEL, large, compression_algorithm=packing)


def test_tokens_are_asked_for_and_how_often_is_limited(repository, tmp_path):
    (tmp_path / "tokens").write_text(f'someone = "{"t" * 32}"\n')
    flags = (
        "--fast-port",
        "0",
        "--auth-tokens",
        str(tmp_path / "tokens"),
        "--auth-exempt",
        "health",
    )
    flags += ("--rate-per-s", "0.001", "--rate-burst", "1")
    with (
        serving(repository, *flags, log=tmp_path / "log") as server,
        grpc.insecure_channel(server.fast_address) as channel,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        shown = (("authorization", f"Bearer {'t' * 32}"),)
        with raises_status("UNAUTHENTICATED", "who calls is not known"):
            stub.ModelInfer(request_of(x_of(1)), timeout=WAIT_S)
        probe = health_pb2_grpc.HealthStub(channel)
        assert probe.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S).status
        assert stub.ModelInfer(request_of(x_of(1)), timeout=WAIT_S, metadata=shown).outputs
        with raises_status("RESOURCE_EXHAUSTED", "calls a second"):
            stub.ModelInfer(request_of(x_of(1)), timeout=WAIT_S, metadata=shown)
        assert server.terminate() == 0


def test_a_taken_port_is_an_error(repository, server):
    taken = server.fast_address.rpartition(":")[2]
    flags = ("--port", "0", "--metrics-port", "-1", "--fast-port", taken)
    done = forked.aqt("serve", "--model-repository", repository, *flags)
    assert done.returncode
    assert f"cannot listen on 127.0.0.1:{taken}" in done.stderr


def test_what_was_accepted_is_answered_when_the_server_stops(repository, tmp_path):
    with (
        serving(repository, "--fast-port", "0", log=tmp_path / "log") as server,
        grpc.insecure_channel(server.fast_address) as channel,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        stub.ModelInfer(request_of(x_of(1)), timeout=WAIT_S)
        ended = []
        calls = []
        server.process.send_signal(15)
        end = time.monotonic() + WAIT_S
        while not ended and time.monotonic() < end:
            calls = [stub.ModelInfer.future(request_of(x_of(1)), timeout=WAIT_S) for _ in range(8)]
            codes = {call.exception() and call.exception().code() for call in calls}
            assert codes <= {None, grpc.StatusCode.UNAVAILABLE}
            ended = [code for code in codes if code]
        assert server.process.wait(WAIT_S) == 0
