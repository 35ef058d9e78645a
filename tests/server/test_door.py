"""The compiled door alone: what it hands over, its limits, and that garbage does not hurt it."""

import contextlib
import queue
import random
import select
import socket
import struct
import threading
import time

import grpc
import pytest

from compiled_door import compiled_door
from faults.amount import amount

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WAIT_S = 30
LIMITS = {
    "paths": ["/s/M", "/some.Service/Method"],
    "message_bytes": 100_000,
    "buffered_bytes": 400_000,
    "connections": 8,
    "calls": 16,
    "streams": 32,
    "header_bytes": 8192,
    "idle_s": 300.0,
}


@pytest.fixture(scope="module")
def door_class():
    compiled_door()
    from aqt_server._door import Door

    return Door


@contextlib.contextmanager
def opened(door_class, **limits):
    door = door_class("127.0.0.1", "0", **{**LIMITS, **limits})
    door.start()
    try:
        yield door
    finally:
        door.close(0.0)


def taken(door, calls=1, gone=0):
    """So many calls, and so many numbers of calls that are gone, as soon as they are there."""
    found, lost = [], []
    while len(found) < calls or len(lost) < gone:
        readable, _, _ = select.select([door], [], [], WAIT_S)
        assert readable, f"nothing came after {len(found)} calls and {len(lost)} gone"
        more, less = door.take()
        found += more
        lost += less
    return found, lost


@contextlib.contextmanager
def echoing(door):
    """A thread that answers every call with its own message."""
    ending = threading.Event()

    def echo():
        while not ending.is_set():
            if select.select([door], [], [], 0.05)[0]:
                door.answer([(call[0], 0, "", b"", call[6]) for call in door.take()[0]])

    thread = threading.Thread(target=echo)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join(WAIT_S)


@contextlib.contextmanager
def caller(door, path="/s/M"):
    with grpc.insecure_channel(f"127.0.0.1:{door.port()}") as channel:
        yield channel.unary_unary(path)


def frame(kind, flags, stream, payload):
    head = struct.pack(">I", len(payload))[1:] + bytes([kind, flags])
    return head + struct.pack(">I", stream) + payload


def headers(path=b"/s/M", *more):
    """A block of headers, each written out, as HPACK has it without its tables."""
    named = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path)]
    named += [(b":authority", b"a"), (b"content-type", b"application/grpc"), *more]
    lengths = b"\x00%c%s%c%s"
    return b"".join(lengths % (len(name), name, len(value), value) for name, value in named)


def call_of(stream, message=b"hello", *more):
    body = b"\0" + struct.pack(">I", len(message)) + message
    return frame(1, 4, stream, headers(b"/s/M", *more)) + frame(0, 1, stream, body)


def conversation(*parts):
    return PREFACE + frame(4, 0, 0, b"") + b"".join(parts)


@contextlib.contextmanager
def connected(door):
    with socket.create_connection(("127.0.0.1", door.port()), timeout=WAIT_S) as connection:
        yield connection


def until_answered(connection):
    """Reads frames until one ends a stream with headers, as an error does."""
    received = b""
    while True:
        while len(received) >= 9:
            size = int.from_bytes(received[:3], "big")
            if len(received) < 9 + size:
                break
            kind, flags, received = received[3], received[4], received[9 + size :]
            if kind == 1 and flags & 1:
                return
        part = connection.recv(65536)
        assert part, "the connection ended before the call did"
        received += part


def test_a_call_has_what_is_left_of_its_time_when_it_is_taken(door_class):
    def pass_s(seconds):
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            pass

    body = b"\0\0\0\0\x05hello"
    with opened(door_class) as door, connected(door) as connection:
        begun = frame(1, 4, 1, headers(b"/s/M", (b"grpc-timeout", b"5S")))
        connection.sendall(conversation(begun, frame(1, 5, 3, headers(b"/none"))))
        # What was sent after its headers is answered: they are there.
        until_answered(connection)
        pass_s(0.02)
        connection.sendall(frame(0, 1, 1, body))
        ((*_, timeout_s),), _ = taken(door)
        assert 0 < timeout_s <= 5 - 0.02
        connection.sendall(call_of(5, b"hello", (b"grpc-timeout", b"1m")))
        assert select.select([door], [], [], WAIT_S)[0]
        pass_s(0.001)
        ((*_, timeout_s),), _ = taken(door)
        assert timeout_s == 0


