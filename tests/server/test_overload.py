"""Twice as many requests as can be answered, in a time that passes as fast as they are handled."""

import asyncio
import random
import selectors

import pytest

from aqt_server import batcher as batching
from aqt_server.batcher import Batcher
from aqt_server.computing import ComputingThread
from aqt_server.errors import DeadlineExceeded
from aqt_server.statistics import Statistics
from server.test_batcher import rows

DEADLINE_S = 0.5
WAY_S = 0.002
ROWS = 16
BATCH_ROWS = 64
SLOW = pytest.mark.slow
FIXED = 0.3
"""Of the time of a whole batch, what one without rows takes."""
LEARNED_S = 20
MEASURED_S = 60


class Waits(selectors.SelectSelector):
    """Instead of waiting for a time, has it pass."""

    now = 1000.0

    def select(self, timeout=None):
        self.now += max(0.0, timeout or 0.0)
        return super().select(0)


class Passing(asyncio.SelectorEventLoop):
    """An event loop whose time passes at once; what is computed takes `took` of it."""

    def __init__(self):
        self._waits = Waits()
        super().__init__(self._waits)
        self.took = float

    def time(self):
        return self._waits.now


class Computing(ComputingThread):
    """No thread, but the time that one would take."""

    def compute(self, argument):
        took = self._loop.took(argument)
        self._loop.call_later(took, lambda: self._done(argument, self._function(argument)))


def steady(drawn, now):
    return drawn.gauss(1, 0.03)


def spiky(drawn, now):
    return 4.0 if drawn.random() < 0.03 else 1.0


def noisy(drawn, now):
    return drawn.lognormvariate(0, 0.25)


# A batch that takes four times 0.1 s makes most of those that wait late, whatever was foreseen.
@pytest.mark.parametrize(
    ("varied", "batch_s", "most_late"),
    [
        (spiky, 0.1, 0.05),
        *(pytest.param(varied, 0.05, 0.01, marks=SLOW) for varied in (steady, spiky, noisy)),
    ],
)
def test_nearly_all_that_is_accepted_is_in_time_and_no_time_is_left_unused(
    varied, batch_s, most_late, monkeypatch
):
    monkeypatch.setattr(batching, "ComputingThread", Computing)
    drawn = random.Random(0)
    used, in_time, late = 0.0, 0, 0

    async def main():
        loop = asyncio.get_running_loop()
        learned = loop.time() + LEARNED_S
        end = learned + MEASURED_S

        def took(batch):
            nonlocal used
            share = FIXED + (1 - FIXED) * len(batch) * ROWS / BATCH_ROWS
            seconds = batch_s * share * varied(drawn, loop.time())
            used += seconds if learned <= loop.time() < end else 0
            return seconds

        loop.took = took
        batcher = Batcher(
            lambda inputs: inputs,
            max_batch_rows=BATCH_ROWS,
            queue_rows=1024,
            statistics=Statistics(),
        )
        asked = rows(*range(ROWS))

        async def ask():
            nonlocal in_time, late
            since = loop.time()
            try:
                await batcher.run(asked, answer_by=since + DEADLINE_S)
                kept = loop.time() + WAY_S <= since + DEADLINE_S
            except DeadlineExceeded as error:
                if error.retry_s is not None:
                    return
                kept = False
            if since >= learned:
                in_time += kept
                late += not kept

        async with asyncio.TaskGroup() as tasks:
            while loop.time() < end:
                tasks.create_task(ask())
                await asyncio.sleep(drawn.expovariate(2 * BATCH_ROWS / ROWS / batch_s))
        await batcher.close(60)

    with asyncio.Runner(loop_factory=Passing) as runner:
        runner.run(main())
    assert late <= most_late * (in_time + late)
    batches = MEASURED_S / batch_s / {steady: 1, spiky: 1.09, noisy: 1.032}[varied]
    assert used > 0.95 * MEASURED_S
    assert in_time * ROWS > 0.9 * batches * BATCH_ROWS
