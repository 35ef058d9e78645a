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


class Exempt(enum.StrEnum):
    """What may be asked without saying who asks."""

    HEALTH = "health"
    REFLECTION = "reflection"
    METRICS = "metrics"


class LogFormat(enum.StrEnum):
    """How the log is written."""

    TEXT = "text"
    JSON = "json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Which models are served."""

    model_repository: Annotated[
        str,
        Field(
            title="DIR",
            description="directory of bundles, NAME/VERSION/, or a URL of one that fsspec knows, "
            "such as s3://bucket/models; nothing is written there",
        ),
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
class Serving:
    """How the versions of a model are served."""

    model_policies: Annotated[
        Path | None,
        Field(
            title="FILE",
            description="TOML of which versions of which model are served, under which aliases and "
            "in which shares; a new content is used without a restart. Without it, all are, and a "
            "request that names none gets the newest",
        ),
    ] = None
    bundle_cache: Annotated[
        Path,
        Field(
            title="DIR",
            description="copies of the bundles of a model repository at a URL; put it on a volume "
            "that outlives the container, with room for all of them",
        ),
    ] = Path("~/.cache/aqt/bundles")
    model_memory_bytes: Annotated[
        PositiveInt | None,
        Field(
            title="BYTES",
            description="that weights and workspace of all versions may take together; one that "
            "does not fit is refused. Without it, a version is loaded if as much is available at "
            "that moment; set it where others use the same memory later",
        ),
    ] = None


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
    http_port: Annotated[
        int,
        Field(
            ge=-1,
            le=65535,
            title="PORT",
            description="of the same protocol over HTTP; 0 for any free one, -1 for none. Triton's "
            "is 8000; gRPC is faster",
        ),
    ] = -1
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """How connections are encrypted."""

    tls_certificate: Annotated[
        Path | None,
        Field(
            title="FILE",
            description="PEM of the server's certificate and those that vouch for it; with it, "
            "every port takes encrypted connections only. A new content is used without a restart",
        ),
    ] = None
    tls_key: Annotated[
        Path | None, Field(title="FILE", description="PEM of the certificate's private key")
    ] = None
    tls_client_ca: Annotated[
        Path | None,
        Field(
            title="FILE",
            description="PEM of the CA whose certificates clients must have; without tokens, the "
            "name in the certificate says who calls",
        ),
    ] = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may do what."""

    auth_tokens: Annotated[
        Path | None,
        Field(
            title="FILE",
            description='lines `name = "token"` of who may call; a new content is used without a '
            "restart",
        ),
    ] = None
    auth_jwks: Annotated[
        Path | None,
        Field(
            title="FILE",
            description="JSON web key set of who signs tokens (HS256, RS256); the subject of a "
            "token is who calls. A new content is used without a restart",
        ),
    ] = None
    auth_issuer: Annotated[
        str | None, Field(title="NAME", description="that tokens must have as `iss`")
    ] = None
    auth_audience: Annotated[
        str | None,
        Field(
            title="NAME",
            description="that tokens must have as `aud`; set it where the issuer also makes tokens "
            "for others. Without it, a token that has an audience is refused",
        ),
    ] = None
    auth_policy: Annotated[
        Path | None,
        Field(
            title="FILE",
            description="rules of who may infer with, see, load and unload which models; without "
            "it, whoever is authenticated may do everything",
        ),
    ] = None
    auth_exempt: Annotated[
        tuple[Exempt, ...],
        Field(
            title="WHAT",
            description="may be asked without saying who asks: health, reflection, metrics; may be "
            "repeated. Add metrics where the scraper has no token",
        ),
    ] = (Exempt.HEALTH, Exempt.REFLECTION)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Observe:
    """What the server tells of itself."""

    log_format: Annotated[
        LogFormat,
        Field(
            title="FORM",
            description="of the log on standard error: text, or json, an object a line with the "
            "request's id, model, caller and trace",
        ),
    ] = LogFormat.TEXT
    otlp_endpoint: Annotated[
        str | None,
        Field(
            title="URL",
            pattern="^https?://.+",
            description="of an OpenTelemetry collector over HTTP, such as http://localhost:4318, "
            "that gets a span of each request; needs aqt-engine[otlp]",
        ),
    ] = None
    otlp_ratio: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            title="RATIO",
            description="of traces that begin here which are kept; where the caller has a trace, "
            "the caller decides. Lower it under load",
        ),
    ] = 1.0
    profile_directory: Annotated[
        Path | None,
        Field(
            title="DIR",
            description="for profiles that are asked for at POST /aqt/profile of the HTTP door; "
            "without it none are taken, as they slow the server down",
        ),
    ] = None
    profile_max_s: Annotated[
        PositiveFloat, Field(title="SECONDS", description="of the longest profile")
    ] = 60.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All of them. A field is a table in a file; its settings are flags and variables too."""

    models: Models
    serving: Serving = Serving()
    batching: Batching = Batching()
    listen: Listen = Listen()
    limits: Limits = Limits()
    tls: Tls = Tls()
    access: Access = Access()
    observe: Observe = Observe()

    def __post_init__(self):
        tls, access = self.tls, self.access
        if bool(tls.tls_certificate) != bool(tls.tls_key):
            raise Contradiction(
                "{tls_certificate} and {tls_key} need each other, and one is missing"
            )
        if tls.tls_client_ca and not tls.tls_certificate:
            raise Contradiction("{tls_client_ca} needs {tls_certificate}, which is missing")
        if (access.auth_issuer or access.auth_audience) and not access.auth_jwks:
            raise Contradiction(
                "{auth_issuer} and {auth_audience} need {auth_jwks}, which is missing"
            )
        if self.observe.profile_directory and self.listen.http_port < 0:
            raise Contradiction("{profile_directory} needs {http_port}, and it is -1")
        if access.auth_policy and not (access.auth_tokens or access.auth_jwks or tls.tls_client_ca):
            raise Contradiction(
                "{auth_policy} needs {auth_tokens}, {auth_jwks} or {tls_client_ca}, for else "
                "nobody has a name"
            )
        if self.models.load_model and self.models.model_control is not ModelControl.EXPLICIT:
            raise Contradiction(
                "{load_model} needs {model_control} explicit, and it is "
                f"{self.models.model_control}"
            )
