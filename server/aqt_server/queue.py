"""The requests to one version that wait, in the order in which they will be computed."""

import asyncio
import collections
import dataclasses
import heapq
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np

from aqt_engine.bundle import Arrays
from aqt_server.statistics import Times

PRIORITY_LEVELS = 10
"""Priorities go from 1, the highest, to this one."""
DEFAULT_PRIORITY = 5
LEVEL_S = 1.0
"""Seconds of head start that one level has before the next."""

_WAY_BACK = 0.02
"""Of the time that a request has, so much is left for its answer's way to the client."""

Outputs = dict[str, np.ndarray[Any, Any]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The outputs of one request, each with its rows, and when they were computed."""

    outputs: Outputs
    times: Times


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Waiting:
    """One request. Times are those of the event loop."""

    inputs: Arrays
    rows: int
    group: Hashable
    """Requests of one group can be computed together."""
    priority: int
    since: float
    deadline: float | None
    """Until when it may wait in the queue."""
    answer_by: float
    """Until when anyone waits for its answer."""
    foreseen: bool
    """Whether it was taken because an answer in time was expected: else all was idle."""
    queued_ns: int
    """When it came, by the monotonic clock."""
    answer: asyncio.Future[Answer]

    @property
    def turn(self) -> float:
        """What the queue is ordered by."""
        return self.since + self.priority * LEVEL_S

    def late(self, now: float) -> bool:
        """Whether an answer that is sent now comes late."""
        return now > self.answer_by - _WAY_BACK * (self.answer_by - self.since)

    @property
    def room(self) -> int:
        """What it takes of the queue: a request without rows takes some too."""
        return max(1, self.rows)

    def fail(self, error: Exception) -> None:
        """Answers it with `error`, unless it has been answered."""
        if not self.answer.done():
            self.answer.set_exception(error)


class Queue:
    """First come, first served, but for a head start of each level: none waits for ever."""

    def __init__(self):
        self._levels = tuple(
            collections.OrderedDict[Waiting, None]() for _ in range(PRIORITY_LEVELS)
        )
        self._rows = [0] * PRIORITY_LEVELS
        self.room = 0
        """How much of it is taken, in rows."""

    def __len__(self) -> int:
        return sum(map(len, self._levels))

    def __iter__(self) -> Iterator[Waiting]:
        """All of them in their order, also while some are removed."""
        # A level is in the order of its turns, as it is in that of its arrivals.
        levels = [list(level) for level in self._levels if level]
        return heapq.merge(*levels, key=lambda waiting: waiting.turn)

    def add(self, waiting: Waiting) -> None:
        """Puts `waiting` at the end of its level."""
        self._levels[waiting.priority - 1][waiting] = None
        self._rows[waiting.priority - 1] += waiting.rows
        self.room += waiting.room

    def remove(self, waiting: Waiting) -> bool:
        """Takes `waiting` out, if it is still there."""
        level = self._levels[waiting.priority - 1]
        if waiting not in level:
            return False
        del level[waiting]
        self._rows[waiting.priority - 1] -= waiting.rows
        self.room -= waiting.room
        return True

    def rows_before(self, priority: int, now: float) -> int:
        """Rows whose turn is before that of a request which comes now."""
        rows = sum(self._rows[:priority])
        for level in self._levels[priority:]:
            for waiting in level:
                if waiting.turn > now + priority * LEVEL_S:
                    break
                rows += waiting.rows
        return rows
