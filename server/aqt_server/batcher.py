"""Requests to batches to answers, for one loaded version.

There is one queue and one thread that computes. While it computes, requests gather; when it is
free, it takes as many whole requests as fit, in the order of the queue. A batch is of one group,
that of the request whose turn it is: requests of other shapes are passed over and keep their
places. No request waits for company, unless the policy of the model says so: alone, it runs at
once. One that could not be answered in its time, by what batches have taken so far, is refused at
once, or when that shows; and no batch grows beyond the time of those in it. One whose caller has
gone, or whose deadline has passed, leaves the queue and is never computed. That companions do not
change an answer is the program's promise.
"""

import asyncio
import contextvars
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Hashable

import numpy as np

from aqt_engine.bundle import Arrays
from aqt_server.codec import rows_of
from aqt_server.computing import ComputingThread
from aqt_server.errors import DeadlineExceeded, InvalidRequest, NotReady, Overloaded
from aqt_server.queue import DEFAULT_PRIORITY, Answer, Outputs, Queue, Waiting
from aqt_server.service_time import ServiceTime
from aqt_server.statistics import Statistics, Times

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Company:
    """How long requests wait for others: until there are `rows` of them, one of these numbers.

    At the latest `delay_s` seconds after the first of them came the batch goes as it is. With no
    `rows`, they wait for a full batch.
    """

    delay_s: float = 0.0
    rows: tuple[int, ...] = ()


