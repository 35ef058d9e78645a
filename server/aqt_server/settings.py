"""All settings of the server, in groups by the question that they answer.

A setting has one name everywhere: `port` is the flag --port, the variable AQT_PORT and the key
`port` in the table `[listen]` of a file. `configuration` reads them. None holds a secret: what is
secret stands in a file, and a setting says in which.
"""

import dataclasses
import enum
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

MIB = 2**20


class Contradiction(Exception):
    """Settings that do not go together.

    The sentence has each of them in braces, for whoever knows where they were given.
    """


class ModelControl(enum.StrEnum):
    """Who decides which models are loaded."""

    POLL = "poll"
    """The directory: what appears is loaded, what vanishes is unloaded."""
    EXPLICIT = "explicit"
    """Clients, by RepositoryModelLoad and Unload, beginning with `load_model`."""
    NONE = "none"
    """Nobody: what is there at the start is loaded, and stays."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Which models are served."""

    model_repository: Annotated[
        Path, Field(title="DIR", description="directory of bundles, NAME/VERSION/")
    ]
    model_control: Annotated[
        ModelControl,
        Field(
            title="WHO",
            description="poll: load versions that appear in the repository, drain and unload "
            "versions that vanish; explicit: load and unload as clients ask for it; none: load "
            "what is there at the start",
        ),
    ] = ModelControl.POLL
    load_model: Annotated[
        tuple[str, ...],
        Field(
            title="NAME",
            description="a model to load at the start under --model-control explicit, '*' for all; "
            "may be repeated",
        ),
    ] = ()
    poll_s: Annotated[
        PositiveFloat,
        Field(
            title="SECONDS",
            description="between two looks at the repository under --model-control poll; raise it "
            "where a look is slow, as on network storage",
        ),
    ] = 2.0
    allow_inexact: Annotated[
        bool,
        Field(
            description="serve versions whose witness does not reproduce here; their responses say "
            "`aqt_exact: false`"
        ),
    ] = False
    fast_model: Annotated[
        tuple[str, ...],
        Field(
            title="NAME",
            description="a model to serve in mode fast, '*' for all; may be repeated. Its bits may "
            "differ with the batch that a request shares; its responses say `aqt_mode: fast`",
        ),
    ] = ()
    proof_s: Annotated[
        NonNegativeFloat,
        Field(
            title="SECONDS",
            description="that a version may take at load to be tried on more than its witness in "
            "every executable, which is always done: in other orders, beside other rows, and on "
            "random inputs",
        ),
    ] = 5.0
    compilation_cache: Annotated[
        Path,
        Field(
            title="DIR",
            description="compiled executables, so that a restart does not compile again; put it on "
            "a volume that outlives the container. It is trusted: only the server may write there",
        ),
    ] = Path("~/.cache/aqt/compiled")


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
class Listen:
    """Where the server listens."""

    host: Annotated[
        str,
        Field(title="ADDRESS", description="to listen on; 0.0.0.0 for all, as in a container"),
    ] = "127.0.0.1"
    port: Annotated[
        int, Field(ge=0, le=65535, title="PORT", description="of gRPC; 0 for any free one")
    ] = 8001
    metrics_port: Annotated[
        int,
        Field(
            ge=-1,
            le=65535,
            title="PORT",
            description="of the Prometheus metrics, at /metrics; 0 for any free one, -1 for none",
        ),
    ] = 8002


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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All of them. A field is a table in a file; its settings are flags and variables too."""

    models: Models
    batching: Batching = Batching()
    listen: Listen = Listen()
    limits: Limits = Limits()

    def __post_init__(self):
        if self.models.load_model and self.models.model_control is not ModelControl.EXPLICIT:
            raise Contradiction(
                "{load_model} needs {model_control} explicit, and it is "
                f"{self.models.model_control}"
            )
