"""The batcher alone, with a program that records what it is given."""

import asyncio
import threading

import numpy as np
import pytest

from aqt_server.batcher import Batcher
from aqt_server.errors import InvalidRequest, NotReady, Overloaded


class Doubling:
    """Doubles rows; while `gate` is closed a batch is held in its thread."""

    def __init__(self):
        self.batches = []
        self.gate = threading.Event()
        self.started = threading.Event()

    def __call__(self, inputs):
        self.started.set()
        assert self.gate.wait(60)
        self.batches.append(inputs["x"][:, 0].tolist())
        if (inputs["x"] < 0).any():
            raise RuntimeError("negative")
        return {"y": inputs["x"] * 2}


def rows(*values):
    return {"x": np.array(values, np.float32)[:, None]}


async def until_computing(program):
    assert await asyncio.to_thread(program.started.wait, 60)


def with_batcher(test, **limits):
    async def main():
        program = Doubling()
        batcher = Batcher(program, **{"max_batch_rows": 4, "queue_rows": 8, **limits})
        try:
            async with asyncio.timeout(60):
                await test(program, batcher)
        finally:
            program.gate.set()
            await batcher.close()

    asyncio.run(main())


def test_requests_that_wait_are_computed_together_and_answered_apart():
    async def test(program, batcher):
        first = asyncio.create_task(batcher.run(rows(1)))
        await until_computing(program)
        rest = [asyncio.create_task(batcher.run(rows(*v))) for v in ([2, 3], [4], [5, 6])]
        await asyncio.sleep(0)
        program.gate.set()
        answers = [(await task)["y"][:, 0].tolist() for task in (first, *rest)]
        assert answers == [[2], [4, 6], [8], [10, 12]]
        assert program.batches == [[1], [2, 3, 4], [5, 6]]

    with_batcher(test)


def test_a_request_larger_than_a_batch_goes_alone():
    async def test(program, batcher):
        program.gate.set()
        assert (await batcher.run(rows(*range(7))))["y"].shape == (7, 1)
        assert program.batches == [list(range(7))]

    with_batcher(test)


def test_a_full_queue_refuses_and_frees_itself():
    async def test(program, batcher):
        first = asyncio.create_task(batcher.run(rows(1)))
        await until_computing(program)
        waiting = asyncio.create_task(batcher.run(rows(*range(8))))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="8 rows are waiting"):
            await batcher.run(rows(2))
        waiting.cancel()
        await asyncio.sleep(0)
        late = asyncio.create_task(batcher.run(rows(3)))
        await asyncio.sleep(0)
        program.gate.set()
        assert (await late)["y"] == 6
        await first
        # What was cancelled was never computed.
        assert program.batches == [[1], [3]]

    with_batcher(test)


def test_a_request_that_no_queue_could_hold_is_invalid():
    async def test(program, batcher):
        with pytest.raises(InvalidRequest, match=r"9 rows.*at most 8"):
            await batcher.run(rows(*range(9)))

    with_batcher(test)


def test_a_failed_batch_fails_its_requests_and_no_later_one():
    async def test(program, batcher):
        program.gate.set()
        with pytest.raises(RuntimeError, match="negative"):
            await batcher.run(rows(-1))
        assert (await batcher.run(rows(1)))["y"] == 2

    with_batcher(test)


def test_closing_answers_what_was_accepted_and_refuses_the_rest():
    async def test(program, batcher):
        accepted = [asyncio.create_task(batcher.run(rows(i))) for i in range(6)]
        await until_computing(program)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(NotReady):
            await batcher.run(rows(9))
        program.gate.set()
        await closing
        assert [(await task)["y"].item() for task in accepted] == [0, 2, 4, 6, 8, 10]

    with_batcher(test)
