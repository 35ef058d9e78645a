"""Counts and durations of one loaded version, from which ModelStatistics and the metrics are made.

They belong to the event loop: whoever reads from another thread has the loop read for it.
"""

import asyncio
import bisect
import collections
import contextlib
import dataclasses
import time
from collections.abc import Generator

from aqt_server.errors import FailureReason, RequestError


@dataclasses.dataclass(slots=True)
class Duration:
    """How often something happened, and how long it took in all, in nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Counts one more, of `ns` nanoseconds."""
        self.count += 1
        self.ns += ns


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """When a request entered the queue, and when its batch passed each stage (monotonic ns)."""

    queued: int
    started: int
    inputs_ready: int
    computed: int
    finished: int


@dataclasses.dataclass(slots=True)
class Stages:
    """Durations of the stages of a computation: rows gathered, computed, handed out."""

    inputs: Duration = dataclasses.field(default_factory=Duration)
    infer: Duration = dataclasses.field(default_factory=Duration)
    outputs: Duration = dataclasses.field(default_factory=Duration)

    def add(self, times: Times) -> None:
        """Counts one more computation."""
        self.inputs.add(times.inputs_ready - times.started)
        self.infer.add(times.computed - times.inputs_ready)
        self.outputs.add(times.finished - times.computed)


class Latencies:
    """How many requests took how long, by the upper ends of `SECONDS`."""

    SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

    def __init__(self):
        self.counts = [0] * (len(self.SECONDS) + 1)
        """By bucket, and at the end of those that took longer."""

    def add(self, ns: int) -> None:
        """Counts one more, of `ns` nanoseconds."""
        self.counts[bisect.bisect_left(self.SECONDS, ns / 1e9)] += 1


class Statistics:
    """What a version has done since it was loaded."""

    def __init__(self):
        self.success = Duration()
        self.latencies = Latencies()
        self.failures = {reason: Duration() for reason in FailureReason}
        self.queue = Duration()
        self.requests = Stages()
        """Of each request that succeeded; one batch counts once for each of its requests."""
        self.batches: dict[int, Stages] = collections.defaultdict(Stages)
        """Of each batch, by its rows."""
        self.cache_hit = Duration()
        """Of requests that were answered from the cache: the time until the answer was found."""
        self.cache_miss = Duration()
        """Of those that were not: the time to look, and to keep the answer."""
        self.rows = 0
        """Rows of the requests that were computed and succeeded."""
        self.last_ms = 0
        """When the last request succeeded, in milliseconds since 1970-01-01 UTC; 0 for never."""

    @property
    def executions(self) -> int:
        """Batches that were computed."""
        return sum(stages.infer.count for stages in self.batches.values())

    def expected_s(self, rows: int) -> float:
        """Seconds that `rows` more rows take to compute, by the mean so far; from 0.01 to 10."""
        done = sum(size * stages.infer.count for size, stages in self.batches.items())
        took_ns = sum(stages.infer.ns for stages in self.batches.values())
        return min(10.0, max(0.01, took_ns / 1e9 * rows / max(1, done)))

    def succeeded(self, times: Times | None, *, arrived: int, rows: int) -> None:
        """Counts a request of `rows` rows that arrived at `arrived` and is answered now.

        `times` is None for one that was answered from the cache, which counts no stages.
        """
        took = time.monotonic_ns() - arrived
        self.success.add(took)
        self.latencies.add(took)
        if times:
            self.queue.add(times.started - times.queued)
            self.requests.add(times)
            self.rows += rows
        self.last_ms = time.time_ns() // 1_000_000

    @contextlib.contextmanager
    def failures_counted(self, *, arrived: int) -> Generator[None]:
        """Counts what escapes from the block, by its reason, as a failed request."""
        try:
            yield
        except BaseException as error:
            self.failures[_reason(error)].add(time.monotonic_ns() - arrived)
            raise


def _reason(error: BaseException) -> FailureReason:
    if isinstance(error, asyncio.CancelledError):
        return FailureReason.CANCELED
    return error.reason if isinstance(error, RequestError) else FailureReason.BACKEND
