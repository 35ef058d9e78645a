"""Requests to batches to answers, for one loaded version.

There is one queue and one thread that computes. While it computes, requests gather; when it is
free, it takes as many whole requests as fit. No request waits for company: alone, it runs at once.
A request whose caller has gone, or whose deadline has passed, is cancelled in the queue and is
never computed. That companions do not change an answer is the program's promise.
"""

import asyncio
import collections
import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from aqt_engine.bundle import Arrays
from aqt_server.codec import rows_of
from aqt_server.errors import InvalidRequest, NotReady, Overloaded

Outputs = dict[str, np.ndarray[Any, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class _Waiting:
    inputs: Arrays
    rows: int
    answer: asyncio.Future[Outputs]


class Batcher:
    """The queue of one version. Belongs to the event loop that it is made in."""

    def __init__(
        self, program: Callable[[Arrays], Outputs], *, max_batch_rows: int, queue_rows: int
    ):
        self._program = program
        self._max_batch_rows = max_batch_rows
        self._queue_rows = queue_rows
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._arrived = asyncio.Event()
        self._closed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._worker = asyncio.create_task(self._work())

    async def run(self, inputs: Arrays) -> Outputs:
        """The answer to one request: an array with its rows for each output.

        Raises:
          InvalidRequest: it has more rows than the queue may ever hold.
          Overloaded: the queue is full.
          NotReady: the version is being unloaded.
        """
        rows = rows_of(inputs)
        if rows > self._queue_rows:
            raise InvalidRequest(
                f"the request has {rows} rows, and the server takes at most {self._queue_rows} in "
                f"one: split it, or raise --queue-rows"
            )
        if self._closed:
            raise NotReady("this version is being unloaded: send the request again")
        queued = sum(waiting.rows for waiting in self._queue if not waiting.answer.done())
        if queued + rows > self._queue_rows:
            raise Overloaded(
                f"{queued} rows are waiting and {rows} more do not fit into the queue of "
                f"{self._queue_rows}: send the request again later"
            )
        answer = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(inputs, rows, answer))
        self._arrived.set()
        return await answer

    async def close(self) -> None:
        """Takes no more requests, and returns when the accepted ones have been answered."""
        self._closed = True
        self._arrived.set()
        await self._worker
        self._thread.shutdown(wait=False)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = self._take()
            if batch:
                try:
                    answers = await loop.run_in_executor(self._thread, self._compute, batch)
                except Exception as error:
                    for waiting in batch:
                        if not waiting.answer.done():
                            waiting.answer.set_exception(error)
                else:
                    for waiting, outputs in zip(batch, answers, strict=True):
                        if not waiting.answer.done():
                            waiting.answer.set_result(outputs)
            elif self._closed:
                return
            else:
                self._arrived.clear()
                await self._arrived.wait()

    def _take(self) -> list[_Waiting]:
        """The next requests that fit into a batch; one that is larger goes alone."""
        batch: list[_Waiting] = []
        rows = 0
        while self._queue:
            waiting = self._queue[0]
            if waiting.answer.done():
                self._queue.popleft()
                continue
            if batch and rows + waiting.rows > self._max_batch_rows:
                break
            batch.append(self._queue.popleft())
            rows += waiting.rows
        return batch

    def _compute(self, batch: list[_Waiting]) -> list[Outputs]:
        if len(batch) == 1:
            return [self._program(batch[0].inputs)]
        together = {
            name: np.concatenate([waiting.inputs[name] for waiting in batch])
            for name in batch[0].inputs
        }
        outputs = self._program(together)
        ends = np.cumsum([waiting.rows for waiting in batch])
        return [
            {name: array[end - waiting.rows : end] for name, array in outputs.items()}
            for waiting, end in zip(batch, ends, strict=True)
        ]
