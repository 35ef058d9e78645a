"""A port of HTTP in this process: clients that are too many, too slow, or do not listen."""

import asyncio
import contextlib
import socket

import pytest
from aiohttp import web

from aqt_server import http, port
from aqt_server.settings import Connections

BOUND_S = 20


async def _large(request):
    return web.Response(body=bytes(2**25))


def _application():
    application = web.Application()
    application.router.add_get("/large", _large)
    return application


@contextlib.asynccontextmanager
async def listening(application=_application, **limits):
    door = port.Port(application, Connections(**limits))
    number = await door.listen("127.0.0.1", 0, None)
    try:
        yield number
    finally:
        await door.close()


def run(test):
    asyncio.run(asyncio.wait_for(test(), BOUND_S))


async def ended(reader):
    """What still came until the server closed the connection."""
    try:
        return await reader.read()
    except ConnectionError:
        return b""


@pytest.mark.parametrize("sent", [b"", b"GET /large HT", b"GET /large HTTP/1.1\r\nHost: a\r\n"])
def test_who_sends_no_whole_request_is_closed(sent):
    async def check():
        async with listening(idle_s=0.2) as number:
            reader, writer = await asyncio.open_connection("127.0.0.1", number)
            writer.write(sent)
            assert await ended(reader) == b""
            writer.close()

    run(check)


def test_who_does_not_read_is_cut_off(monkeypatch):
    for module in (http, port):
        monkeypatch.setattr(module, "SEND_S", 0.3)

    async def check():
        async with listening() as number:
            reader, writer = await asyncio.open_connection("127.0.0.1", number, limit=1)
            writer.write(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
            await reader.readexactly(1)
            await asyncio.sleep(0.6)  # reads nothing meanwhile, beyond what the system takes
            assert len(await ended(reader)) < 2**25
            writer.close()

    run(check)


def test_a_burst_is_bounded_as_well():
    """All are accepted by the system before the server looks at the first."""

    async def check():
        async with listening(max_connections=5) as number:
            with contextlib.ExitStack() as held:
                for _ in range(20):
                    one = socket.create_connection(("127.0.0.1", number), timeout=BOUND_S)
                    held.enter_context(one).setblocking(False)
                    sockets.append(one)
                loop = asyncio.get_running_loop()
                waiting = {asyncio.create_task(loop.sock_recv(one, 100)) for one in sockets}
                while len(waiting) > 5:
                    told, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    assert all(b" 503 " in task.result() for task in told)
                for task in waiting:
                    task.cancel()
                assert len(waiting) == 5

    sockets = []
    run(check)


def test_more_than_are_allowed_are_told_so_and_come_in_when_others_go():
    async def check():
        async with listening(max_connections=2) as number:
            first = [await asyncio.open_connection("127.0.0.1", number) for _ in range(2)]
            reader, writer = await asyncio.open_connection("127.0.0.1", number)
            assert (await ended(reader)).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            writer.close()
            first[0][1].close()
            answer = b""
            while not answer.startswith(b"HTTP/1.1 404"):
                reader, writer = await asyncio.open_connection("127.0.0.1", number)
                with contextlib.suppress(ConnectionError):
                    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                answer = await ended(reader)
                writer.close()
            first[1][1].close()

    run(check)


def test_what_cannot_be_made_is_told_and_nobody_waits_for_it(caplog):
    def broken():
        raise ImportError("no such module")

    async def check():
        async with listening(broken) as number:
            reader, writer = await asyncio.open_connection("127.0.0.1", number)
            assert await ended(reader) == b""
            writer.close()
            with pytest.raises(ConnectionError):
                await asyncio.open_connection("127.0.0.1", number)

    run(check)
    assert "could not be made" in caplog.text
    assert "no such module" in caplog.text