class Batcher:
    """The queue of one version. Belongs to the event loop that it is made in."""

    def __init__(
        self,
        program: Callable[[Arrays], Outputs],
        *,
        max_batch_rows: int,
        queue_rows: int,
        statistics: Statistics,
        company: Company = Company(),
        name: str = "a version",
        hung_s: float = math.inf,
    ):
        self._program = program
        self._max_batch_rows = max_batch_rows
        self._queue_rows = queue_rows
        self._statistics = statistics
        self.company = company
        self._name = name
        self._hung_s = hung_s
        self._service_time = ServiceTime()
        self._expected = self._service_time.expected
        self._most = self._service_time.most
        self._queue = Queue()
        self._computing: list[Waiting] = []
        self._started = 0.0
        self._loop = asyncio.get_running_loop()
        self._next: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None
        # In that of a request, what is logged of a batch would be about that one.
        self._context = contextvars.copy_context()
        self._closed = False
        self._drained = self._loop.create_future()
        self._thread = ComputingThread(self._compute, self._end)

    @property
    def pending_requests(self) -> int:
        """Requests that wait in the queue."""
        return len(self._queue)

    @property
    def pending_rows(self) -> int:
        """Rows that wait in the queue; a request without rows counts as one."""
        return self._queue.room

    @property
    def computing_s(self) -> float:
        """Seconds that the batch which is being computed takes so far; 0 where there is none."""
        return self._loop.time() - self._started if self._computing else 0.0

    @property
    def hung(self) -> bool:
        """Whether that is more than a batch may take: then no more requests are taken."""
        return self.computing_s > self._hung_s

    async def run(
        self,
        inputs: Arrays,
        *,
        group: Hashable = (),
        priority: int = DEFAULT_PRIORITY,
        deadline: float | None = None,
        answer_by: float | None = None,
    ) -> Answer:
        """The answer to one request.

        Requests of one `group` have inputs of the same shapes but for the rows. `priority` is from
        1, the highest, to `PRIORITY_LEVELS`. `deadline` is in the event loop's time; a request that
        is being computed by then is answered, however long that takes. After `answer_by` nobody
        waits for the answer.

        Raises:
          InvalidRequest: it has more rows than the queue may ever hold.
          Overloaded: the queue is full.
          DeadlineExceeded: the deadline passed in the queue, or is certain to.
          NotReady: the version is being unloaded, was cut off while it computed, or hangs.
        """
        rows = rows_of(inputs)
        now = self._loop.time()
        self._admit(rows)
        foreseen = self._check_time(group, rows, now, priority, deadline, answer_by)
        waiting = Waiting(
            inputs=inputs,
            rows=rows,
            group=group,
            priority=priority,
            deadline=deadline,
            answer_by=math.inf if answer_by is None else answer_by,
            foreseen=foreseen,
            queued_ns=time.monotonic_ns(),
            since=now,
            answer=self._loop.create_future(),
        )
        self._queue.add(waiting)
        self._begin_at(now)
        timer = None if deadline is None else self._loop.call_at(deadline, self._expire, waiting)
        try:
            return await waiting.answer
        finally:
            if self._queue.remove(waiting) and waiting.late(self._loop.time()):
                self._count(waiting, late=True)
            if timer:
                timer.cancel()

    async def close(self, grace_s: float) -> bool:
        """Takes no more requests, and returns when the accepted ones have been answered.

        What is not answered after `grace_s` seconds fails with NotReady. Returns whether there was
        nothing of that kind; if there was, a thread may compute on, as none can be ended.
        """
        self._closed = True
        self._begin_at(self._loop.time())
        done, _ = await asyncio.wait({self._drained}, timeout=grace_s)
        self._thread.end()
        if done:
            return True
        for waiting in [*self._computing, *self._queue]:
            waiting.fail(
                NotReady(
                    f"the request was not computed within the {grace_s:g} s that it had after this "
                    f"version began to unload: send it again"
                )
            )
        return False

    def _admit(self, rows: int) -> None:
        if rows > self._queue_rows:
            raise InvalidRequest(
                f"the request has {rows} rows, and the server takes at most {self._queue_rows} in "
                f"one: split it, or raise --queue-rows"
            )
        if self._closed:
            raise NotReady("this version is being unloaded: send the request again")
        if self.hung:
            raise NotReady(
                f"this version has been computing one batch for {self.computing_s:.0f} s: send the "
                f"request to another server, or again later"
            )
        if self.pending_rows + max(1, rows) > self._queue_rows:
            raise Overloaded(
                f"{self.pending_rows} rows are waiting and {rows} more do not fit into the queue "
                f"of {self._queue_rows}: send the request again later",
                retry_s=self._statistics.expected_s(self.pending_rows),
            )

    def _check_time(
        self,
        group: Hashable,
        rows: int,
        now: float,
        priority: int,
        deadline: float | None,
        answer_by: float | None,
    ) -> bool:
        """Refuses what is not all but certain to be done in time, by what batches took so far.

        An idle version takes everything, so that what batches take is measured again. Returns
        whether an answer in time was expected.
        """
        if (deadline is None and answer_by is None) or not (self._computing or self.pending_rows):
            return False
        free = now
        if self._computing:
            taken = sum(waiting.rows for waiting in self._computing)
            free = max(free, self._started + self._expected(self._computing[0].group, taken))
        ahead = self._queue.rows_before(priority, now)
        behind = self._service_time.behind(group, ahead, rows, self._max_batch_rows)
        start, answered = (free + seconds for seconds in behind)
        over_s = max(
            start - (math.inf if deadline is None else deadline),
            answered - (math.inf if answer_by is None else answer_by),
        )
        if over_s > 0:
            # With nothing before it, it would be in time; where it would not, no later time helps.
            alone = answer_by is None or now + self._most(group, rows) <= answer_by
            raise DeadlineExceeded(
                f"the request would be computed in {start - now:.3g} s and answered in "
                f"{answered - now:.3g} s, as {ahead} rows wait before it, and its time is up "
                f"before: allow it more, or send fewer at once",
                retry_s=max(0.01, over_s) if alone else None,
            )
        return answer_by is not None

    def _expire(self, waiting: Waiting) -> None:
        if self._queue.remove(waiting):
            # Not where it is only the wait whose time is up.
            now = self._loop.time()
            if now + self._expected(waiting.group, waiting.rows) > waiting.answer_by:
                self._count(waiting, late=True)
            waiting.fail(
                DeadlineExceeded(
                    "the request could not be computed in its time: allow it more, or send fewer "
                    "at once"
                )
            )

    def _count(self, waiting: Waiting, *, late: bool) -> None:
        if waiting.foreseen:
            self._service_time.taken(late=late)

    def _begin_at(self, when: float) -> None:
        """Has `_begin` called then, unless it will be before, or a batch is being computed."""
        if self._computing or (self._next and self._next.when() <= when):
            return
        if self._next:
            self._next.cancel()
        self._next = self._loop.call_at(when, self._begin, context=self._context)

    def _begin(self) -> None:
        """Has the next batch computed, if there is one, and it waits for no more company."""
        self._next = None
        now = self._started = self._loop.time()
        company, until = self._gathered(now)
        if until > now:
            self._begin_at(until)
        elif batch := self._take(now, company):
            self._computing = batch
            self._watch = self._loop.call_later(self._hung_s, self._tell_hung)
            self._thread.compute(batch)
        elif self._closed and not self._drained.done():
            self._drained.set_result(None)

    def _end(self, batch: list[Waiting], answers: list[Answer] | Exception) -> None:
        """Answers the requests of a batch that was computed, and begins the next."""
        assert self._watch
        self._watch.cancel()
        self._computing = []
        if isinstance(answers, Exception):
            for waiting in batch:
                waiting.fail(answers)
        else:
            rows = sum(waiting.rows for waiting in batch)
            self._statistics.batches[rows].add(answers[0].times)
            ended = self._loop.time()
            self._service_time.add(batch[0].group, rows, ended - self._started)
            for waiting, answer in zip(batch, answers, strict=True):
                self._count(waiting, late=waiting.late(ended))
                if not waiting.answer.done():
                    waiting.answer.set_result(answer)
        self._begin()

    def _tell_hung(self) -> None:
        _log.error(
            "a batch of %s has been computed for %g s: no more requests are taken until it ends",
            self._name,
            self._hung_s,
        )

    def _gathered(self, now: float) -> tuple[int, float]:
        """The rows of the next batch, and until when it waits for company; now or before: no more.

        No request is held for more than half of the time that it has.
        """
        delay_s = self.company.delay_s
        if not delay_s or not self.pending_rows or self._closed:
            return self._max_batch_rows, now
        queued = list(self._queue)
        companions = [waiting for waiting in queued if waiting.group == queued[0].group]
        rows = sum(waiting.rows for waiting in companions)
        wanted = [n for n in self.company.rows if n <= self._max_batch_rows]
        reached = [n for n in wanted or [self._max_batch_rows] if n <= rows]
        if reached:
            return max(reached), now
        ends = [w.since + delay_s for w in companions]
        ends += [(w.since + w.deadline) / 2 for w in companions if w.deadline is not None]
        return self._max_batch_rows, min(ends)

    def _take(self, now: float, most: int) -> list[Waiting]:
        """The next requests that fit into a batch of `most` rows; one that is larger goes alone.

        No more of them than can be answered in the time of each, by what batches have taken so far.
        What cannot be answered in its time any more is refused, unless nothing else is there to do:
        then one is computed, so that what batches take is measured again.
        """
        batch: list[Waiting] = []
        late: list[Waiting] = []
        rows = 0
        by = math.inf
        for waiting in self._queue:
            if waiting.deadline is not None and waiting.deadline <= now:
                self._expire(waiting)
                continue
            if batch and waiting.group != batch[0].group:
                continue
            if batch and rows + waiting.rows > most:
                break
            # Cancelled, and its caller has not been woken to remove it.
            if waiting.answer.done():
                self._queue.remove(waiting)
                continue
            if now + self._expected(waiting.group, waiting.rows) > waiting.answer_by:
                late.append(waiting)
                continue
            by = min(by, waiting.answer_by)
            if batch and now + (took := self._expected(waiting.group, rows + waiting.rows)) > by:
                if any(w.foreseen and w.since + took <= by for w in (*batch, waiting)):
                    # It had time for a whole batch when it came: the queue is longer than was
                    # foreseen, and would stay so long that every batch is cut.
                    self._service_time.taken(late=True)
                break
            batch.append(waiting)
            rows += waiting.rows
        if not batch:
            batch, late = late[:1], late[1:]
        for waiting in batch:
            self._queue.remove(waiting)
        for waiting in late:
            self._expire(waiting)
        return batch

    def _compute(self, batch: list[Waiting]) -> list[Answer]:
        started = time.monotonic_ns()
        inputs = batch[0].inputs
        if len(batch) > 1:
            inputs = {
                name: np.concatenate([waiting.inputs[name] for waiting in batch]) for name in inputs
            }
        inputs_ready = time.monotonic_ns()
        outputs = self._program(inputs)
        computed = time.monotonic_ns()
        ends = np.cumsum([waiting.rows for waiting in batch])
        parts = [
            {name: array[end - waiting.rows : end] for name, array in outputs.items()}
            for waiting, end in zip(batch, ends, strict=True)
        ]
        finished = time.monotonic_ns()
        return [
            Answer(
                outputs=part,
                times=Times(
                    queued=waiting.queued_ns,
                    started=started,
                    inputs_ready=inputs_ready,
                    computed=computed,
                    finished=finished,
                ),
            )
            for waiting, part in zip(batch, parts, strict=True)
        ]
