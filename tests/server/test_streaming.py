"""ModelStreamInfer against a real server: order, errors that end one request, and cancellation."""

import asyncio
import itertools
import queue
import threading

import grpc
import jax.numpy as jnp
import numpy as np
import pytest
import tritonclient.grpc as stock
import tritonclient.grpc.aio as stock_aio

import aqt_client
from aqt_protos import open_inference_pb2_grpc as pb_grpc
from aqt_server.streaming import IN_FLIGHT, answer_in_order
from bundles import reference
from engine.contractions import assert_same_bits
from server.messages import MODEL, raises_status, request_of, stock_input, x_of
from server_process import WAIT_S, serving

pytestmark = pytest.mark.slow


def check(response, x, repository):
    found = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(len(x), -1)
    assert_same_bits(found, reference(repository / MODEL / "1", x))


def test_responses_come_in_the_order_of_requests_with_the_bits_of_training(stub, repository):
    # So few rows that what is under way fits into the queue, however slow the machine is.
    xs = [x_of(1 + seed % 10, seed) for seed in range(3 * IN_FLIGHT)]
    requests = (request_of(x, id=str(i)) for i, x in enumerate(xs))
    responses = list(stub.ModelStreamInfer(requests, timeout=WAIT_S))
    assert [r.infer_response.id for r in responses] == [str(i) for i in range(len(xs))]
    for response, x in zip(responses, xs, strict=True):
        assert not response.error_message
        assert response.infer_response.parameters["aqt_exact"].bool_param
        assert response.infer_response.parameters["triton_final_response"].bool_param
        check(response.infer_response, x, repository)


def test_our_client_streams_what_jax_computed(server, repository):
    xs = [x_of(1 + seed % 10, seed) for seed in range(20)]
    with aqt_client.Client(server.address) as client:
        answers = client.stream(MODEL, ({"x": jnp.asarray(x)} for x in xs), timeout_s=WAIT_S)
        for answer, x in zip(answers, xs, strict=True):
            assert answer.exact
            assert_same_bits(answer["y"], reference(repository / MODEL / "1", x))


def test_a_wrong_request_gets_its_error_and_the_stream_lives_on(stub, repository):
    x = x_of(3)
    wrong = request_of(x, id="wrong")
    wrong.inputs[0].datatype = "FP64"
    unknown = request_of(x, id="unknown", model_name="nope")
    requests = [request_of(x, id="a"), wrong, unknown, request_of(x, id="b")]
    found = list(stub.ModelStreamInfer(iter(requests), timeout=WAIT_S))
    assert [r.infer_response.id for r in found] == ["a", "wrong", "unknown", "b"]
    assert "'FP64', and the model takes FP32" in found[1].error_message
    assert "no model 'nope'" in found[2].error_message
    statuses = [r.infer_response.parameters["aqt_status"].string_param for r in found[1:3]]
    assert statuses == ["INVALID_ARGUMENT", "NOT_FOUND"]
    check(found[3].infer_response, x, repository)


def test_an_empty_stream_ends(stub):
    assert list(stub.ModelStreamInfer(iter(()), timeout=WAIT_S)) == []


