"""Clients of several servers: calls go round, and a server that dies fails none of them."""

import asyncio
import contextlib

import pytest

import aqt_client
from aqt_client._connection import channel_arguments
from bundles import reference, write_linear
from client.connecting import BOTH
from client.fake_server import FakeServer
from engine.contractions import assert_same_bits
from server.messages import MODEL, x_of
from server_process import serving


def test_several_addresses_are_one_target():
    assert channel_arguments("localhost:1")[0] == "localhost:1"
    assert channel_arguments(["dns:///replicas:1"])[0] == "dns:///replicas:1"
    target, options = channel_arguments(["127.0.0.1:1", "localhost:2", "127.0.0.1:1"])
    assert target == "ipv4:127.0.0.1:1,127.0.0.1:2"
    assert dict(options)["grpc.default_authority"] == "127.0.0.1"
    assert channel_arguments(["[::1]:1", "[::1]:2"])[0] == "ipv6:[::1]:1,[::1]:2"


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ([], "`address` is empty"),
        (["127.0.0.1:1", "127.0.0.1"], "'127.0.0.1', which is no 'host:port'"),
        (["127.0.0.1:1", "no such host:1"], "'no such host:1', which is no 'host:port'"),
        (["127.0.0.1:1", "[::1]:1"], "both IPv4 and IPv6"),
    ],
)
def test_addresses_that_are_wrong_are_named(address, sentence):
    with pytest.raises(ValueError, match=sentence):
        aqt_client.Client(address)


@BOTH
def test_calls_go_round(connect):
    with FakeServer() as one, FakeServer() as other:
        with connect([one.address, other.address]) as client:
            # At first one of them may not be connected yet.
            for _ in range(1000):
                assert client.is_live()
                if one.calls and other.calls:
                    break
            before = len(one.calls), len(other.calls)
            for _ in range(6):
                assert client.is_live()
        assert (len(one.calls), len(other.calls)) == (before[0] + 3, before[1] + 3)


@BOTH
def test_a_server_that_loads_or_stops_gets_no_call(connect):
    with FakeServer() as one, FakeServer(serving=False) as other:
        with connect([one.address, other.address]) as client:
            for _ in range(20):
                assert client.is_live()
        assert (len(one.calls), len(other.calls)) == (20, 0)


@pytest.mark.slow
def test_a_server_that_is_killed_under_load_fails_no_call(tmp_path):
    root = tmp_path / "repository"
    write_linear(root / MODEL / "1")
    requests = [x_of(rows, seed=rows) for rows in range(1, 8)]
    expected = [reference(root / MODEL / "1", x) for x in requests]

    async def load(client, kill):
        answered = 0

        async def ask(start):
            nonlocal answered
            for i in range(start, start + 100):
                result = await client.infer(MODEL, {"x": requests[i % 7]})
                assert_same_bits(result["y"], expected[i % 7])
                answered += 1
                if answered == 300:
                    kill()

        await asyncio.gather(*map(ask, range(8)))
        return answered

    async def main(addresses, kill):
        async with aqt_client.AsyncClient(addresses) as client:
            return await load(client, kill)

    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(serving(root, log=tmp_path / f"log{i}")) for i in range(2)]
        addresses = [server.address for server in servers]
        assert asyncio.run(main(addresses, servers[0].kill)) == 800
        assert servers[0].process.poll() is not None
        # One that was never there is left out too.
        with aqt_client.Client(addresses) as client:
            for x, y in zip(requests, expected, strict=True):
                assert_same_bits(client.infer(MODEL, {"x": x})["y"], y)
