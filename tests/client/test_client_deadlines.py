"""Deadlines of both clients, against a fake server; each test waits until one has passed."""

import socket

import grpc
import numpy as np
import pytest

import aqt_client
from client.connecting import BOTH
from client.fake_server import BOUND_S, HANG, FakeServer

pytestmark = pytest.mark.slow

QUICK = aqt_client.RetryPolicy(initial_backoff_s=0.001, max_backoff_s=0.002)
ENDLESS = aqt_client.RetryPolicy(max_attempts=10**9, initial_backoff_s=0.01, max_backoff_s=0.05)
UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "the model is being loaded")
OVERLOADED = (grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
X = np.arange(6, dtype=np.float32).reshape(2, 3)


@BOTH
def test_one_deadline_covers_all_attempts(server, connect, monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    server.script.extend([UNAVAILABLE, OVERLOADED, UNAVAILABLE])
    policy = aqt_client.RetryPolicy(initial_backoff_s=0.1)
    with connect(server.address, timeout_s=BOUND_S, retry=policy) as client:
        client.infer("identity", {"x": X}, timeout_s=5.0)
    waited = 0.1 + 0.2 + 0.4
    rounding = 0.2  # of a deadline on its way through gRPC
    assert server.calls[0].remaining_s <= 5.0 + rounding
    assert server.calls[3].remaining_s <= 5.0 - waited + rounding


@BOTH
@pytest.mark.parametrize("end", [[UNAVAILABLE] * 100_000, [HANG]])
def test_the_deadline_ends_the_attempts(server, connect, end):
    with connect(server.address, timeout_s=BOUND_S, retry=ENDLESS) as client:
        assert client.is_live()  # connects, so that the time below is for attempts only
        server.script.extend([UNAVAILABLE, *end])
        with pytest.raises(aqt_client.Unavailable, match="the model is being loaded"):
            client.infer("identity", {"x": X}, timeout_s=1.0)
    assert 1 < len(server.calls) < 100_000


@BOTH
def test_no_answer_in_time(server, connect):
    server.script.append(HANG)
    with (
        connect(server.address, retry=QUICK) as client,
        pytest.raises(aqt_client.DeadlineExceeded, match=r"no answer within 0\.7 s"),
    ):
        client.infer("identity", {"x": X}, timeout_s=0.7)
    assert server.abandoned.wait(BOUND_S)
    assert len(server.calls) == 1


@BOTH
def test_a_server_that_comes_up_late_is_found(connect):
    with socket.socket() as reserved:  # bound and not listening: the port is ours, and refuses
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        with connect(f"127.0.0.1:{port}", timeout_s=BOUND_S, retry=ENDLESS) as client:
            with pytest.raises(aqt_client.Unavailable, match="Connection refused") as caught:
                client.infer("identity", {"x": X}, timeout_s=1.0)
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE
            with FakeServer(port=port):
                assert client.infer("identity", {"x": X}).exact
