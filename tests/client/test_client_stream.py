"""Many requests over one stream, by both clients, against a fake server."""

import asyncio
import contextlib
import threading

import grpc
import numpy as np
import pytest

import aqt_client
from client.fake_server import BOUND_S


def x_of(i):
    return {"x": np.full((1, 2), i, np.float32)}


def blocking(server, inputs, **arguments):
    with aqt_client.Client(server.address) as client:
        yield from client.stream("identity", inputs, timeout_s=BOUND_S, **arguments)


def awaiting(server, inputs, **arguments):
    """The same by the asyncio client, a step of the loop for each answer."""
    with asyncio.Runner() as runner:

        async def client():
            return aqt_client.AsyncClient(server.address)

        connected = runner.run(client())
        answers = connected.stream("identity", inputs, timeout_s=BOUND_S, **arguments)

        async def following():
            return await anext(answers, None)

        try:
            while (answer := runner.run(following())) is not None:
                yield answer
        finally:
            runner.run(answers.aclose())
            runner.run(connected.close())


BOTH = pytest.mark.parametrize("ask", [blocking, awaiting])


@BOTH
def test_answers_come_in_the_order_of_inputs(server, ask):
    answers = list(ask(server, map(x_of, range(20)), version="1", outputs=["x"]))
    assert [float(answer["x"][0, 0]) for answer in answers] == list(range(20))
    assert all(answer.exact for answer in answers)
    sent = [call.request for call in server.calls]
    assert {(r.model_name, r.model_version, r.outputs[0].name) for r in sent} == {
        ("identity", "1", "x")
    }


@BOTH
def test_one_that_fails_has_its_error_in_the_place_of_its_result(server, ask):
    server.failures = {1: ("it is wrong", "INVALID_ARGUMENT"), 2: ("it is odd", "")}
    first, wrong, odd, last = ask(server, map(x_of, range(4)))
    assert (float(first["x"][0, 0]), float(last["x"][0, 0])) == (0, 3)
    assert isinstance(wrong, aqt_client.InvalidRequest)
    assert (str(wrong), wrong.code) == ("it is wrong", grpc.StatusCode.INVALID_ARGUMENT)
    assert isinstance(odd, aqt_client.ServerError)
    assert odd.code is grpc.StatusCode.UNKNOWN


@BOTH
def test_what_the_inputs_raise_comes_after_the_answers_before_it(server, ask):
    def inputs():
        yield x_of(0)
        raise ArithmeticError("no more")

    answers = ask(server, inputs())
    assert float(next(answers)["x"][0, 0]) == 0
    with pytest.raises(ArithmeticError, match="no more"):
        next(answers)


@BOTH
def test_inputs_that_cannot_be_sent_are_named(server, ask):
    with pytest.raises(ValueError, match="input 'x' cannot be sent"):
        list(ask(server, [{"x": np.zeros(1, complex)}]))


@BOTH
def test_a_stream_that_the_server_ends_is_an_error(server, ask):
    server.script.extend([None, (grpc.StatusCode.UNAVAILABLE, "stopping")])
    # gRPC's asyncio loses the reason, and answers before it, where it was sending just then.
    match = "stopping" if ask is blocking else "stopping|ended the stream"
    with pytest.raises(aqt_client.Unavailable, match=match):
        list(ask(server, map(x_of, range(3))))


@BOTH
def test_who_leaves_cancels_the_rest(server, ask):
    left = threading.Event()

    def inputs():
        yield x_of(0)
        # No more until the caller has gone: then nobody takes it.
        left.wait(BOUND_S)

    with contextlib.closing(
        ask(server, inputs() if ask is blocking else one_and_no_end())
    ) as answers:
        next(answers)
    assert server.streams_ended.wait(BOUND_S)
    left.set()


async def one_and_no_end():
    yield x_of(0)
    await asyncio.Event().wait()


def test_a_client_with_several_addresses_has_no_shared_memory(server):
    with (
        aqt_client.Client([server.address]) as client,
        pytest.raises(ValueError, match="give it one 'host:port'"),
        client.shared_memory(64),
    ):
        pass
