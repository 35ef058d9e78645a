"""Where the server listens, to how many, for how long, and how connections are encrypted."""

import dataclasses
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt


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
    fast_port: Annotated[
        int,
        Field(
            ge=-1,
            le=65535,
            title="PORT",
            description="of the compiled door of gRPC, which takes several times as many requests "
            "a second: unary calls, without TLS, health and reflection; 0 for any free one, -1 for "
            "none",
        ),
    ] = -1
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
class Connections:
    """How many connections there may be, and how long they are kept."""

    max_connections: Annotated[
        PositiveInt,
        Field(
            title="CONNECTIONS",
            le=2**31 - 1,
            description="to each port at once; one more is closed as it comes. Each takes an open "
            "file and some 100 kB",
        ),
    ] = 4096
    max_streams: Annotated[
        PositiveInt,
        Field(
            title="CALLS",
            le=2**31 - 1,
            description="under way at once on one connection of gRPC; its client holds back what "
            "is more",
        ),
    ] = 1024
    idle_s: Annotated[
        PositiveFloat,
        Field(
            title="SECONDS",
            description="without a request after which a connection is closed; give it more than "
            "proxies in front keep theirs for",
        ),
    ] = 300.0


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
