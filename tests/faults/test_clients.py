"""Clients that stall, vanish, flood and send garbage, on both doors: others are answered meanwhile.

`make faults` opens 10,000 connections; here there are a few hundred.
"""

import contextlib
import json
import random
import resource
import socket
import struct
import urllib.error
import urllib.request

import grpc
import numpy as np
import pytest

from aqt_client import Client
from aqt_protos import SERVICE_NAME
from aqt_protos import open_inference_pb2 as pb
from aqt_protos import open_inference_pb2_grpc as pb_grpc
from bundles import reference, write_linear
from faults.amount import amount
from server.messages import MODEL, raises_status, request_of, x_of
from server_process import WAIT_S, eventually, serving

pytestmark = pytest.mark.slow

CONNECTIONS = amount(200, 10_000)
"""That are allowed to each port, and a few more are tried."""
IDLE_S = amount(2.0, 60.0)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
X = x_of(3)


@pytest.fixture(scope="module", autouse=True)
def files_enough():
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("clients")
    write_linear(root / "repository" / MODEL / "1")
    flags = ("--max-connections", str(CONNECTIONS), "--idle-s", str(IDLE_S), "--http-port", "0")
    flags += ("--log-format", "json")
    with serving(root / "repository", *flags, log=root / "log") as running:
        running.expected = reference(root / "repository" / MODEL / "1", X)
        yield running
        assert running.process.poll() is None
        assert not any("exception" in record for record in records_of(running))


def records_of(server):
    """The lines of its log, each of which is a record."""
    records = [json.loads(line) for line in server.log().splitlines()]
    assert all(record.keys() >= {"time", "level", "logger", "message"} for record in records)
    return records


@pytest.fixture(scope="module")
def honest(server):
    """A client that was there before, which asserts that it is still answered, by both doors."""
    with Client(server.address, timeout_s=WAIT_S) as client:

        def ask():
            found = client.infer(MODEL, {"x": X})["y"]
            assert np.array_equal(found.view(np.uint32), server.expected.view(np.uint32))
            with urllib.request.urlopen(f"{server.http_url}/v2/health/ready", timeout=WAIT_S) as r:
                assert r.status == 200

        yield ask


def place(server, door):
    """Host and port of a door."""
    url = server.address if door == "grpc" else server.http_url.removeprefix("http://")
    host, _, port = url.rpartition(":")
    return host, int(port)


def open_socket(server, door):
    return socket.create_connection(place(server, door), timeout=WAIT_S)


