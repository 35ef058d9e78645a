"""The batcher alone, with a program that records what it is given."""

import asyncio
import threading

import numpy as np
import pytest

from aqt_server import records
from aqt_server.batcher import Batcher
from aqt_server.errors import DeadlineExceeded, InvalidRequest, NotReady, Overloaded
from aqt_server.statistics import Statistics


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


def with_batcher(test, statistics=None):
    async def main():
        program = Doubling()
        batcher = Batcher(
            program, max_batch_rows=4, queue_rows=8, statistics=statistics or Statistics()
        )
        try:
            async with asyncio.timeout(60):
                await test(program, batcher)
        finally:
            program.gate.set()
            await batcher.close(60)

    asyncio.run(main())


def test_requests_that_wait_are_computed_together_and_answered_apart():
    async def test(program, batcher):
        first = asyncio.create_task(batcher.run(rows(1)))
        await until_computing(program)
        rest = [asyncio.create_task(batcher.run(rows(*v))) for v in ([2, 3], [4], [5, 6])]
        await asyncio.sleep(0)
        program.gate.set()
        answers = [(await task).outputs["y"][:, 0].tolist() for task in (first, *rest)]
        assert answers == [[2], [4, 6], [8], [10, 12]]
        assert program.batches == [[1], [2, 3, 4], [5, 6]]

    with_batcher(test)


def test_a_batch_is_of_one_group_and_those_passed_over_keep_their_places():
    async def test(program, batcher):
        first = asyncio.create_task(batcher.run(rows(1), group="short"))
        await until_computing(program)
        order = [(2, "short"), (3, "long"), (4, "short"), (5, "long"), (6, "other")]
        rest = [asyncio.create_task(batcher.run(rows(v), group=g)) for v, g in order]
        await asyncio.sleep(0)
        program.gate.set()
        answers = [(await task).outputs["y"][:, 0].tolist() for task in (first, *rest)]
        assert answers == [[2], [4], [6], [8], [10], [12]]
        assert program.batches == [[1], [2, 4], [3, 5], [6]]

    with_batcher(test)


def test_a_request_larger_than_a_batch_goes_alone():
    async def test(program, batcher):
        program.gate.set()
        assert (await batcher.run(rows(*range(7)))).outputs["y"].shape == (7, 1)
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
        assert (await late).outputs["y"] == 6
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
        assert (await batcher.run(rows(1))).outputs["y"] == 2

    with_batcher(test)


def test_closing_answers_what_was_accepted_and_refuses_the_rest():
    async def test(program, batcher):
        accepted = [asyncio.create_task(batcher.run(rows(i))) for i in range(6)]
        await until_computing(program)
        closing = asyncio.create_task(batcher.close(60))
        await asyncio.sleep(0)
        with pytest.raises(NotReady):
            await batcher.run(rows(9))
        program.gate.set()
        await closing
        assert [(await task).outputs["y"].item() for task in accepted] == [0, 2, 4, 6, 8, 10]

    with_batcher(test)


def test_a_higher_priority_goes_first_and_equals_in_their_order():
    async def test(program, batcher):
        first = asyncio.create_task(batcher.run(rows(1)))
        await until_computing(program)
        priorities = {2: 5, 3: 10, 4: 1, 5: 5, 6: 1}
        rest = [
            asyncio.create_task(batcher.run(rows(value), priority=priority))
            for value, priority in priorities.items()
        ]
        await asyncio.sleep(0)
        program.gate.set()
        await asyncio.gather(first, *rest)
        assert program.batches == [[1], [4, 6, 2, 5], [3]]

    with_batcher(test)


def test_what_expires_in_the_queue_leaves_it_and_is_never_computed():
    async def test(program, batcher):
        loop = asyncio.get_running_loop()
        first = asyncio.create_task(batcher.run(rows(1)))
        await until_computing(program)
        soon = asyncio.create_task(batcher.run(rows(2), deadline=loop.time() + 0.001))
        later = asyncio.create_task(batcher.run(rows(3), deadline=loop.time() + 1000))
        with pytest.raises(DeadlineExceeded):
            await soon
        assert (batcher.pending_requests, batcher.pending_rows) == (1, 1)
        program.gate.set()
        assert (await first).outputs["y"] == 2
        assert (await later).outputs["y"] == 6
        with pytest.raises(DeadlineExceeded):
            await batcher.run(rows(4), deadline=loop.time())
        assert program.batches == [[1], [3]]

    with_batcher(test)


def test_closing_cuts_off_what_takes_too_long():
    async def test(program, batcher):
        computing = asyncio.create_task(batcher.run(rows(1)))
        await until_computing(program)
        queued = asyncio.create_task(batcher.run(rows(2)))
        await asyncio.sleep(0)
        assert not await batcher.close(0.01)
        for task in (computing, queued):
            with pytest.raises(NotReady, match=r"0\.01 s"):
                await task
        program.gate.set()

    with_batcher(test)


def test_statistics_count_batches_by_their_rows():
    statistics = Statistics()

    async def test(program, batcher):
        first = asyncio.create_task(batcher.run(rows(1)))
        await until_computing(program)
        rest = [asyncio.create_task(batcher.run(rows(*v))) for v in ([2, 3], [4], [5, 6])]
        await asyncio.sleep(0)
        assert (batcher.pending_requests, batcher.pending_rows) == (3, 5)
        program.gate.set()
        answers = await asyncio.gather(first, *rest)
        counts = {n: stages.infer.count for n, stages in statistics.batches.items()}
        assert counts == {1: 1, 3: 1, 2: 1}
        assert (batcher.pending_requests, batcher.pending_rows) == (0, 0)
        for times in (answer.times for answer in answers):
            moments = [getattr(times, name) for name in times.__slots__]
            assert moments == sorted(moments)

    with_batcher(test, statistics)


def test_a_batch_that_takes_too_long_refuses_others_until_it_ends(caplog, monkeypatch):
    async def main():
        program = Doubling()
        batcher = Batcher(
            program,
            max_batch_rows=4,
            queue_rows=8,
            statistics=Statistics(),
            name="a model",
            hung_s=0.05,
        )
        async with asyncio.timeout(60):
            assert batcher.computing_s == 0
            monkeypatch.setattr(caplog.handler, "formatter", records._JsonFormatter())
            with records.about({"request_id": "seven"}):
                first = asyncio.create_task(batcher.run(rows(1)))
            await until_computing(program)
            while not batcher.hung:
                await asyncio.sleep(0.01)
            with pytest.raises(NotReady, match="computing one batch for"):
                await batcher.run(rows(2))
            assert "a batch of a model has been computed for 0.05 s" in caplog.text
            # It is about the batch, and not about one of its requests.
            assert "seven" not in caplog.text
            program.gate.set()
            await first
            assert batcher.computing_s == 0
            assert (await batcher.run(rows(3))).outputs["y"].tolist() == [[6]]
            await batcher.close(60)

    asyncio.run(main())
