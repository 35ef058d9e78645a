"""How a call is made: its message limits, its deadline and its retries.

A call has one deadline, which all of its attempts share. An attempt is repeated only when the
server cannot be reached, stops, or is overloaded; inference is a pure function, so an attempt that
did reach the server does no harm when it is repeated.
"""

import dataclasses
import time
from typing import Any

import grpc
import tenacity

from aqt_client._errors import (
    ClientError,
    DeadlineExceeded,
    Overloaded,
    Unavailable,
    from_rpc,
)

MAX_MESSAGE_NBYTES = 256 * 2**20
"""The largest message sent or received.

gRPC's own limit of 4 MiB is one image batch. This one holds 64 Mi float32 values and still keeps
a wrong server from filling the memory.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how fast a call is repeated that found the server unavailable or overloaded.

    Before attempt n+1 it waits a random time between 0 and `initial_backoff_s` * 2^(n-1), at most
    `max_backoff_s`: random, so that many clients do not come back at the same moment. Where the
    server says when to come again, that time comes before it. Where the wait would pass the call's
    deadline, the call fails at once. `max_attempts=1` never repeats.
    """

    max_attempts: int = 5
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 2.0

    def __post_init__(self):
        if self.max_attempts < 1:
            raise ValueError(f"`max_attempts` must be at least 1, got {self.max_attempts!r}")
        for name in ("initial_backoff_s", "max_backoff_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)!r}")


class Deadline:
    """The moment at which a call must have its answer, and what its attempts failed with so far."""

    def __init__(self, timeout_s: float):
        if not timeout_s > 0:
            raise ValueError(f"`timeout_s` must be positive, got {timeout_s!r}")
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s
        self._last: ClientError | None = None

    def remaining_s(self) -> float:
        """Seconds left, not below 0."""
        return max(0.0, self._end - time.monotonic())

    def error(self, error: grpc.RpcError) -> ClientError:
        """What the caller sees of an attempt that failed with `error`.

        An attempt that the deadline cut off says nothing of the cause; an earlier one may have.
        """
        found = from_rpc(error, timeout_s=self.timeout_s)
        if self._last is None or not isinstance(found, DeadlineExceeded):
            self._last = found
        return self._last


def retry_arguments(policy: RetryPolicy, deadline: Deadline) -> dict[str, Any]:
    """Arguments of `tenacity.Retrying`, and of `AsyncRetrying`, for one call."""
    return {
        "retry": tenacity.retry_if_exception_type((Unavailable, Overloaded)),
        "wait": _Told()
        + tenacity.wait_random_exponential(
            multiplier=policy.initial_backoff_s, max=policy.max_backoff_s
        ),
        "stop": tenacity.stop_after_attempt(policy.max_attempts)
        | tenacity.stop_before_delay(deadline.timeout_s),
        "reraise": True,
    }


class _Told(tenacity.wait.wait_base):
    """What the server said to wait, if it did."""

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        failed = retry_state.outcome.exception() if retry_state.outcome else None
        return failed.retry_s if isinstance(failed, ClientError) else 0.0