def reset(connection):
    """Vanishes without a word: the other side gets RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def until_closed(connection):
    """What the server said before it closed the connection, within the wait that is allowed."""
    said = b""
    with connection, contextlib.suppress(ConnectionError):
        while got := connection.recv(2**16):
            said += got
    return said


def frame(kind, flags, stream, payload):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


STALLS = {
    "grpc": [b"", PREFACE[:10], PREFACE + SETTINGS, PREFACE + SETTINGS + b"\x00\x40\x00\x00\x00"],
    "http": [
        b"",
        b"POST /v2/models/linear/in",
        b"POST /v2/models/linear/infer HTTP/1.1\r\nHost: a\r\nContent-Le",
    ],
}


def test_who_stalls_is_closed_and_others_are_answered(server, honest):
    stalled = []
    for door, beginnings in STALLS.items():
        for beginning in beginnings:
            stalled.append(open_socket(server, door))
            stalled[-1].sendall(beginning)
    honest()
    for connection in stalled:
        until_closed(connection)
    honest()


def test_who_vanishes_in_the_middle_takes_nothing_along(server, honest):
    body = request_of(X).SerializeToString()
    begun = {
        "http": b"POST /v2/models/linear/infer HTTP/1.1\r\nHost: a\r\n"
        b"Content-Length: 1000\r\n\r\n{",
        "grpc": PREFACE + SETTINGS + frame(0, 0, 1, body[:10]),
    }
    for door, sent in begun.items():
        for _ in range(20):
            connection = open_socket(server, door)
            connection.sendall(sent)
            reset(connection)
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(20):
            stub.ModelInfer.future(request_of(x_of(500))).cancel()
            stub.ModelStreamInfer(iter([request_of(X)] * 9)).cancel()
    honest()


@pytest.mark.parametrize("door", ["grpc", "http"])
def test_garbage_is_refused_and_hurts_nobody(server, honest, door):
    rng = random.Random(0)
    for i in range(amount(60, 5000)):
        noise = rng.randbytes(rng.randint(1, 400))
        if door == "grpc":
            frames = [
                frame(rng.randrange(12), rng.randrange(256), rng.randrange(6), rng.randbytes(n))
                for n in (rng.randrange(40), rng.randrange(20))
            ]
            sent = [noise, PREFACE + noise, PREFACE + SETTINGS + b"".join(frames)][i % 3]
        else:
            head = b"POST /v2/models/linear/infer HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
            length = b"Content-Length: %d\r\n\r\n" % len(noise)
            sent = [noise, head + noise + b"\r\n\r\n", head + length + noise][i % 3]
        with open_socket(server, door) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            said = until_closed(connection)
            assert b" 200 OK" not in said
            assert b" 500 " not in said
        if i % 20 == 0:
            honest()
    honest()


def test_what_a_client_sends_is_in_no_line_of_the_log(server, honest):
    """gRPC, left to itself, writes there with which words a client says goodbye."""
    goodbye = frame(7, 0, 0, struct.pack(">II", 0, 2**31) + b"\xff\xfe\n\x1b[2J")
    with open_socket(server, "grpc") as connection:
        connection.sendall(PREFACE + SETTINGS + goodbye)
        connection.shutdown(socket.SHUT_WR)
        until_closed(connection)
    honest()
    assert records_of(server)


def test_garbage_in_well_made_calls_gets_a_status(server, honest):
    """Damaged messages to every RPC; in a stream, each of them alone fails."""
    rng = random.Random(1)
    whole = request_of(X).SerializeToString()
    rpcs = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    wrong = "the request is no message inference."
    with grpc.insecure_channel(server.address) as channel:
        for name in rpcs:
            if name != "ModelStreamInfer":
                with raises_status("INVALID_ARGUMENT", wrong):
                    channel.unary_unary(f"/{SERVICE_NAME}/{name}")(b"\xff\xff", timeout=WAIT_S)
        call = channel.unary_unary(f"/{SERVICE_NAME}/ModelInfer")
        for _ in range(amount(200, 20_000)):
            damaged = bytearray(whole)
            for _ in range(rng.randint(1, 8)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            sent = bytes(damaged[: rng.randint(1, len(damaged))])
            answered = call.future(sent, timeout=WAIT_S)
            assert answered.code().name in ("OK", "INVALID_ARGUMENT", "NOT_FOUND"), answered
        stream = channel.stream_stream(
            f"/{SERVICE_NAME}/ModelStreamInfer",
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )
        bad, good = stream(iter([b"\xff\xff", whole]), timeout=WAIT_S)
        assert bad.error_message.startswith(wrong)
        assert bad.infer_response.parameters["aqt_status"].string_param == "INVALID_ARGUMENT"
        assert good.infer_response.outputs
    honest()


def crowd(server, door, count):
    """So many connections that have begun to ask for something."""
    beginning = PREFACE + SETTINGS if door == "grpc" else b"GET /v2/health/live HTTP/1.1\r\n"
    made = []
    for _ in range(count):
        made.append(open_socket(server, door))
        with contextlib.suppress(ConnectionError):
            made[-1].sendall(beginning)
    return made


def closed_by_server(connection):
    """Whether the server has closed it; what it said before is read and forgotten."""
    connection.setblocking(False)
    try:
        while connection.recv(2**16):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize("door", ["grpc", "http"])
@pytest.mark.timeout(600)
def test_a_crowd_is_bounded_and_leaves_room(server, honest, door):
    with contextlib.ExitStack() as held:
        inside = [held.enter_context(c) for c in crowd(server, door, CONNECTIONS - 20)]
        honest()
        beyond = [held.enter_context(c) for c in crowd(server, door, 60)]
        # Those that the server has room for are open, and the rest is refused as it comes.
        eventually(lambda: sum(map(closed_by_server, beyond)) >= 40)
        assert CONNECTIONS < 1000 or not any(map(closed_by_server, inside))
    eventually(lambda: _answered(honest))


def _answered(honest):
    try:
        honest()
    except urllib.error.URLError:
        return False
    return True