def test_the_stock_client_streams(server, repository):
    answers = queue.Queue()
    with stock.InferenceServerClient(server.address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for seed in range(20):
            client.async_stream_infer(MODEL, [stock_input(x_of(2, seed))], request_id=str(seed))
        client.async_stream_infer("nope", [stock_input(x_of(2))])
        client.async_stream_infer(MODEL, [stock_input(x_of(2))], request_id="last")
        found = [answers.get(timeout=WAIT_S) for _ in range(22)]
        client.stop_stream()
    for seed, (result, error) in enumerate(found[:20]):
        assert error is None
        assert result.get_response().id == str(seed)
        expected = reference(repository / MODEL / "1", x_of(2, seed))
        assert_same_bits(result.as_numpy("y"), expected)
    assert "no model 'nope'" in found[20][1].message()
    assert found[21][0].get_response().id == "last"


def test_the_stock_asyncio_client_streams(server, repository):
    async def requests():
        for seed in range(20):
            yield {
                "model_name": MODEL,
                "inputs": [stock_input(x_of(2, seed))],
                "request_id": str(seed),
            }

    async def main():
        async with stock_aio.InferenceServerClient(server.address) as client:
            return [answer async for answer in client.stream_infer(requests())]

    answers = asyncio.run(asyncio.wait_for(main(), WAIT_S))
    for seed, (result, error) in enumerate(answers):
        assert error is None
        assert result.get_response().id == str(seed)
        expected = reference(repository / MODEL / "1", x_of(2, seed))
        assert_same_bits(result.as_numpy("y"), expected)
    assert len(answers) == 20


def test_a_client_that_goes_away_leaves_the_server_working(server, repository):
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        endless = (request_of(x_of(40, seed)) for seed in itertools.count())
        call = stub.ModelStreamInfer(endless, timeout=WAIT_S)
        next(call)
        call.cancel()
        with raises_status("CANCELLED", "ancel"):
            list(call)
        x = x_of(3)
        check(stub.ModelInfer(request_of(x), timeout=WAIT_S), x, repository)
    assert "Traceback" not in server.log()


def test_a_stream_that_stands_open_does_not_hold_up_the_end(repository, tmp_path):
    done = threading.Event()

    def requests():
        yield request_of(x_of(2))
        done.wait(WAIT_S)

    with (
        serving(repository, log=tmp_path / "log") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call = pb_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(requests())
        assert not next(call).error_message
        assert server.terminate() == 0
        done.set()
        with pytest.raises(grpc.RpcError):
            next(call)
        assert "Traceback" not in server.log()


# What follows needs no server: the order and the bound alone, with answers that the test holds.


def run(test):
    asyncio.run(asyncio.wait_for(test(), WAIT_S))


class Held:
    """Answers that wait to be let go; counts those under way and those cancelled."""

    def __init__(self):
        self.futures = {}
        self.cancelled = []
        self.started = asyncio.Condition()

    async def __call__(self, number):
        async with self.started:
            self.futures[number] = asyncio.get_running_loop().create_future()
            self.started.notify_all()
        try:
            return await self.futures[number]
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise

    async def until_started(self, count):
        async with self.started:
            await self.started.wait_for(lambda: len(self.futures) >= count)


def test_no_more_than_the_bound_is_read_and_order_is_kept():
    async def main():
        held = Held()
        read, written = [], []

        async def requests():
            for number in range(3 * IN_FLIGHT):
                read.append(number)
                yield number

        async def write(response):
            written.append(response)

        whole = asyncio.create_task(answer_in_order(requests(), held, write))
        await held.until_started(IN_FLIGHT)
        # The last of them is done first, and has to wait for the others.
        for number in reversed(range(1, IN_FLIGHT)):
            held.futures[number].set_result(number)
        for _ in range(10):
            await asyncio.sleep(0)
        assert (len(read), written) == (IN_FLIGHT, [])
        held.futures[0].set_result(0)
        await held.until_started(2 * IN_FLIGHT)
        assert written == list(range(IN_FLIGHT))
        assert len(read) == 2 * IN_FLIGHT
        for number in range(IN_FLIGHT, 3 * IN_FLIGHT):
            await held.until_started(number + 1)
            held.futures[number].set_result(number)
        await whole
        assert written == list(range(3 * IN_FLIGHT))

    run(main)


def test_cancelled_it_cancels_what_is_under_way():
    async def main():
        held = Held()

        async def requests():
            for number in range(3):
                yield number
            await asyncio.Event().wait()

        async def write(response):
            raise AssertionError

        whole = asyncio.create_task(answer_in_order(requests(), held, write))
        await held.until_started(3)
        whole.cancel()
        with pytest.raises(asyncio.CancelledError):
            await whole
        assert sorted(held.cancelled) == [0, 1, 2]

    run(main)
