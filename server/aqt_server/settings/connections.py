"""Where the server listens, and how connections are encrypted."""

import dataclasses
from pathlib import Path
from typing import Annotated

from pydantic import Field


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
