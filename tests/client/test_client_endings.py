"""How calls end that one of the two sides breaks off: closing, cancelling, a server that stops."""

import asyncio
import socket
import threading
import time
from concurrent import futures

import grpc
import numpy as np
import pytest

import aqt_client
from client.connecting import BOTH
from client.fake_server import BOUND_S, HANG, FakeServer

PATIENT = aqt_client.RetryPolicy(max_attempts=10**9, initial_backoff_s=0.01, max_backoff_s=0.05)
STOPPING = (grpc.StatusCode.CANCELLED, "the server stops")
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def await_call(server, count=1):
    end = time.monotonic() + BOUND_S
    while len(server.calls) < count:
        assert time.monotonic() < end, "no call has arrived"
        time.sleep(0.001)


def test_closing_ends_a_call_that_runs_and_does_not_repeat_it(server):
    server.script.append(HANG)
    with (
        futures.ThreadPoolExecutor() as pool,
        aqt_client.Client(server.address, timeout_s=BOUND_S, retry=PATIENT) as client,
    ):
        call = pool.submit(client.infer, "identity", {"x": X})
        await_call(server)
        client.close()
        with pytest.raises(aqt_client.ClientError, match="closed while the call ran") as caught:
            call.result(BOUND_S)
    assert caught.value.code is grpc.StatusCode.CANCELLED
    assert not isinstance(caught.value, aqt_client.Unavailable)
    assert server.abandoned.wait(BOUND_S)
    assert len(server.calls) == 1


def test_closing_cancels_the_tasks_that_await_a_call(server):
    async def main():
        client = aqt_client.AsyncClient(server.address, timeout_s=BOUND_S, retry=PATIENT)
        server.script.append(HANG)
        task = asyncio.create_task(client.infer("identity", {"x": X}))
        await asyncio.to_thread(await_call, server)
        await client.close()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(main(), BOUND_S))
    assert server.abandoned.wait(BOUND_S)
    assert len(server.calls) == 1


def test_a_task_cancelled_between_two_attempts_makes_no_other(server, monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: high)  # the longest wait there can be

    async def main():
        policy = aqt_client.RetryPolicy(initial_backoff_s=BOUND_S, max_backoff_s=BOUND_S)
        async with aqt_client.AsyncClient(
            server.address, timeout_s=2 * BOUND_S, retry=policy
        ) as client:
            server.script.append(STOPPING)
            task = asyncio.create_task(client.infer("identity", {"x": X}))
            await asyncio.to_thread(await_call, server)
            # A later call is answered, so the first one has its answer too and waits.
            assert await client.is_live()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(asyncio.wait_for(main(), BOUND_S))
    assert [c.rpc for c in server.calls] == ["ModelInfer", "ServerLive"]


def test_a_timeout_of_asyncio_stays_one(server):
    async def main():
        async with aqt_client.AsyncClient(server.address, timeout_s=BOUND_S) as client:
            server.script.append(HANG)
            now = asyncio.get_running_loop().time
            async with asyncio.timeout(None) as limit:
                arrival = asyncio.create_task(asyncio.to_thread(await_call, server))
                arrival.add_done_callback(lambda _: limit.reschedule(now()))
                await client.infer("identity", {"x": X})

    with pytest.raises(TimeoutError) as caught:
        asyncio.run(main())
    assert not isinstance(caught.value, aqt_client.ClientError)
    assert server.abandoned.wait(BOUND_S)


@BOTH
def test_a_server_that_restarts_in_the_middle_of_a_call(connect):
    with socket.socket() as reserved:  # keeps the port ours between the two servers
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        first, second = FakeServer(port=port), None
        first.script.append(HANG)

        def restart():
            nonlocal second
            await_call(first)
            first.stop()
            second = FakeServer(port=port).__enter__()

        with first, connect(f"127.0.0.1:{port}", timeout_s=BOUND_S, retry=PATIENT) as client:
            restarting = threading.Thread(target=restart)
            restarting.start()
            assert client.infer("identity", {"x": X})["x"].tobytes() == X.tobytes()
            restarting.join(BOUND_S)
        assert [c.rpc for c in second.calls] == ["ModelInfer"]
        second.stop()