def test_a_call_is_handed_over_whole(door_class):
    with opened(door_class) as door, caller(door, "/some.Service/Method") as call:
        shown = (("x-key", "value"),)
        pending = call.future(b"question", metadata=shown, timeout=WAIT_S)
        ((number, path, block, peer, packed, packing, message, timeout_s),), _ = taken(door)
        assert (path, message, packed, packing) == ("/some.Service/Method", b"question", 0, "")
        assert b"x-key\0value\0" in block
        assert peer.startswith("ipv4:127.0.0.1:")
        assert 0 < timeout_s <= WAIT_S
        door.answer([(number, 0, "", b"", b"answer")])
        assert pending.result(WAIT_S) == b"answer"


def test_an_error_has_its_status_sentence_and_trailers(door_class):
    with opened(door_class) as door, caller(door) as call:
        pending = call.future(b"", timeout=WAIT_S)
        ((number, *_),), _ = taken(door)
        door.answer([(number, 5, "nicht da: 100 % ü", b"x-why\0because\0", b"")])
        error = pending.exception(WAIT_S)
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert error.details() == "nicht da: 100 % ü"
        assert ("x-why", "because") in error.trailing_metadata()


def test_who_hangs_up_is_told_of_and_answers_to_nobody_are_dropped(door_class):
    with opened(door_class) as door, caller(door) as call:
        pending = call.future(b"", timeout=WAIT_S)
        ((first, *_),), _ = taken(door)
        pending.cancel()
        assert taken(door, calls=0, gone=1)[1] == [first]
        with connected(door) as connection:
            connection.sendall(conversation(call_of(1)))
            ((second, *_),), _ = taken(door)
        assert taken(door, calls=0, gone=1)[1] == [second]
        door.answer([(n, 0, "", b"", b"late") for n in (first, second, 12345)])
        pending = call.future(b"", timeout=WAIT_S)
        ((third, *_),), _ = taken(door)
        door.answer([(third, 0, "", b"", b"in time")])
        assert pending.result(WAIT_S) == b"in time"


def test_calls_bytes_and_connections_are_bounded(door_class):
    with opened(door_class) as door, caller(door) as call:
        ended = queue.Queue()
        for _ in range(LIMITS["calls"] + 3):
            call.future(b"", timeout=WAIT_S).add_done_callback(ended.put)
        codes = [ended.get(timeout=WAIT_S).code() for _ in range(3)]
        assert codes == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 3
        numbers = [number for number, *_ in taken(door, calls=LIMITS["calls"])[0]]
        door.answer([(number, 0, "", b"", b"") for number in numbers])
        # Until they are sent they count, and a call that comes before would be refused.
        codes = {ended.get(timeout=WAIT_S).code() for _ in numbers}
        assert codes == {grpc.StatusCode.OK}
        with echoing(door):
            assert call(b"again", timeout=WAIT_S) == b"again"
            with pytest.raises(grpc.RpcError, match="larger than max"):
                call(b"x" * 100_001, timeout=WAIT_S)
            with pytest.raises(grpc.RpcError, match="bytes of headers"):
                call(b"", metadata=[("x-long", "y" * 8000)], timeout=WAIT_S)


def test_what_is_held_for_all_is_bounded(door_class):
    with opened(door_class) as door, contextlib.ExitStack() as stack:
        # Each sends most of a message, and no end of it.
        body = b"\0" + struct.pack(">I", 100_000) + b"x" * 90_000
        parts = [frame(0, 0, 1, body[i : i + 16_000]) for i in range(0, len(body), 16_000)]
        for _ in range(5):
            connection = stack.enter_context(connected(door))
            connection.sendall(conversation(frame(1, 4, 1, headers()), *parts))
        until_answered(connection)
        stack.close()
        with caller(door) as call, echoing(door):
            assert call(b"room again", timeout=WAIT_S, wait_for_ready=True) == b"room again"


def test_a_connection_too_many_is_closed(door_class):
    with opened(door_class, connections=2) as door, contextlib.ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(connected(door))
            connection.sendall(conversation())
            assert connection.recv(1)
        assert stack.enter_context(connected(door)).recv(1) == b""


