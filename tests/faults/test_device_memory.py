"""A device that runs out of memory, at load and while it computes, with JAX's own error."""

import asyncio

import jax.numpy as jnp
import pytest

from aqt_server.directory import Directory
from aqt_server.errors import FailureReason, OutOfMemory
from aqt_server.executor import Executor
from aqt_server.loader import Loader, Outcome, outcome_of
from aqt_server.memory import NoMemoryError
from aqt_server.policies import Policy
from aqt_server.servable import serve
from aqt_server.settings import Batching, Models, Settings
from bundles import write_linear
from server.messages import MODEL, x_of

KEY = (MODEL, 1)


def exhaust(*_, **__):
    """More than any machine has: JAX raises RESOURCE_EXHAUSTED."""
    return jnp.zeros(2**50, jnp.int8).block_until_ready()


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    write_linear(root / MODEL / "1")
    settings = Settings(
        models=Models(model_repository=str(root), proof_s=0), batching=Batching(max_batch_rows=4)
    )
    return Loader(settings, Directory(root))


def test_at_load_the_version_is_refused_for_want_of_memory(loader, monkeypatch):
    monkeypatch.setattr(Executor, "prove", exhaust)
    with pytest.raises(NoMemoryError, match="the device has none left: Out of memory") as raised:
        asyncio.run(loader.load(KEY, held=0))
    assert outcome_of(raised.value) is Outcome.NO_MEMORY
    monkeypatch.undo()
    assert asyncio.run(loader.load(KEY, held=0)).exact


@pytest.mark.parametrize("raising", [exhaust, lambda *_: bytearray(2**60)])
def test_a_batch_without_memory_fails_alone_and_says_so(loader, monkeypatch, raising):
    async def check():
        loaded = await loader.load(KEY, held=0)
        served = serve(KEY, loaded, Policy(), Batching(), cache=None)
        whole = loaded.executor._program
        monkeypatch.setattr(loaded.executor, "_program", raising)
        with pytest.raises(OutOfMemory, match="no memory to compute the batch") as raised:
            await served.batcher.run({"x": x_of(2)})
        assert raised.value.code.name == "RESOURCE_EXHAUSTED"
        assert raised.value.reason is FailureReason.BACKEND
        monkeypatch.setattr(loaded.executor, "_program", whole)
        assert (await served.batcher.run({"x": x_of(2)})).outputs["y"].shape == (2, 4)
        assert await served.batcher.close(60)

    asyncio.run(check())


def test_another_error_of_the_device_is_a_defect(loader, monkeypatch):
    def fails(*_):
        raise RuntimeError("INTERNAL: something else")

    async def check():
        loaded = await loader.load(KEY, held=0)
        served = serve(KEY, loaded, Policy(), Batching(), cache=None)
        monkeypatch.setattr(loaded.executor, "_program", fails)
        with pytest.raises(RuntimeError, match="something else"):
            await served.batcher.run({"x": x_of(2)})
        assert await served.batcher.close(60)

    asyncio.run(check())
