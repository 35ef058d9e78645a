"""The response cache: the bits of what was computed, of the same version only, within its bound."""

import asyncio
import shutil
import tracemalloc

import numpy as np
import pytest
import tritonclient.grpc as stock
from tritonclient.utils import shared_memory as shm

from aqt_server.errors import DeadlineExceeded
from aqt_server.queue import Answer
from aqt_server.response_cache import ResponseCache, VersionCache
from aqt_server.statistics import Statistics, Times
from bundles import CLASSES, reference, write_linear
from engine.contractions import assert_same_bits
from server.messages import MODEL, stock_input, x_of
from server.test_statistics import of, scrape
from server_process import eventually, serving

TIMES = Times(queued=0, started=0, inputs_ready=0, computed=0, finished=0)


class Computing:
    """Doubles rows, each time anew; while `gate` is closed it does not end."""

    def __init__(self):
        self.count = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, inputs):
        self.count += 1
        await self.gate.wait()
        if self.count < 0:
            raise RuntimeError("negative")
        # A part of a whole batch, as the batcher gives it.
        batch = np.concatenate([inputs["x"] * 2, np.zeros((100, *inputs["x"].shape[1:]))])
        return Answer(outputs={"y": batch[: len(inputs["x"])]}, times=TIMES)


async def ask(version, computing, x, *, priority=5, deadline=None):
    """The answer to `x`, and whether it came from the cache."""
    inputs = {"x": x}
    outputs, times = await version.answer(
        inputs, lambda: computing(inputs), priority=priority, deadline=deadline
    )
    return outputs["y"], times is None


def bounded(test):
    asyncio.run(asyncio.wait_for(test, 60))


def version_of(cache):
    return VersionCache(cache, Statistics())


def test_what_has_the_same_bytes_and_shape_is_answered_from_the_cache():
    async def test():
        version, computing = version_of(ResponseCache(2**20)), Computing()
        nan = np.array([[np.nan, 1.0]])
        first, cached = await ask(version, computing, nan)
        assert not cached
        again, cached = await ask(version, computing, nan.copy())
        assert cached
        assert_same_bits(again, first)
        # Equal as numbers are, or as a row of bytes, is not enough.
        different = [[[0.0, 1.0]], [[-0.0, 1.0]], [[0.0], [1.0]], [[-np.nan, 1.0]]]
        for values in different:
            assert not (await ask(version, computing, np.array(values)))[1]
        assert computing.count == 5

    bounded(test())


def test_versions_share_nothing_but_the_bound():
    async def test():
        cache, computing = ResponseCache(2**20), Computing()
        one, other = version_of(cache), version_of(cache)
        x = np.ones((2, 3))
        assert not (await ask(one, computing, x))[1]
        assert not (await ask(other, computing, x))[1]
        assert (await ask(one, computing, x))[1]
        one.close()
        assert len(cache) == 1
        assert (await ask(other, computing, x))[1]
        # What was under way when its version went is not kept.
        assert not (await ask(one, computing, x))[1]
        assert len(cache) == 1
        other.close()
        assert (len(cache), cache.nbytes) == (0, 0)

    bounded(test())


@pytest.mark.parametrize("values", [1, 500])
def test_memory_is_bounded_and_what_was_asked_for_last_stays(values):
    limit = 200_000

    async def test():
        cache, computing = ResponseCache(limit), Computing()
        version = version_of(cache)
        hot = np.full((1, 4), -1.0)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for i in range(1000):
                await ask(version, computing, hot)
                await ask(version, computing, np.full((1, values), float(i)))
            taken = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert taken < limit * 1.2
        assert limit / 2 < cache.nbytes <= limit
        assert cache.evictions == 1001 - len(cache)
        assert computing.count == 1001
        # What is larger than the whole cache is answered, and not kept.
        count = len(cache)
        await ask(version, computing, np.zeros((1, limit)))
        assert len(cache) == count

    bounded(test())


def test_equal_requests_at_once_are_computed_once():
    async def test():
        version, computing = version_of(ResponseCache(0)), Computing()
        computing.gate.clear()
        x = np.ones((1, 2))
        tasks = [asyncio.create_task(ask(version, computing, x)) for _ in range(5)]
        urgent = asyncio.create_task(ask(version, computing, x, priority=1))
        await asyncio.sleep(0)
        now = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineExceeded):
            await ask(version, computing, x, deadline=now)
        # It waits for nothing that is less urgent than itself.
        assert computing.count == 2
        computing.gate.set()
        answers = await asyncio.gather(*tasks, urgent)
        assert [cached for _, cached in answers] == [False, *[True] * 4, False]
        for found, _ in answers:
            assert_same_bits(found, x * 2)

    bounded(test())


