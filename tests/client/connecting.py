"""Both clients behind one blocking face, so that a test serves both."""

import asyncio
import contextlib

import pytest

import aqt_client


class Awaited:
    """An AsyncClient whose methods block, so that one test serves both clients."""

    def __init__(self, runner, client):
        self.runner, self.client = runner, client

    def __getattr__(self, name):
        method = getattr(self.client, name)
        return lambda *args, **kwargs: self.runner.run(method(*args, **kwargs))


@contextlib.contextmanager
def blocking(address, **kwargs):
    with aqt_client.Client(address, **kwargs) as client:
        yield client


@contextlib.contextmanager
def awaiting(address, **kwargs):
    async def enter():
        return await aqt_client.AsyncClient(address, **kwargs).__aenter__()

    with asyncio.Runner() as runner:
        client = runner.run(enter())
        try:
            yield Awaited(runner, client)
        finally:
            runner.run(client.__aexit__(None, None, None))


BOTH = pytest.mark.parametrize("connect", [blocking, awaiting])
