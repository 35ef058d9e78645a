"""Answers that were given before, for requests that come again.

A version that was proved exact answers by its inputs' bytes and by nothing else, so an answer that
is kept is the answer. Versions that are not proved have no cache. An answer is kept with all
outputs, whichever were asked for, as its version computes all of them anyway; its key is a
cryptographic digest, since clients could make others collide. An equal request that comes while the
first is being computed waits for that one.
"""

import asyncio
import collections
import dataclasses
import hashlib
import time
from collections.abc import Awaitable, Callable

import numpy as np

from aqt_engine.bundle import Arrays
from aqt_server.errors import DeadlineExceeded
from aqt_server.queue import Answer, Outputs
from aqt_server.statistics import Statistics, Times

_ENTRY_NBYTES = 512
_ARRAY_NBYTES = 256
"""What Python takes for an entry and for each of its arrays, beside the elements."""
_LONG_NBYTES = 2**20
"""A digest of more takes above a millisecond, for which the event loop would stand still."""
_MOST_WAITING = 1000
"""Requests that wait for one that is computed; more are queued, where rows are bounded."""


class ResponseCache:
    """Answers of all versions within `limit_nbytes`: what was not asked for the longest goes first.

    Belongs to one event loop.
    """

    def __init__(self, limit_nbytes: int):
        self.limit_nbytes = limit_nbytes
        self.nbytes = 0
        """Bytes that the answers take."""
        self.evictions = 0
        """Answers that had to go for others."""
        self._answers = collections.OrderedDict[tuple["VersionCache", bytes], Outputs]()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, owner: "VersionCache", key: bytes) -> Outputs | None:
        """The answer of `owner` to the request with `key`, if it is kept."""
        found = self._answers.get((owner, key))
        if found is not None:
            self._answers.move_to_end((owner, key))
        return found

    def put(self, owner: "VersionCache", key: bytes, outputs: Outputs) -> None:
        """Keeps a copy of `outputs`, unless they alone take more than there is."""
        size = _nbytes(outputs)
        if size > self.limit_nbytes or (owner, key) in self._answers:
            return
        while self.nbytes + size > self.limit_nbytes:
            _, gone = self._answers.popitem(last=False)
            self.nbytes -= _nbytes(gone)
            self.evictions += 1
        # Copies, for they are parts of a whole batch and would keep all of it.
        self._answers[owner, key] = {name: array.copy() for name, array in outputs.items()}
        self.nbytes += size

    def drop(self, owner: "VersionCache") -> None:
        """Forgets all answers of `owner`."""
        for entry in [entry for entry in self._answers if entry[0] is owner]:
            self.nbytes -= _nbytes(self._answers.pop(entry))


@dataclasses.dataclass(slots=True, kw_only=True)
class _Computation:
    """A request that is being answered; `outputs` will be None if that fails."""

    priority: int
    outputs: asyncio.Future[Outputs | None]
    waiting: int = 0


class VersionCache:
    """The answers of one version that was proved exact, counted in its `statistics`."""

    def __init__(self, cache: ResponseCache, statistics: Statistics):
        self._cache = cache
        self._statistics = statistics
        self._computing: dict[bytes, _Computation] = {}
        self._closed = False

    async def answer(
        self,
        inputs: Arrays,
        compute: Callable[[], Awaitable[Answer]],
        *,
        priority: int,
        deadline: float | None,
    ) -> tuple[Outputs, Times | None]:
        """The answer to `inputs`, and when it was computed: None if it was not, for this request.

        A request does not wait for one of a lower priority, nor beyond its `deadline`, in the event
        loop's time. Where the one that it waited for fails, it is computed on its own.

        Raises:
          DeadlineExceeded: its time was up while an equal request was computed.
          Exception: whatever `compute` raises.
        """
        began = time.monotonic_ns()
        if sum(array.nbytes for array in inputs.values()) > _LONG_NBYTES:
            key = await asyncio.to_thread(_key, inputs)
        else:
            key = _key(inputs)
        outputs = self._cache.get(self, key)
        other = self._computing.get(key)
        if outputs is None and other and self._may_wait(other, priority):
            outputs = await _outputs_of(other, deadline)
        looked_up_ns = time.monotonic_ns() - began
        if outputs is not None:
            self._statistics.cache_hit.add(looked_up_ns)
            return outputs, None
        answer = await self._computed(key, compute, priority)
        began = time.monotonic_ns()
        if not self._closed:
            self._cache.put(self, key, answer.outputs)
        self._statistics.cache_miss.add(looked_up_ns + time.monotonic_ns() - began)
        return answer.outputs, answer.times

    def close(self) -> None:
        """Forgets all answers, and keeps no more."""
        self._closed = True
        self._cache.drop(self)

    def _may_wait(self, other: _Computation, priority: int) -> bool:
        return other.priority <= priority and other.waiting < _MOST_WAITING

    async def _computed(
        self, key: bytes, compute: Callable[[], Awaitable[Answer]], priority: int
    ) -> Answer:
        mine = _Computation(priority=priority, outputs=asyncio.get_running_loop().create_future())
        self._computing[key] = mine
        outputs = None
        try:
            answer = await compute()
            outputs = answer.outputs
        finally:
            # Another of a higher priority may stand there by now.
            if self._computing.get(key) is mine:
                del self._computing[key]
            mine.outputs.set_result(outputs)
        return answer


async def _outputs_of(computation: _Computation, deadline: float | None) -> Outputs | None:
    now = asyncio.get_running_loop().time()
    computation.waiting += 1
    try:
        done, _ = await asyncio.wait(
            {computation.outputs}, timeout=None if deadline is None else max(0.0, deadline - now)
        )
    finally:
        computation.waiting -= 1
    if not done:
        raise DeadlineExceeded(
            "the request's time was up before an equal one that is under way was computed: allow "
            "it more"
        )
    return computation.outputs.result()


def _key(inputs: Arrays) -> bytes:
    """A digest of `inputs`, whose names, order and dtypes are those of the signature."""
    found = hashlib.sha256()
    for array in inputs.values():
        found.update(repr(array.shape).encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.digest()


def _nbytes(outputs: Outputs) -> int:
    return _ENTRY_NBYTES + sum(_ARRAY_NBYTES + array.nbytes for array in outputs.values())
