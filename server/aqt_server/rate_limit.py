"""How often a client may call: a bucket of tokens for each, refilled at a steady rate."""

import collections
import dataclasses
import time
from collections.abc import Callable

from aqt_server.call import Call
from aqt_server.errors import Overloaded

_CLIENTS = 10_000
"""Buckets that are kept; beyond that, those that were not used for longest are forgotten."""


@dataclasses.dataclass(slots=True)
class _Bucket:
    tokens: float
    filled: float


class RateLimiter:
    """Lets each client make `per_s` calls a second, and `burst` at once; None: any number.

    A client is a principal, or where nobody says who calls, an address.
    """

    def __init__(
        self, per_s: float | None, burst: int, *, clock: Callable[[], float] = time.monotonic
    ):
        self._per_s = per_s
        self._burst = burst
        self._clock = clock
        self._buckets = collections.OrderedDict[str, _Bucket]()

    def check(self, call: Call) -> None:
        """Takes a token for `call`.

        Raises:
          Overloaded: there is none; it says when there will be.
        """
        if self._per_s is None:
            return
        now = self._clock()
        client = _client(call)
        bucket = self._buckets.pop(client, None) or _Bucket(self._burst, now)
        bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.filled) * self._per_s)
        bucket.filled = now
        self._buckets[client] = bucket
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)
        if bucket.tokens < 1:
            raise Overloaded(
                f"this client makes more than {self._per_s:g} calls a second: send it again later",
                retry_s=(1 - bucket.tokens) / self._per_s,
            )
        bucket.tokens -= 1


def _client(call: Call) -> str:
    if call.principal.name:
        return f"principal {call.principal.name}"
    # gRPC has the port of the connection too: a client is not another one for having two.
    scheme, _, rest = call.peer.partition(":")
    return rest.rpartition(":")[0] if scheme in ("ipv4", "ipv6") else call.peer
