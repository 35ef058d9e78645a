"""How much is computed at once, how much may wait, and how much a client may ask."""

import dataclasses
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

MIB = 2**20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How much is computed at once, and how much may wait."""

    max_batch_rows: Annotated[
        PositiveInt,
        Field(
            title="ROWS",
            description="computed at once, rounded up to whole buckets of tiles; more raises "
            "throughput, and latency under load, and the time that loading takes",
        ),
    ] = 64
    queue_rows: Annotated[
        PositiveInt,
        Field(
            title="ROWS",
            description="of a model that may wait before requests are refused with "
            "RESOURCE_EXHAUSTED, and the most of one request; lower it to fail sooner under "
            "overload",
        ),
    ] = 1024
    hung_s: Annotated[
        PositiveFloat,
        Field(
            title="SECONDS",
            description="that a batch may compute before its version is not ready and refuses "
            "requests with UNAVAILABLE, until it ends; give it more than the longest batch takes",
        ),
    ] = 60.0
    drain_s: Annotated[
        NonNegativeFloat,
        Field(
            title="SECONDS",
            description="that accepted requests have to finish after SIGTERM or SIGINT, or when "
            "their version is unloaded; what takes longer is cut off. Keep it below what the "
            "orchestrator waits before it kills",
        ),
    ] = 30.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much a client may ask of the server."""

    max_message_bytes: Annotated[
        PositiveInt,
        Field(
            title="BYTES",
            le=2**31 - 1,
            description="of the largest request and response. Each connection can make the server "
            "hold that much before anything is checked: raise it for large tensors, as far as "
            "memory allows for all connections together",
        ),
    ] = 64 * MIB
    max_json_bytes: Annotated[
        PositiveInt,
        Field(
            title="BYTES",
            description="of JSON in a request over HTTP, of which one takes some 20 bytes of "
            "memory; tensors in binary do not count",
        ),
    ] = 16 * MIB
    rate_per_s: Annotated[
        PositiveFloat | None,
        Field(
            title="CALLS",
            description="a second that each client may make, health aside; a client is who calls, "
            "or its address. Set it where one client could take all from the others",
        ),
    ] = None
    rate_burst: Annotated[
        PositiveInt,
        Field(title="CALLS", description="that a client may make at once under --rate-per-s"),
    ] = 100
    max_tensor_bytes: Annotated[
        PositiveInt,
        Field(
            title="BYTES",
            description="of the largest tensor in shared memory, which no message bounds; the "
            "server holds a copy of each",
        ),
    ] = 256 * MIB