@pytest.mark.parametrize("ended", ["cancelled", "failed"])
def test_a_request_does_not_share_the_failure_of_an_equal_one(ended):
    async def test():
        version, computing = version_of(ResponseCache(2**20)), Computing()
        computing.gate.clear()
        x = np.ones((1, 2))
        first = asyncio.create_task(ask(version, computing, x))
        await asyncio.sleep(0)
        second = asyncio.create_task(ask(version, computing, x))
        await asyncio.sleep(0)
        if ended == "cancelled":
            first.cancel()
        else:
            computing.count = -1
        computing.gate.set()
        with pytest.raises((asyncio.CancelledError, RuntimeError)):
            await first
        found, cached = await second
        assert not cached
        assert_same_bits(found, x * 2)

    bounded(test())


@pytest.mark.slow
def test_a_server_answers_from_its_cache(tmp_path):
    root = tmp_path / "repository"
    for version in (1, 2):
        write_linear(root / MODEL / str(version), seed=version)
    shutil.copytree(root / MODEL / "1", root / "uncached" / "1")
    write_linear(root / "inexact" / "1", wrong_witness=True)
    (tmp_path / "policies.toml").write_text(
        f"[{MODEL}]\naliases = {{stable = 1}}\n[uncached]\nresponse_cache = false\n"
    )
    flags = ("--response-cache-bytes", "1000000", "--allow-inexact", "--poll-s", "0.1")
    flags += ("--model-policies", str(tmp_path / "policies.toml"))
    x = x_of(5)
    with (
        serving(root, *flags, log=tmp_path / "log") as server,
        stock.InferenceServerClient(server.address) as client,
    ):

        def infer(model=MODEL, version="1", **arguments):
            return client.infer(model, [stock_input(x)], model_version=version, **arguments)

        def counts(model=MODEL, version="1"):
            (found,) = client.get_inference_statistics(model, version).model_stats
            stats = found.inference_stats
            assert stats.success.count == stats.cache_hit.count + found.execution_count
            return stats.cache_hit.count, stats.cache_miss.count

        expected = reference(root / MODEL / "1", x)
        # Neither the id, nor the priority, nor how a version is named, makes another request.
        for arguments in ({}, {"request_id": "a", "priority": 1}, {"version": "stable"}):
            assert_same_bits(infer(**arguments).as_numpy("y"), expected)
        assert counts() == (2, 1)
        top = infer(outputs=[stock.InferRequestedOutput("y", class_count=1)]).as_numpy("y")
        best = [int(value.split(b":")[1]) for value in top[:, 0]]
        assert best == expected.argmax(1).tolist()
        region = shm.create_shared_memory_region("out", "/aqt_cache_test", 4096)
        try:
            client.register_system_shared_memory("out", "/aqt_cache_test", 4096)
            output = stock.InferRequestedOutput("y")
            output.set_shared_memory("out", expected.nbytes)
            infer(outputs=[output])
            assert_same_bits(shm.get_contents_as_numpy(region, np.float32, (5, CLASSES)), expected)
            client.unregister_system_shared_memory()
        finally:
            shm.destroy_shared_memory_region(region)
        assert counts() == (4, 1)
        assert_same_bits(infer(version="2").as_numpy("y"), reference(root / MODEL / "2", x))
        assert counts(version="2") == (0, 1)
        for model in ("uncached", "inexact"):
            for _ in range(2):
                infer(model)
            assert counts(model) == (0, 0)
            assert not client.get_model_config(model).config.response_cache.enable
        assert client.get_model_config(MODEL).config.response_cache.enable
        samples = scrape(server)
        assert of(samples, "cache_num_hits_per_model_total") == 4
        assert of(samples, "cache_num_misses_per_model_total") == 1
        assert of(samples, "inference_count_total") == 5
        assert samples["aqt_cache_num_entries",] == 2
        assert 2 * expected.nbytes < samples["aqt_cache_used_bytes",] <= 1000000

        # Other files under the same number are another version.
        write_linear(tmp_path / "next", seed=7)
        loads = samples["aqt_model_loads_total", ("model", MODEL), ("outcome", "ready")]
        (root / MODEL / "1").rename(tmp_path / "before")
        (tmp_path / "next").rename(root / MODEL / "1")
        eventually(
            lambda: (
                scrape(server)["aqt_model_loads_total", ("model", MODEL), ("outcome", "ready")]
                > loads
            )
        )
        assert_same_bits(infer().as_numpy("y"), reference(root / MODEL / "1", x))
        assert counts() == (0, 1)
