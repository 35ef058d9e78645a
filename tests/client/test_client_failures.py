"""How calls of both clients fail, and which failures are repeated, against a fake server."""

import pickle
import time

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

import aqt_client
from aqt_client import _calls
from client.connecting import BOTH
from client.fake_server import BOUND_S, FakeServer

QUICK = aqt_client.RetryPolicy(initial_backoff_s=0.001, max_backoff_s=0.002)
UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "the model is being loaded")
STOPPING = (grpc.StatusCode.CANCELLED, "the server stops")
OVERLOADED = (grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
X = np.arange(6, dtype=np.float32).reshape(2, 3)


@BOTH
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, aqt_client.InvalidRequest),
        (grpc.StatusCode.INVALID_ARGUMENT, ValueError),
        (grpc.StatusCode.OUT_OF_RANGE, aqt_client.InvalidRequest),
        (grpc.StatusCode.NOT_FOUND, aqt_client.NotFound),
        (grpc.StatusCode.UNAUTHENTICATED, aqt_client.AccessDenied),
        (grpc.StatusCode.PERMISSION_DENIED, aqt_client.AccessDenied),
        (grpc.StatusCode.DEADLINE_EXCEEDED, aqt_client.DeadlineExceeded),
        (grpc.StatusCode.DEADLINE_EXCEEDED, TimeoutError),
        (grpc.StatusCode.INTERNAL, aqt_client.ServerError),
        (grpc.StatusCode.UNIMPLEMENTED, aqt_client.ServerError),
        (grpc.StatusCode.FAILED_PRECONDITION, aqt_client.ServerError),
    ],
)
def test_other_failures_are_not_repeated(server, connect, code, kind):
    server.script.append((code, "a sentence of the server"))
    with connect(server.address, retry=QUICK) as client:
        with pytest.raises(kind, match="a sentence of the server") as caught:
            client.infer("identity", {"x": X})
        assert isinstance(caught.value, aqt_client.ClientError)
        assert caught.value.code is code
        assert len(server.calls) == 1
        assert client.infer("identity", {"x": X}).exact


@BOTH
def test_unavailable_stopping_and_overloaded_are_repeated(server, connect):
    server.script.extend([UNAVAILABLE, STOPPING, OVERLOADED, STOPPING])
    with connect(server.address, retry=QUICK) as client:
        assert client.infer("identity", {"x": X})["x"].tobytes() == X.tobytes()
    assert len({c.request.SerializeToString() for c in server.calls}) == 1
    assert len(server.calls) == 5


@BOTH
@pytest.mark.parametrize("side", ["SERVER", "CLIENT"])
def test_a_message_too_large_is_not_repeated(server, connect, side):
    server.script.append(
        (grpc.StatusCode.RESOURCE_EXHAUSTED, f"{side}: Received message larger than max (9 vs. 8)")
    )
    with (
        connect(server.address, retry=QUICK) as client,
        pytest.raises(aqt_client.MessageTooLarge, match=r"9 vs\. 8"),
    ):
        client.infer("identity", {"x": X})
    assert len(server.calls) == 1


@BOTH
def test_grpc_itself_says_that_a_message_is_too_large(connect):
    with FakeServer(max_request_nbytes=1000) as server, connect(server.address) as client:
        with pytest.raises(aqt_client.MessageTooLarge):
            client.infer("identity", {"x": np.zeros(1000)})
        assert client.infer("identity", {"x": X}).exact


@BOTH
@pytest.mark.parametrize(
    ("last", "kind"),
    [
        (UNAVAILABLE, aqt_client.Unavailable),
        (STOPPING, aqt_client.Unavailable),
        (OVERLOADED, aqt_client.Overloaded),
    ],
)
def test_the_last_error_is_what_the_caller_sees(server, connect, last, kind):
    server.script.extend([OVERLOADED, UNAVAILABLE, last, UNAVAILABLE])
    policy = aqt_client.RetryPolicy(max_attempts=3, initial_backoff_s=0.001)
    with connect(server.address, retry=policy) as client:
        with pytest.raises(kind, match=last[1]) as caught:
            client.infer("identity", {"x": X})
        assert caught.value.code is last[0]
    assert len(server.calls) == 3


@BOTH
def test_a_wait_that_would_pass_the_deadline_is_not_begun(server, connect, monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: high)  # the longest wait there can be
    server.script.extend([UNAVAILABLE] * 2)
    policy = aqt_client.RetryPolicy(initial_backoff_s=2 * BOUND_S, max_backoff_s=2 * BOUND_S)
    with (
        connect(server.address, timeout_s=BOUND_S, retry=policy) as client,
        pytest.raises(aqt_client.Unavailable),
    ):
        client.infer("identity", {"x": X})
    assert len(server.calls) == 1


def told_to_wait(seconds):
    """An overload that says when to come again."""
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(round(seconds * 1e3))
    status = status_pb2.Status(code=OVERLOADED[0].value[0], message=OVERLOADED[1])
    status.details.add().Pack(info)
    return (*OVERLOADED, ("grpc-status-details-bin", status.SerializeToString()))


@BOTH
def test_it_comes_again_when_the_server_says(server, connect, monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)
    server.script.append(told_to_wait(0.25))
    with connect(server.address, timeout_s=BOUND_S, retry=QUICK) as client:
        began = time.monotonic()
        assert client.infer("identity", {"x": X}).exact
        assert time.monotonic() - began >= 0.25
        # Not where the answer would come too late.
        server.script.append(told_to_wait(2 * BOUND_S))
        with pytest.raises(aqt_client.Overloaded, match="the queue is full") as caught:
            client.infer("identity", {"x": X})
        assert caught.value.retry_s == 2 * BOUND_S
    assert len(server.calls) == 3


def test_details_that_make_no_sense_are_no_wait(server):
    server.script.append((*OVERLOADED, ("grpc-status-details-bin", b"\xff\xff")))
    with aqt_client.Client(server.address, retry=QUICK) as client:
        assert client.infer("identity", {"x": X}).exact


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan")])
@BOTH
def test_a_timeout_is_positive(server, connect, timeout_s):
    with (
        connect(server.address) as client,
        pytest.raises(ValueError, match="`timeout_s` must be positive"),
    ):
        client.infer("identity", {"x": X}, timeout_s=timeout_s)
    assert server.calls == []


@pytest.mark.parametrize("field", ["max_attempts", "initial_backoff_s", "max_backoff_s"])
def test_a_retry_policy_is_checked(field):
    with pytest.raises(ValueError, match=f"`{field}` must"):
        aqt_client.RetryPolicy(**{field: -1})


def test_the_backoff_grows_to_its_maximum(monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    policy = aqt_client.RetryPolicy(initial_backoff_s=0.5, max_backoff_s=3.0)
    wait = _calls.retry_arguments(policy, _calls.Deadline(1.0))["wait"]

    class State:
        attempt_number = 0
        outcome = None

    waits = []
    for State.attempt_number in range(1, 6):
        waits.append(wait(State))
    assert waits == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_an_error_survives_pickling():
    error = aqt_client.NotFound("no model 'm'", code=grpc.StatusCode.NOT_FOUND, retry_s=1.5)
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found)) == (type(error), str(error))
    assert (found.code, found.retry_s) == (error.code, error.retry_s)
