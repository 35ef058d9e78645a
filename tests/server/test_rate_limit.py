"""Clients that call too often, and queues that are full: refused, and told when to come again."""

import urllib.error
import urllib.request

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from aqt_protos import open_inference_pb2 as pb
from aqt_protos import open_inference_pb2_grpc as pb_grpc
from aqt_server.call import Call
from aqt_server.errors import Overloaded
from aqt_server.rate_limit import RateLimiter
from aqt_server.security.authentication import Principal
from aqt_server.statistics import Statistics, Times
from bundles import write_linear
from server.messages import MODEL, request_of, x_of
from server.odd_bundles import STALL, write_stalling
from server_process import WAIT_S, eventually, serving


def call(name="", peer="ipv4:10.0.0.1:5"):
    return Call(principal=Principal(name), peer=peer, remaining_s=None, headers={})


def allowed(limiter, one):
    try:
        limiter.check(one)
    except Overloaded:
        return False
    return True


@given(st.floats(0.1, 50), st.integers(1, 20), st.lists(st.floats(0, 3), max_size=60))
def test_no_more_than_the_burst_and_the_rate_and_the_time_told_is_enough(per_s, burst, waits):
    now = [0.0]
    limiter = RateLimiter(per_s, burst, clock=lambda: now[0])
    taken = 0
    for wait in waits:
        now[0] += wait
        taken += allowed(limiter, call("a"))
        assert taken <= burst + now[0] * per_s + 1e-6
    while allowed(limiter, call("a")):
        pass
    with pytest.raises(Overloaded) as raised:
        limiter.check(call("a"))
    now[0] += raised.value.retry_s * 0.99
    assert not allowed(limiter, call("a"))
    now[0] += raised.value.retry_s * 0.02
    assert allowed(limiter, call("a"))


def test_a_client_is_a_principal_or_an_address():
    limiter = RateLimiter(1.0, 1, clock=lambda: 0.0)
    assert allowed(limiter, call())
    assert not allowed(limiter, call(peer="ipv4:10.0.0.1:6"))  # another connection of it
    assert not allowed(limiter, call(peer="10.0.0.1"))  # over HTTP
    assert allowed(limiter, call(peer="ipv4:10.0.0.2:5"))
    assert allowed(limiter, call("a"))
    assert not allowed(limiter, call("a", peer="ipv4:10.0.0.9:1"))
    assert allowed(limiter, call("b"))
    assert allowed(limiter, call("10.0.0.1"))


def test_clients_without_end_take_no_memory_without_end():
    limiter = RateLimiter(1.0, 1, clock=lambda: 0.0)
    for number in range(10_001):
        assert allowed(limiter, call(str(number)))
    assert allowed(limiter, call("0"))  # was forgotten
    assert not allowed(limiter, call("10000"))


def test_without_a_rate_nobody_is_refused():
    limiter = RateLimiter(None, 1)
    assert all(allowed(limiter, call()) for _ in range(10))


def test_how_long_a_queue_takes_is_told_by_the_pace_so_far():
    statistics = Statistics()
    assert statistics.expected_s(1000) == 0.01
    times = Times(queued=0, started=0, inputs_ready=0, computed=2 * 10**9, finished=2 * 10**9)
    statistics.batches[4].add(times)
    assert statistics.expected_s(6) == 3.0
    assert statistics.expected_s(1000) == 10.0


def told_to_wait(error):
    """Seconds, from the details of the status."""
    (detail,) = rpc_status.from_call(error).details
    info = error_details_pb2.RetryInfo()
    assert detail.Unpack(info)
    return info.retry_delay.ToNanoseconds() / 1e9


@pytest.mark.slow
def test_a_server_tells_when_to_come_again(tmp_path):
    root = tmp_path / "repository"
    write_linear(root / MODEL / "1")
    write_stalling(root / "stalling" / "1")
    flags = ("--http-port", "0", "--rate-per-s", "0.01", "--rate-burst", "3", "--queue-rows", "8")
    (tmp_path / "tokens").write_text('a = "a-token-of-somebody"\nb = "a-token-of-another-"\n')
    flags += ("--auth-tokens", str(tmp_path / "tokens"))
    a, b = ((("authorization", f"Bearer a-token-of-{n}"),) for n in ("somebody", "another-"))
    with (
        serving(root, *flags, log=tmp_path / "log") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(3):
            assert stub.ModelInfer(request_of(x_of(2)), metadata=a, timeout=WAIT_S).outputs
        with pytest.raises(grpc.RpcError, match=r"more than 0\.01 calls a second") as raised:
            stub.ModelInfer(request_of(x_of(2)), metadata=a, timeout=WAIT_S)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert 50 < told_to_wait(raised.value) <= 100
        # Health is no call, the other client is another, and both doors count as one.
        assert stub.ServerReady(pb.ServerReadyRequest(), metadata=a, timeout=WAIT_S).ready
        assert stub.ModelInfer(request_of(x_of(2)), metadata=b, timeout=WAIT_S).outputs
        request = urllib.request.Request(f"{server.http_url}/v2/models/{MODEL}")
        request.add_header("Authorization", a[0][1])
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=WAIT_S)
        with refused.value as answer:
            assert answer.code == 429
            assert 50 < int(answer.headers["Retry-After"]) <= 100


@pytest.mark.slow
def test_a_full_queue_tells_when_to_come_again(tmp_path):
    root = tmp_path / "repository"
    write_stalling(root / "stalling" / "1")
    flags = ("--queue-rows", "8", "--drain-s", "0.5")
    with (
        serving(root, *flags, log=tmp_path / "log") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        errors = []

        def is_full():
            x = np.full((5, 1), STALL, np.float32)
            future = stub.ModelInfer.future(request_of(x, model_name="stalling"), timeout=WAIT_S)
            calls.append(future)
            errors.extend(c.exception() for c in calls if c.done())
            return bool(errors)

        calls = []
        eventually(is_full)
        assert errors[0].code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "do not fit into the queue of 8" in errors[0].details()
        assert 0.01 <= told_to_wait(errors[0]) <= 10