def test_who_resets_without_end_is_cut_off(door_class):
    with opened(door_class) as door, connected(door) as connection, echoing(door):
        connection.sendall(conversation())
        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            flood(connection)


def flood(connection):
    """Makes calls and resets them, as fast as it can."""
    for stream in range(1, 20_001, 2):
        connection.sendall(call_of(stream) + frame(3, 0, stream, b"\0\0\0\x08"))
        while select.select([connection], [], [], 0)[0]:
            if not connection.recv(65536):
                raise BrokenPipeError("Broken pipe")


def test_the_end_of_the_door_answers_what_it_has(door_class):
    with opened(door_class) as door, caller(door) as call:
        pending = call.future(b"last", timeout=WAIT_S)
        ((number, *_),), _ = taken(door)
        ending = threading.Thread(target=door.close, args=(WAIT_S,))
        ending.start()
        door.answer([(number, 0, "", b"", b"answered")])
        assert pending.result(WAIT_S) == b"answered"
        ending.join(WAIT_S)
        assert not ending.is_alive()


@pytest.mark.parametrize(
    "sent",
    [b"", b"\0\0\0\0\x05hell", b"\x07\0\0\0\x01x", b"\0\0\0\0\x01xy"],
    ids=["nothing", "too short", "a prefix that is none", "too long"],
)
def test_what_is_no_message_is_an_error_of_its_call(door_class, sent):
    with opened(door_class) as door, connected(door) as connection:
        connection.sendall(conversation(frame(1, 4, 1, headers()), frame(0, 1, 1, sent)))
        until_answered(connection)
        assert not select.select([door], [], [], 0)[0]
        connection.sendall(call_of(3))
        assert taken(door)[0][0][6] == b"hello"


def test_a_stream_is_refused_before_it_ends(door_class):
    with opened(door_class) as door, connected(door) as connection:
        connection.sendall(conversation(frame(1, 4, 1, headers(b"/s/Stream"))))
        until_answered(connection)
        assert not select.select([door], [], [], 0)[0]


def mutated(conversation, dice):
    """The bytes with a few changes: turned, cut out, doubled, or made up."""
    data = bytearray(conversation)
    for _ in range(dice.randint(1, 6)):
        # What comes before the frames is rarely hurt, else nothing else would be.
        at = dice.randrange(0 if dice.random() < 0.05 else len(PREFACE), len(data))
        match dice.randrange(4):
            case 0:
                data[at] ^= 1 << dice.randrange(8)
            case 1:
                del data[at : at + dice.randrange(20)]
            case 2:
                data[at:at] = data[at : at + dice.randrange(60)]
            case 3:
                data[at:at] = dice.randbytes(dice.randrange(20))
        if len(data) <= len(PREFACE):
            return bytes(data)
    return bytes(data)


def test_garbage_hurts_nobody_else(door_class):
    """Conversations with changes at random, beside a client that is answered all the time."""
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    valid = conversation(
        call_of(1),
        call_of(3, b"x" * 1000, (b"grpc-timeout", b"5S")),
        frame(8, 0, 0, b"\0\0\x10\0"),
        frame(6, 0, 0, b"12345678"),
        frame(1, 0, 5, headers()[:40]),
        frame(9, 4, 5, headers()[40:]),
        frame(0, 0, 5, b"\0\0\0\0\x0ahalf "),
        frame(3, 0, 5, b"\0\0\0\x08"),
        frame(4, 0, 0, b"\0\x03\0\0\0\x64\0\x04\0\0\xff\xff"),
        frame(7, 0, 0, b"\0\0\0\0\0\0\0\0bye"),
        call_of(7, b"last"),
    )
    room = {"calls": 100_000, "buffered_bytes": 10**9, "connections": 1000}
    with opened(door_class, **room) as door, echoing(door), caller(door) as call:
        for i in range(amount(2000, 100_000)):
            with contextlib.suppress(OSError), connected(door) as connection:
                sent = mutated(valid, dice)
                cut = dice.randrange(len(sent))
                connection.sendall(sent[:cut])
                connection.sendall(sent[cut:])
                connection.setblocking(False)
                if dice.random() < 0.5:
                    select.select([connection], [], [], 0.01)
                    connection.recv(4096)
            if i % 20 == 0:
                message = b"%d" % i
                assert call(message, timeout=WAIT_S, wait_for_ready=True) == message, seed
