"""A repository whose listing hangs, as a directory on a network does, holds up nothing for ever."""

import asyncio
import threading

import pytest

from aqt_server.errors import NotFound, NotReady
from aqt_server.policies import Policies
from aqt_server.repository import Repository
from aqt_server.settings import ModelControl, Models, Serving, Settings
from server_process import WAIT_S

LOAD_S = 0.05


class Hanging:
    """A source whose next listing hangs until it is let go."""

    def __init__(self):
        self.go = threading.Event()
        self.looks = 0

    def versions(self):
        self.looks += 1
        assert self.go.wait(WAIT_S)
        return {}

    def local(self, key):
        raise AssertionError(f"{key} is not there")


@pytest.fixture
def source():
    hanging = Hanging()
    yield hanging
    hanging.go.set()


def repository_of(source, control):
    models = Models(model_repository=".", model_control=control)
    return Repository(
        Settings(models=models, serving=Serving(load_s=LOAD_S)), source, Policies(None)
    )


def test_a_listing_that_hangs_is_left_alone_and_asked_again_when_it_ends(source, caplog):
    async def attempt():
        repository = repository_of(source, ModelControl.EXPLICIT)
        for _ in range(2):
            with pytest.raises(NotReady, match="the model repository cannot be read"):
                await repository.load("m")
        assert await repository.index() == []
        with pytest.raises(NotFound, match="no model 'm' is loaded"):
            await repository.unload("m")
        # Not another thread for each of them: one, and the server does not end by itself with it.
        assert source.looks == 1
        assert repository.busy
        source.go.set()
        async with asyncio.timeout(WAIT_S):
            while repository.busy:
                await asyncio.sleep(0)
        with pytest.raises(NotFound, match="has no versions of a model 'm'"):
            await repository.load("m")
        assert source.looks == 2

    asyncio.run(attempt())
    assert f"no answer in {LOAD_S:g} s, and it is still being read" in caplog.text


def test_a_server_becomes_ready_beside_a_listing_that_hangs(source):
    async def attempt():
        repository = repository_of(source, ModelControl.NONE)
        settled = asyncio.Event()

        async def settle():
            settled.set()

        async with asyncio.timeout(WAIT_S):
            await repository.watch(settle)
        assert settled.is_set()
        assert await repository.close()

    asyncio.run(attempt())
