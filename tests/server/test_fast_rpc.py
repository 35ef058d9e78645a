"""What the fast door does with the calls that its compiled part hands over, without that part."""

import asyncio
import os
import types

import grpc
import pytest

from aqt_protos import SERVICE_NAME
from aqt_protos import open_inference_pb2 as pb
from aqt_server import fast_rpc
from aqt_server.settings import Models, Settings

CANCELLED = grpc.StatusCode.CANCELLED.value[0]


class Compiled:
    """Stands for the compiled part: hands over what it is given, and keeps the answers."""

    def __init__(self):
        self._read, self._written = os.pipe()
        self._turns = []
        self.statuses = {}

    def hand_over(self, calls, gone):
        path = f"/{SERVICE_NAME}/ServerLive"
        self._turns.append(
            ([(n, path, b"", "ipv4:127.0.0.1:1", 0, "", b"", -1.0) for n in calls], gone)
        )
        os.write(self._written, b"a")

    def take(self):
        os.read(self._read, 1)
        return self._turns.pop(0)

    def answer(self, answers):
        for number, status, *_ in answers:
            assert number not in self.statuses
            self.statuses[number] = status

    def fileno(self):
        return self._read

    def port(self):
        return 1

    def start(self):
        pass

    def close(self, grace_s):
        os.close(self._read)
        os.close(self._written)


class Service:
    """Answers when it is let."""

    def __init__(self):
        self.begun = 0
        self.let = asyncio.Event()

    async def answer(self, rpc, request, call):
        self.begun += 1
        await self.let.wait()
        return pb.ServerLiveResponse(live=True)


# What it keeps of a call is bounded, so that one which is never answered takes room for ever.
@pytest.mark.parametrize("when", ["with the call", "later"])
def test_a_call_that_is_gone_leaves_nothing_behind(monkeypatch, when):
    compiled = Compiled()
    monkeypatch.setattr(fast_rpc, "_open", lambda settings, paths: compiled)
    guard = types.SimpleNamespace(
        authenticator=types.SimpleNamespace(identify=lambda token, name: None)
    )

    async def turns(until):
        async with asyncio.timeout(10):
            while not until():
                await asyncio.sleep(0)

    async def check():
        service = Service()
        settings = Settings(models=Models(model_repository="models"))
        door = fast_rpc.FastDoor(service, guard, settings, None)
        tasks = len(asyncio.all_tasks())
        if when == "with the call":
            compiled.hand_over([1, 2, 3], [1, 3])
            await turns(lambda: service.begun == 1)
        else:
            compiled.hand_over([1, 2, 3], [])
            await turns(lambda: service.begun == 3)
            compiled.hand_over([], [1, 3])
        await turns(lambda: compiled.statuses == {1: CANCELLED, 3: CANCELLED})
        service.let.set()
        await turns(lambda: compiled.statuses == {1: CANCELLED, 2: 0, 3: CANCELLED})
        assert len(asyncio.all_tasks()) == tasks
        assert not door._tasks
        await door.close()

    asyncio.run(check())
