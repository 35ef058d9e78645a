"""Options of commands that call a server, and the client that they make."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import grpc

Servers = Annotated[
    list[str],
    typer.Option(
        "--server",
        metavar="HOST:PORT",
        help="Where the server listens; repeat it for several, which take calls in turn.",
    ),
]
TokenFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Holds the token that says who calls.")
]
Ca = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="PEM of who vouches for the server; with it TLS is used."),
]
Certificate = Annotated[
    Path | None, typer.Option(metavar="FILE", help="PEM of who calls, under --ca.")
]
Key = Annotated[
    Path | None, typer.Option(metavar="FILE", help="PEM of the private key of --certificate.")
]
LOCAL = ("localhost:8001",)


def arguments(
    servers: list[str],
    *,
    token_file: Path | None,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
) -> dict[str, Any]:
    """What a client takes beside its times.

    Raises:
      ValueError: a certificate has no key, or the reverse, or there is no CA with them.
      OSError: a file cannot be read.
    """
    return {
        "address": servers[0] if len(servers) == 1 else servers,
        "credentials": _credentials(ca, certificate, key),
        "token": token_file.read_text().strip() if token_file else None,
    }


def check_pair(ca: Path | None, certificate: Path | None, key: Path | None) -> None:
    """Returns if who calls shows nothing, or all that it takes.

    Raises:
      ValueError: a certificate has no key, or the reverse, or there is no CA with them.
    """
    if bool(certificate) != bool(key) or (certificate and not ca):
        raise ValueError("--certificate needs --key and --ca: give all three")


def _credentials(
    ca: Path | None, certificate: Path | None, key: Path | None
) -> "grpc.ChannelCredentials | None":
    import grpc

    check_pair(ca, certificate, key)
    if not ca:
        return None
    return grpc.ssl_channel_credentials(
        root_certificates=ca.read_bytes(),
        private_key=key.read_bytes() if key else None,
        certificate_chain=certificate.read_bytes() if certificate else None,
    )
